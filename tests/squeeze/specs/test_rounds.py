"""Jobs that prune and train in turn: which rounds their steps make, and what may follow what."""

from typing import Any

import pytest
from pydantic import ValidationError

from squeeze.specs.job_spec import JobSpec
from squeeze.specs.rounds import rounds_of

GPTQ = {"kind": "quantize", "method": "gptq"}
DEPTH = {"kind": "prune", "method": "depth", "params_target": 0.9}
WIDTH = {"kind": "prune", "method": "width", "params_target": 0.9}
LORA = {"kind": "finetune", "method": "lora", "merge": True}
LOGITS: dict[str, Any] = {"kind": "distill", "method": "logits", "steps": 2}
MERGE = {"kind": "merge", "method": "linear", "models": [{"model": "org/other"}]}


def wanda(sparsity: float) -> dict[str, Any]:
    return {"kind": "prune", "method": "wanda", "sparsity": sparsity}


def job(*steps: dict[str, Any], **fields: Any) -> JobSpec:
    return JobSpec.model_validate({"model": "org/base", "steps": steps, "data": {"source": "file-abcdefgh"}} | fields)


@pytest.mark.parametrize(
    ("steps", "firsts"),
    [
        ([DEPTH, LOGITS, GPTQ], [0]),
        ([LORA, wanda(0.5), GPTQ], [0]),
        ([DEPTH, LOGITS, WIDTH, LOGITS, GPTQ], [0, 2]),
        ([DEPTH, WIDTH], [0, 1]),
        ([LORA, DEPTH], [0, 1]),
        ([LORA, LORA, LORA], [0, 1, 2]),
        ([MERGE, DEPTH, LOGITS], [0, 1]),
    ],
)
def test_a_round_ends_where_a_kind_of_step_comes_again(steps: list[dict[str, Any]], firsts: list[int]) -> None:
    spec = job(*steps)
    rounds = rounds_of(spec)
    assert [one.first for one in rounds] == firsts
    assert sum((one.spec.steps for one in rounds), ()) == spec.steps
    assert rounds[-1].spec.formats == spec.formats
    assert all(one.spec.formats == ("safetensors",) for one in rounds[:-1])


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([wanda(0.3), wanda(0.5)], "nothing is learned between them"),
        ([wanda(0.5), LORA], "what step 0 zeroes, lora would fill"),
        (
            [wanda(0.5), LOGITS | {"sharding": "zero2"}],
            "with zero2 nobody sees the gradients of logits: .* ddp or full",
        ),
        ([wanda(0.5), DEPTH], "depth would fill or move"),
        ([DEPTH, LOGITS | {"student": {"layers": 2}}], "leave `student` out"),
        ([LORA, LOGITS], "say who learns"),
        ([LORA, LORA | {"merge": False}], "let the step that trains merge it"),
    ],
)
def test_what_can_t_go_on_is_refused(steps: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        job(*steps)


@pytest.mark.parametrize("steps", [[LOGITS | {"sharding": "full"}], [GPTQ]])
def test_zeros_stay_where_their_gradients_are_seen(steps: list[dict[str, Any]]) -> None:
    assert job(wanda(0.5), *steps, limits={"gpus": 2}).limits.gpus == 2


def test_what_was_finetuned_before_teaches_and_who_learns_is_said() -> None:
    assert len(rounds_of(job(LORA, LOGITS | {"student": {"layers": 2}}))) == 2
    assert job(LORA, LORA).formats == ("safetensors",)
