"""What a model can be cut to is looked at when a job is posted, and by its plan, which says how much stays."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from squeeze.objects import Plan
from tests.api.planning import LLAMA, llama_shapes, safetensors
from tests.api.serving import asking
from tests.squeeze.shapes.test_mixtures import MIXTRAL, shapes

EACH = 256 * 256 + 256 * 640 + 256
MODELS = {
    "org/llama": {**LLAMA, "model.safetensors": safetensors(llama_shapes(4))},
    "org/mixture": {
        "config.json": json.dumps(MIXTRAL | {"architectures": ["MixtralForCausalLM"]}).encode(),
        "model.safetensors": safetensors(shapes(8)),
    },
    "org/rounded": {"config.json": b'{"model_type": "llama", "quantization_config": {"bits": 4}}'},
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, _valkey: str) -> Iterator[Callable[..., Any]]:
    with asking(MODELS, tmp_path_factory, _valkey) as ask:
        yield ask


def depth(**fields: Any) -> dict[str, Any]:
    return {"kind": "prune", "method": "depth"} | fields


@pytest.mark.parametrize(
    ("step", "param", "words"),
    [
        (depth(blocks=4), "steps.0.blocks", "from 1 to 3, not 4"),
        (depth(params_target=0.2), "steps.0.params_target", "the least that params_target can be is 0.414"),
        (depth(speed_target=4.5), "steps.0.speed_target", "a model is less than 4 times as fast"),
    ],
)
def test_what_can_t_be_met_is_refused_at_submit_and_in_the_plan_with_what_can(
    asked: Callable[..., Any], step: dict[str, Any], param: str, words: str
) -> None:
    (obstacle,) = Plan.model_validate(asked("plan", step).json()).obstacles
    assert (obstacle.code, obstacle.param) == ("spec_invalid", param) and words in obstacle.message
    answer = asked("jobs", step)
    assert answer.status_code == 422 and answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]


def test_experts_that_can_t_be_left_out_are_refused_and_a_plan_counts_the_others(asked: Callable[..., Any]) -> None:
    experts = {"kind": "prune", "method": "experts", "experts": 6}
    plan = Plan.model_validate(asked("plan", experts, model="org/mixture").json())
    assert plan.parameters and plan.result_parameters == plan.parameters - 2 * (3 * 32 * 64 + 64 + 1)
    answer = asked("jobs", experts | {"experts": 8}, model="org/mixture")
    assert answer.status_code == 422 and "from 1 to 7, not 8" in answer.json()["error"]["message"]
    answer = asked("jobs", experts)
    assert answer.status_code == 422 and "a llama without experts" in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "steps.0.method"


def test_a_quantized_model_is_refused_at_submit(asked: Callable[..., Any]) -> None:
    answer = asked("jobs", depth(blocks=1), model="org/rounded")
    assert answer.status_code == 422 and answer.json()["error"]["code"] == "model_already_compressed"


def test_the_plan_says_exactly_how_many_parameters_stay_and_what_it_takes(asked: Callable[..., Any]) -> None:
    plan = Plan.model_validate(asked("plan", depth(params_target=0.8)).json())
    assert plan.feasible and plan.parameters == 256_256 + 4 * EACH
    assert plan.result_parameters == 256_256 + 2 * EACH and plan.result_bytes == {
        "safetensors": 2 * plan.result_parameters
    }
    assert plan.least_host_bytes and plan.host_bytes is not None and plan.host_bytes >= plan.least_host_bytes
    assert plan.host_bytes > 900_000_000, "the certifier's process beside the job's"
    assert plan.seconds is not None and set(plan.seconds.stages) == {
        "loading",
        "compressing",
        "evaluating",
        "certifying",
    }
    assert not plan.result_parameters_estimated
    quicker = Plan.model_validate(asked("plan", depth(speed_target=1.5, speed_of="prompt")).json())
    assert quicker.result_parameters_estimated and quicker.result_parameters == plan.result_parameters
    chain = Plan.model_validate(asked("plan", depth(blocks=2), {"kind": "quantize", "method": "rtn"}).json())
    assert chain.feasible and chain.result_parameters == plan.result_parameters
    assert chain.result_bytes["compressed-tensors"] < plan.result_bytes["safetensors"]
    assert asked("plan", {"kind": "quantize", "method": "rtn"}).json()["result_parameters"] is None
    assert asked("jobs", depth(blocks=2)).status_code == 202
