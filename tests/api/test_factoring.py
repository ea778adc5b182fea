"""Whether factors fit a model is looked at when the job is posted, from headers, and by its plan, with its cost."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from squeeze.objects import Plan
from tests.api.serving import asking
from tests.api.test_sparsifying import MODELS


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, _valkey: str) -> Iterator[Callable[..., Any]]:
    with asking(MODELS, tmp_path_factory, _valkey) as ask:
        yield ask


def step(params_target: float = 0.7, **fields: Any) -> dict[str, Any]:
    return {"kind": "prune", "method": "svd", "params_target": params_target} | fields


@pytest.mark.parametrize(
    ("model", "fields", "code", "param", "words"),
    [
        ("org/llama", {"params_target": 0.1}, "spec_invalid", "steps.0.params_target", "least that params_target can"),
        ("org/rounded", {}, "model_already_compressed", None, "quantized already"),
    ],
)
def test_what_can_t_be_factored_so_is_refused_at_once_and_by_the_plan(
    asked: Callable[..., Any], model: str, fields: dict[str, Any], code: str, param: str | None, words: str
) -> None:
    answer = asked("jobs", step(**fields), model=model)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, code, param) and words in error["message"]
    (obstacle,) = Plan.model_validate(asked("plan", step(**fields), model=model).json()).obstacles
    assert (obstacle.code, obstacle.param) == (code, param) and words in obstacle.message
    if param is not None:
        least = float(error["message"].rpartition(" ")[2])
        assert asked("jobs", step(params_target=least), model=model).status_code == 202
    assert asked("jobs", step(**fields), model="org/bare").status_code == 202, "the worker's to refuse"


TRAINING = {"kind": "finetune", "method": "lora"}
LOGITS = {"kind": "distill", "method": "logits", "steps": 2, "batch_size": 1}
GPTQ = {"kind": "quantize", "method": "gptq"}


@pytest.mark.parametrize(
    ("steps", "fields", "words"),
    [
        ([{"kind": "prune", "method": "svd"}], {}, "params_target"),
        ([step(1.0)], {}, "less than 1"),
        ([step(rank_multiple=7)], {}, "8, 16, 32 or 64"),
        ([step()], {"formats": ["gguf"]}, "safetensors"),
        ([step(), step()], {}, "keep one of them"),
        ([step(), {"kind": "prune", "method": "wanda"}], {}, "keep one of svd and the other"),
        ([step(), TRAINING], {"data": {"source": "file-abcdefgh"}}, "lora would not keep"),
        ([GPTQ, step()], {}, "let the step that quantizes be the last"),
    ],
)
def test_what_contradicts_itself_is_refused_with_what_would_do(
    asked: Callable[..., Any], steps: list[dict[str, Any]], fields: dict[str, Any], words: str
) -> None:
    answer = asked("jobs", *steps, **fields)
    assert answer.status_code == 422 and words in answer.json()["error"]["message"], answer.text


def test_a_plan_says_where_the_bytes_stay_and_counts_what_it_takes(asked: Callable[..., Any]) -> None:
    merged = Plan.model_validate(asked("plan", step()).json())
    assert merged.feasible and merged.result_bytes == {"safetensors": merged.source_bytes}
    assert merged.result_parameters is None, "multiplied out it has as many as before"
    assert merged.seconds is not None and merged.host_bytes and merged.disk_bytes
    stages = {"loading", "allotting", "compressing", "evaluating", "exporting", "certifying"}
    assert set(merged.seconds.stages) == stages
    even = Plan.model_validate(asked("plan", step(ranks="uniform", gradients=False)).json())
    assert even.seconds is not None and even.seconds.stages["allotting"] < merged.seconds.stages["allotting"]
    assert even.disk_bytes and even.disk_bytes < merged.disk_bytes
    learned = Plan.model_validate(asked("plan", step(), LOGITS, formats=["onnx"]).json())
    assert learned.feasible and learned.result_bytes["onnx"] < 0.8 * (learned.source_bytes or 0)
    assert learned.parameters and (learned.most_result_parameters or 0) == int(0.7 * learned.parameters)
    assert learned.seconds is not None and set(learned.seconds.stages) == stages | {"teaching", "training"}
    assert (learned.host_bytes or 0) > 16 * learned.parameters and "factors in the ONNX file" in learned.saves[0]
    chain = Plan.model_validate(asked("plan", step(), GPTQ).json())
    assert chain.feasible and chain.result_bytes["compressed-tensors"] < 0.8 * (chain.source_bytes or 0)
    assert chain.result_parameters is None
