"""Predicted memory of distillations against what was measured, and what it depends on."""

from typing import Any

import pytest

from squeeze.costs.distillation_memory import DistillationMemory, needed_to_distill
from squeeze.costs.distillation_work import Lessons
from squeeze.costs.trainable import learned
from squeeze.shapes.model import of_blocks, shape_of
from squeeze.steps.distillation import Distill, evenly
from tests.squeeze.making import config, distilling, tensors

TWO: dict[str, Any] = {"micro_batch_size": 2, "batch_size": 4}
NARROW = {"student": {"model": "org/narrow"}}  # two blocks of half the width

# (width, blocks, vocabulary) of the teacher, tokens of a sequence, the step; the largest resident bytes of the job's
# process, and of all of its processes at one moment, in millions: by benchmarks/training_memory.py, on one thread of a
# CPU. The text had 24 records, of 15,000 tokens together where sequences have 512, else of 6,000.
MEASURED: tuple[tuple[tuple[int, int, int], int, dict[str, Any], int, int], ...] = (
    ((512, 4, 4096), 512, {}, 922, 917),
    ((1024, 4, 32000), 256, {}, 1967, 1905),
    ((512, 4, 4096), 512, {"top_k": "all"}, 957, 957),
    ((1024, 4, 4096), 256, {"top_k": "all", "precision": "bf16"}, 1295, 1295),
    ((512, 4, 4096), 512, {"method": "hidden"}, 996, 996),
    ((1024, 8, 4096), 256, {"method": "hidden"} | NARROW, 1200, 1200),
    ((512, 4, 4096), 512, {"method": "hidden", "match": "relations"}, 1465, 1446),
    ((512, 4, 4096), 512, {"method": "sequence", "new_tokens": 64}, 789, 919),
    ((1024, 8, 4096), 256, {"method": "sequence", "new_tokens": 64} | NARROW, 1046, 1045),
    ((512, 4, 4096), 512, {"method": "on_policy"}, 718, 925),
    ((1024, 8, 4096), 256, {"method": "on_policy"} | NARROW, 1109, 1109),
)


def needed(
    size: tuple[int, int, int],
    length: int,
    step: dict[str, Any] | None = None,
    told: Lessons | None = None,
    text_bytes: int = 0,
) -> DistillationMemory:
    width, blocks, vocabulary = size
    its = config(width, vocab_size=vocabulary, max_position_embeddings=2048)
    sides = tensors(blocks, width, vocabulary=vocabulary)
    spec = distilling(TWO | {"student": {"layers": 2}} | (step or {}), data={"sequence_length": length})
    (method,) = spec.steps
    assert isinstance(method, Distill)
    own, cut = its, of_blocks(sides, evenly(blocks, 2))
    if method.student.model is not None:
        own, cut = its | {"hidden_size": width // 2}, tensors(2, width // 2, vocabulary=vocabulary)
    known, formats = learned(method, own, cut), dict.fromkeys(spec.formats, 0)
    return needed_to_distill(shape_of(its, sides), shape_of(own, cut), spec, method, known, formats, told, text_bytes)


@pytest.mark.parametrize(("size", "length", "step", "job", "together"), MEASURED)
def test_predictions_are_near_what_was_measured(
    size: tuple[int, int, int], length: int, step: dict[str, Any], job: int, together: int
) -> None:
    memory = needed(size, length, step, Lessons(15_000 if length == 512 else 6_000, 4 * length, 35))
    assert 0.85 <= memory.job / job / 1e6 <= 1.15
    assert 0.85 <= memory.whole / together / 1e6 <= 1.15


def test_a_teacher_that_reads_block_by_block_is_not_in_memory_and_one_that_judges_each_batch_is() -> None:
    shallow, deep = (needed((512, blocks, 4096), 256) for blocks in (4, 64))
    assert deep.teaching == shallow.teaching and deep.job == shallow.job
    for step in ({"top_k": "all"}, {"method": "hidden"}, {"method": "on_policy"}):
        shallow, deep = (needed((512, blocks, 4096), 256, step) for blocks in (4, 64))
        added = 60 * (2 * 512**2 + 2 * 256 * 512 + 3 * 3 * 512**2 + 2 * 512) * 4
        assert deep.beside - shallow.beside == added
    writing = {"method": "sequence"}
    shallow, deep = (needed((512, blocks, 4096), 256, writing) for blocks in (4, 64))
    assert deep.beside == shallow.beside and deep.teaching > shallow.teaching + added, "it writes before the student is"


def test_what_is_kept_of_the_teacher_and_its_hidden_states_may_lie_on_disk() -> None:
    few, many = (needed((512, 4, 4096), 256, told=Lessons(read, 1024, 10)) for read in (10_000, 10_000_000))
    assert many.stored == 1000 * few.stored == 10_000_000 * (64 * 4 + 2)
    assert many.job - few.job > many.stored - few.stored
    assert many.job_least - few.job_least == 8 * (10_000_000 - 10_000), "which token of the text is which learned one"
    assert needed((512, 4, 100_000), 256, told=Lessons(10, 1024, 1)).stored == 10 * (64 * 6 + 2)
    assert needed((512, 4, 4096), 256, {"top_k": "all"}, Lessons(10, 1024, 1)).stored == 0
    plain, texts = needed((512, 4, 4096), 256), needed((512, 4, 4096), 256, text_bytes=10**9)
    assert texts.process == plain.process + 3 * 10**9


def test_relations_grow_with_the_square_of_the_length_and_matched_states_with_the_blocks() -> None:
    size = (512, 8, 4096)
    short, long = (needed(size, length, {"method": "hidden", "match": "relations"}) for length in (512, 1024))
    assert long.student.passing > 3.7 * short.student.passing
    mse, cosine = (
        needed(size, 512, {"method": "hidden", "match": match}).student.passing for match in ("mse", "cosine")
    )
    assert cosine > mse > needed(size, 512, {"top_k": "all"}).student.passing
    narrow = needed(size, 512, {"method": "hidden"} | NARROW)
    alone = needed(size, 512, {"top_k": "all"} | NARROW)
    assert narrow.beside - alone.beside == 16 * 2 * 512 * 256, "a matrix a pair of blocks, which learns too"


def test_a_student_that_writes_takes_what_it_writes_in_place_of_the_text() -> None:
    size, told = (512, 4, 4096), Lessons(10_000, 10_000, 200)
    short, long = (needed(size, 512, {"method": "on_policy", "new_tokens": n}, told).student for n in (32, 256))
    assert short.activations < long.activations
    both = needed(size, 512, {"method": "on_policy", "new_tokens": 32, "alpha": 0.5}, told).student
    assert both.activations > short.activations, "it reads the text too"
