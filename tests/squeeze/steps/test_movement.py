"""Movement pruning as it is asked for: its ramp, what goes before and behind it, what is refused, what it takes."""

from itertools import pairwise
from typing import Any

import pytest
from pydantic import ValidationError

from squeeze.costs.trainable import Learned, learned
from squeeze.costs.training_memory import needed_to_train
from squeeze.costs.training_work import counted_training
from squeeze.errors import FormatUnfit
from squeeze.shapes.model import shape_of
from squeeze.specs.formats import refuse_unfit
from squeeze.specs.job_spec import JobSpec
from squeeze.specs.rounds import rounds_of
from squeeze.steps.movement import Movement
from tests.squeeze.making import config, tensors, training

DATA = {"source": "file-abcdefgh"}
GPTQ = {"kind": "quantize", "method": "gptq"}
WANDA = {"kind": "prune", "method": "wanda"}
FULL = {"kind": "finetune", "method": "full"}
LOGITS = {"kind": "distill", "method": "logits"}
LINEARS = 4 * 256 * 256 * (1 + 2 * 0.5 + 1 + 3 * 3)


def moving(**fields: Any) -> dict[str, Any]:
    return {"kind": "prune", "method": "movement"} | fields


def job(*steps: dict[str, Any], **fields: Any) -> JobSpec:
    return JobSpec.model_validate({"model": "org/model", "steps": steps, "data": DATA} | fields)


def step(**fields: Any) -> Movement:
    return Movement.model_validate(moving(**fields))


def test_zeros_come_after_a_while_steeply_at_first_and_are_all_there_before_the_end() -> None:
    asked = step(sparsity=0.8, ramp_start=0.1, ramp_end=0.7)
    shares = [asked.zeroed_after(done, 100) for done in range(101)]
    assert shares[:11] == [0.0] * 11 and shares[70:] == [0.8] * 31
    assert shares[40] == pytest.approx(0.8 * (1 - 0.5**3)) and shares[11] == pytest.approx(0.8 * (1 - (59 / 60) ** 3))
    rises = [later - former for former, later in pairwise(shares[10:71])]
    assert rises == sorted(rises, reverse=True) and rises[-1] > 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sparsity": 0.6, "pattern": "2:4"}, "leave `sparsity` out"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"ramp_start": 0.5, "ramp_end": 0.5}, "set ramp_end to more"),
        ({"ramp_end": 1.0}, "less than 1"),
        ({"steps": 3, "ramp_end": 0.9}, "of 3 steps, 1 are before the first weight is zeroed and 3 until all are"),
        ({"steps": 2}, "train for more steps"),
        ({"optimizer": "galore"}, "set optimizer to adamw"),
        ({"optimizer": "badam"}, "set optimizer to adamw"),
        ({"score_learning_rate": 0}, "greater than 0"),
        ({"distribution": "owl"}, "Extra inputs"),
        ({"patience": 2}, "say `evaluate_every` too"),
    ],
)
def test_fields_that_don_t_go_together_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        job(moving(**fields))


@pytest.mark.parametrize(
    ("steps", "fields", "words"),
    [
        ([moving()], {"data": {}}, "movement learns from examples: name a file"),
        ([moving()], {"data": {"source": "self"}}, "movement learns from examples"),
        ([moving()], {"limits": {"gpus": 2}}, "movement trains on one GPU"),
        ([moving(), FULL | {"method": "lora"}], {}, "what step 0 zeroes, lora would fill"),
        ([moving(), {"kind": "prune", "method": "depth", "blocks": 3}], {}, "depth would fill or move"),
        ([moving(), GPTQ | {"sparsity": 0.6}], {}, "or let it do both"),
        ([WANDA, moving()], {}, "zeroes no more than step 0 did"),
        ([moving(), WANDA | {"sparsity": 0.4}], {}, "let the share grow"),
        ([moving(), {"kind": "prune", "method": "svd", "params_target": 0.8}], {}, "keep one of svd and the other"),
        ([GPTQ, moving()], {}, "let the step that quantizes be the last"),
        ([moving(), LOGITS | {"student": {"layers": 2}}], {}, "leave `student` out"),
    ],
)
def test_chains_that_make_no_sense_are_refused(steps: list[dict[str, Any]], fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        job(*steps, **fields)


@pytest.mark.parametrize(
    ("steps", "firsts"),
    [
        ([moving(), GPTQ], [0]),
        ([moving(), FULL, GPTQ], [0, 1]),
        ([moving(), LOGITS], [0, 1]),
        ([WANDA, moving(sparsity=0.7)], [0, 1]),
        ([moving(), WANDA | {"sparsity": 0.7}], [0]),
        ([{"kind": "prune", "method": "depth", "blocks": 3}, moving()], [0]),
    ],
)
def test_it_stands_in_a_job_where_a_training_does(steps: list[dict[str, Any]], firsts: list[int]) -> None:
    assert [one.first for one in rounds_of(job(*steps))] == firsts


def test_it_is_written_as_it_is_or_under_zstd() -> None:
    assert job(moving()).formats == ("safetensors",)
    packed = job(moving(), formats=["safetensors-zst"])
    refuse_unfit(packed.steps, packed.formats)
    for steps, name in (([moving()], "peft"), ([moving()], "gptq"), ([FULL | {"method": "lora"}], "safetensors-zst")):
        with pytest.raises(FormatUnfit):
            refuse_unfit(job(*steps).steps, [name])


def known(**fields: Any) -> Learned:
    method = training(moving(**fields)).steps[0]
    assert isinstance(method, Movement)
    return learned(method, config(), tensors(4))


def test_a_score_takes_sixteen_bytes_and_its_weight_what_is_set_aside() -> None:
    full = learned(training({"method": "full"}).steps[0], config(), tensors(4))
    moved = known(sparsity=0.25)
    assert moved.scores == LINEARS and (moved.parameters, moved.linears) == (full.parameters, full.linears)
    assert moved.bytes - full.bytes == 16 * LINEARS
    assert known(ignore=["*.mlp.*"]).scores == 4 * 256 * 256 * 3

    def learning(fields: dict[str, Any]) -> int:
        spec, shape = training(fields), shape_of(config(), tensors(4))
        return needed_to_train(shape, spec, spec.steps[0], learned(spec.steps[0], config(), tensors(4)), {}).learning

    usual, beside = {"method": "full"}, moving(sparsity=0.25)
    assert learning(beside) - learning(usual) == (16 + 1 + 4 * 0.25) * LINEARS
    looked = {"evaluate_every": 5, "ema": 0.9}
    assert learning(beside | looked) - learning(usual | looked) == (16 + 8 + 1 + 4 * 0.25) * LINEARS


def test_scores_are_work_in_every_step() -> None:
    counts = []
    for fields in ({"method": "full"}, moving()):
        spec = training(fields)
        method = spec.steps[0]
        known_of = learned(method, config(), tensors(4))
        found = counted_training(shape_of(config(), tensors(4)), spec, method, known_of, 2048, last=True, steps=4)
        counts.append(found["training"])
    assert counts[1].fixed > counts[0].fixed and counts[1].blocks == counts[0].blocks
