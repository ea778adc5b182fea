"""Counted work of a distillation: the student's training, and a teacher that reads, stands beside it, or writes."""

from typing import Any

import pytest

from squeeze.costs.distillation_work import CHUNK_TOKENS, GENERIC_BYTES, Lessons, counted_distillation, lessons
from squeeze.costs.trainable import learned
from squeeze.costs.training_work import BYTES_PER_TOKEN, counted_training
from squeeze.costs.work import STAGES, Count, of_head, of_token
from squeeze.shapes.model import of_blocks, shape_of
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.distillation import Distill, Sequence, evenly
from tests.squeeze.making import config, distilling, llama, tensors

TOLD = Lessons(read=100_000, seen=8 * 256 * 10, examples=500)
GENERIC_TOKENS = int(GENERIC_BYTES / BYTES_PER_TOKEN)
EACH: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": "all"},
    {"method": "hidden"},
    {"method": "hidden", "match": "relations"},
    {"method": "sequence"},
    {"method": "on_policy"},
)


def counted(blocks: int, step: dict[str, Any] | None = None, told: Lessons = TOLD) -> dict[str, Count]:
    spec = distilling(step)
    (method,) = spec.steps
    assert isinstance(method, Distill)
    sides = of_blocks(tensors(blocks), evenly(blocks, blocks // 2))
    known, student = learned(method, config(), sides), shape_of(config(), sides)
    return counted_distillation(llama(blocks), student, spec, method, known, told, last=True)


@pytest.mark.parametrize("step", EACH, ids=lambda step: "-".join(map(str, step.values())) or "logits")
def test_work_is_linear_in_the_blocks_and_grows_with_the_tokens(step: dict[str, Any]) -> None:
    two, four, eight = (counted(blocks, step) for blocks in (4, 8, 16))
    assert [*two] == [stage for stage in STAGES if stage in two] == [
        "loading", "teaching", "training", "exporting", "certifying"]  # fmt: skip
    for stage in two:
        assert four[stage].blocks - two[stage].blocks == pytest.approx((eight[stage].blocks - four[stage].blocks) / 2)
    many = counted(4, step, Lessons(2 * TOLD.read, 2 * TOLD.seen, 2 * TOLD.examples))
    assert many["training"].whole > two["training"].whole and many["teaching"].whole >= two["teaching"].whole


def test_a_teacher_that_reads_is_what_can_be_counted_by_hand() -> None:
    teacher = llama(4)
    forward = 4 * of_token(teacher.blocks[0], teacher, 256)
    longer = Lessons(TOLD.read + 1000, TOLD.seen, TOLD.examples)
    first, second = counted(4)["teaching"], counted(4, told=longer)["teaching"]
    assert second.blocks - first.blocks == pytest.approx(1000 * forward)
    assert 1000 * of_head(teacher) < second.fixed - first.fixed < 3 * 1000 * of_head(teacher)
    twice = counted(4, told=Lessons(CHUNK_TOKENS + 1, TOLD.seen, 1))["teaching"]
    once = counted(4, told=Lessons(CHUNK_TOKENS, TOLD.seen, 1))["teaching"]
    assert twice.blocks - once.blocks > 1000 * forward / 1000, "all blocks are read from disk once more"


def test_a_teacher_beside_the_student_costs_its_forward_pass_in_every_step_and_one_that_was_read_does_not() -> None:
    kept, beside = (counted(4, {"top_k": top_k}) for top_k in (64, "all"))
    teacher = llama(4)
    assert beside["training"].blocks - kept["training"].blocks == pytest.approx(
        TOLD.seen * 4 * of_token(teacher.blocks[0], teacher, 256)
    )
    assert beside["teaching"].whole < kept["teaching"].whole
    hidden, relations = (counted(4, {"method": "hidden", "match": match})["training"] for match in ("mse", "relations"))
    assert beside["training"].whole < hidden.whole < relations.whole


def test_the_student_s_training_is_counted_as_any_that_trains_the_whole_model() -> None:
    spec = distilling({"method": "sequence"})
    (step,) = spec.steps
    assert isinstance(step, Distill)
    sides = of_blocks(tensors(4), evenly(4, 2))
    known, student = learned(step, config(), sides), shape_of(config(), sides)
    alone = counted_training(student, spec, step, known, TOLD.seen, last=True)
    told = counted(4, {"method": "sequence"})
    assert told["training"] == alone["training"] and told["certifying"] == alone["certifying"]
    assert told["exporting"].whole > alone["exporting"].whole, "the student is compared with the teacher"


def test_what_is_written_costs_as_much_as_its_tokens_are_many() -> None:
    few, many = (counted(4, {"method": "sequence", "new_tokens": n})["teaching"].whole for n in (64, 256))
    assert 3 < many / few < 5
    short, long = (counted(4, {"method": "on_policy", "new_tokens": n})["training"].whole for n in (16, 64))
    assert short < long
    mixed = counted(4, {"method": "on_policy", "new_tokens": 16, "own_share": 0.5})["training"].whole
    assert mixed != short
    text_too = counted(4, {"method": "on_policy", "new_tokens": 16, "alpha": 0.5})["training"].whole
    assert text_too > short


@pytest.mark.parametrize(
    ("step", "source", "text_bytes", "records", "told"),
    [
        ({"steps": 5}, None, None, None, Lessons(17554, 5 * 8 * 256, 100)),
        ({}, None, None, None, Lessons(GENERIC_TOKENS, GENERIC_TOKENS, 0)),
        ({"epochs": 2}, "file-abcdefgh", 35_000, 100, Lessons(9000, 18000, 90)),
        ({}, "file-abcdefgh", 35_000, 10, Lessons(9000, 9000, 40)),
        ({"method": "sequence", "new_tokens": 64}, "file-abcdefgh", 35_000, 100, Lessons(7200, 7200, 90)),
        ({"steps": 5}, "hub:org/text", None, None, None),
        ({"method": "sequence", "steps": 5}, "hub:org/text", None, None, None),
        ({"method": "hidden", "steps": 5}, "hub:org/text", None, None, Lessons(10240, 10240, 60)),
        ({"method": "hidden"}, "hub:org/text", None, None, None),
    ],
)
def test_what_is_learned_from_is_told_by_the_text_where_that_is_known(
    step: dict[str, Any], source: str | None, text_bytes: int | None, records: int | None, told: Lessons | None
) -> None:
    spec = distilling(step, data={"source": source, "sequence_length": 256})
    (method,) = spec.steps
    assert isinstance(method, Distill)
    found = lessons(spec, method, 256, text_bytes, records)
    assert (found is None) == (told is None)
    if found is not None and told is not None:
        assert (found.read, found.seen) == (told.read, told.seen)
        assert told.examples in (0, found.examples)


def test_a_teacher_writes_no_more_than_a_sequence_holds() -> None:
    spec: JobSpec = distilling({"method": "sequence", "new_tokens": 4096})
    (step,) = spec.steps
    assert isinstance(step, Sequence)
    found = lessons(spec, step, 256, 35_000, 100)
    assert found is not None and found.read == 90 * 256
