"""Whether zeros fit a model is looked at when the job is posted, from headers, and by its plan, with what it takes."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from squeeze.objects import Plan
from tests.api.planning import CONFIG, LLAMA, llama_shapes, safetensors
from tests.api.serving import asking

DOWN = "model.layers.0.mlp.down_proj.weight"
GPTQ = {"kind": "quantize", "method": "gptq"}
MODELS = {
    "org/llama": LLAMA,
    "org/odd": {**LLAMA, "model.safetensors": safetensors(llama_shapes() | {DOWN: (256, 636)})},
    "org/rounded": {**LLAMA, "config.json": json.dumps({**CONFIG, "quantization_config": {"bits": 4}}).encode()},
    "org/mixture": {**LLAMA, "config.json": json.dumps({**CONFIG, "model_type": "mixtral"}).encode()},
    "org/bare": {"README.md": b"x"},
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, _valkey: str) -> Iterator[Callable[..., Any]]:
    with asking(MODELS, tmp_path_factory, _valkey) as ask:
        yield ask


def step(method: str = "sparsegpt", **fields: Any) -> dict[str, Any]:
    return {"kind": "prune", "method": method} | fields


@pytest.mark.parametrize(
    ("model", "fields", "code", "param", "words"),
    [
        ("org/odd", {"pattern": "4:8"}, "spec_invalid", "steps.0.pattern", "has 636, not 632 or 640. Take 2:4"),
        ("org/rounded", {}, "model_already_compressed", None, "quantized already"),
    ],
)
def test_what_can_t_be_pruned_so_is_refused_at_once_and_by_the_plan(
    asked: Callable[..., Any], model: str, fields: dict[str, Any], code: str, param: str | None, words: str
) -> None:
    answer = asked("jobs", step(**fields), model=model)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, code, param) and words in error["message"]
    both = GPTQ | {"group_size": "channel"} | fields
    if fields:
        assert words in asked("jobs", both, model=model).json()["error"]["message"]
    (obstacle,) = Plan.model_validate(asked("plan", step(**fields), model=model).json()).obstacles
    assert (obstacle.code, obstacle.param) == (code, param) and words in obstacle.message
    left = step(**fields, ignore=["*.layers.0.mlp.down_proj"])
    assert asked("jobs", left, model="org/odd").status_code == 202
    assert asked("jobs", step(**fields), model="org/bare").status_code == 202, "the worker's to refuse"


@pytest.mark.parametrize(
    ("model", "fields", "code", "param", "words"),
    [
        ("org/odd", {"pattern": "4:8"}, "spec_invalid", "steps.0.pattern", "has 636, not 632 or 640. Take 2:4"),
        ("org/rounded", {}, "model_already_compressed", None, "quantized already"),
        ("org/mixture", {}, "architecture_unsupported", "steps.0.method", "take sparsegpt, wanda or magnitude"),
    ],
)
def test_zeros_that_are_learned_are_refused_where_they_don_t_fit(
    asked: Callable[..., Any], model: str, fields: dict[str, Any], code: str, param: str | None, words: str
) -> None:
    data = {"source": "hub:org/text"}
    error = asked("jobs", step("movement", **fields), model=model, data=data).json()["error"]
    assert (error["code"], error["param"]) == (code, param) and words in error["message"]
    found = Plan.model_validate(asked("plan", step("movement", **fields), model=model, data=data).json()).obstacles
    assert (code, param) in [(one.code, one.param) for one in found]


@pytest.mark.parametrize(
    ("steps", "fields", "words"),
    [
        ([step(sparsity=1.0)], {}, "less than 1"),
        ([step(sparsity=0.6, pattern="2:4")], {}, "leave `sparsity` out"),
        ([step(pattern="3:4")], {}, "2:4"),
        ([step()], {"formats": ["compressed-tensors"]}, "safetensors, safetensors-zst can"),
        ([step(pattern="2:4", distribution="owl")], {}, "same share of zeros everywhere"),
        ([step(sparsity=0.9, distribution="owl")], {}, "take less than 0.05"),
        ([step("magnitude", distribution="owl")], {}, "distribution"),
        ([step("wanda"), step("magnitude")], {}, "keep one of them"),
        ([step(), {"kind": "finetune", "method": "lora"}], {"data": {"source": "file-abcdefgh"}}, "would fill or move"),
        ([step(), GPTQ | {"sparsity": 0.5}], {}, "or let it do both"),
        ([step("movement")], {}, "learns from examples: name a file"),
        ([step("movement", steps=2)], {"data": {"source": "file-abcdefgh"}}, "train for more steps"),
        ([GPTQ | {"sparsity": 0.6, "pattern": "2:4"}], {}, "leave `sparsity` out"),
        ([GPTQ | {"sparsity": 0.5, "symmetric": False}], {"formats": ["gguf"]}, "zeros would not be zero"),
        ([{"kind": "quantize", "method": "rtn"}, step()], {}, "let the step that quantizes be the last"),
    ],
)
def test_what_contradicts_itself_is_refused_with_what_would_do(
    asked: Callable[..., Any], steps: list[dict[str, Any]], fields: dict[str, Any], words: str
) -> None:
    answer = asked("jobs", *steps, **fields)
    assert answer.status_code == 422 and words in answer.json()["error"]["message"], answer.text


def test_a_plan_says_that_the_bytes_stay_and_counts_what_it_takes(asked: Callable[..., Any]) -> None:
    plans = [Plan.model_validate(asked("plan", step(method)).json()) for method in ("magnitude", "wanda", "sparsegpt")]
    for plan in plans:
        assert plan.feasible and plan.result_bytes == {"safetensors": plan.source_bytes}
        assert plan.seconds is not None and plan.host_bytes
        assert set(plan.seconds.stages) == {"loading", "compressing", "evaluating", "exporting", "certifying"}
        assert plan.source_bytes and plan.disk_bytes and plan.disk_bytes >= 3 * plan.source_bytes
    compressing = [plan.seconds.stages["compressing"] for plan in plans if plan.seconds]
    assert compressing[0] == min(compressing)  # it looks at no text
    uneven = Plan.model_validate(asked("plan", step("wanda", distribution="owl")).json()).seconds
    assert uneven is not None and 0 < uneven.stages["allotting"] < uneven.stages["compressing"]
    chain = Plan.model_validate(asked("plan", step(), {"kind": "quantize", "method": "gptq"}).json())
    alone = Plan.model_validate(asked("plan", GPTQ).json()).seconds  # by whose speed the chain goes
    assert chain.feasible and chain.seconds is not None and plans[2].seconds is not None and alone is not None
    assert chain.seconds.stages["compressing"] > 1.5 * alone.stages["compressing"]
    joint = Plan.model_validate(asked("plan", GPTQ | {"sparsity": 0.5}).json())
    assert joint.seconds is not None and joint.result_bytes == chain.result_bytes
    assert joint.seconds.stages["compressing"] < chain.seconds.stages["compressing"]
    assert chain.seconds.stages["certifying"] <= plans[2].seconds.stages["certifying"]
    assert chain.result_bytes["compressed-tensors"] < 0.8 * (chain.source_bytes or 0)
    assert (chain.disk_bytes or 0) > (plans[2].source_bytes or 0) * 3


def test_a_plan_of_zeros_that_are_learned_counts_the_scores(asked: Callable[..., Any]) -> None:
    fields = {"data": {"source": "hub:org/text", "sequence_length": 64}}
    full = {"kind": "finetune", "method": "full", "steps": 20}
    plain, learned = (
        Plan.model_validate(asked("plan", one, **fields).json()) for one in (full, step("movement", steps=20))
    )
    assert {one.param for one in learned.obstacles} <= {"data.source"}, "which the Hub here does not have"
    assert learned.saves and "files, memory and time stay as they were" in learned.saves[0]
    assert plain.seconds and learned.seconds and plain.host_bytes and learned.host_bytes
    assert learned.seconds.stages["training"] > plain.seconds.stages["training"]
    assert learned.host_bytes >= plain.host_bytes and (learned.disk_bytes or 0) > (plain.disk_bytes or 0)
    assert learned.result_bytes == plain.result_bytes
