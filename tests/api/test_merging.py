"""What a job merges is looked at when it is posted, as far as settings tell, and by its plan, headers too."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobs.settings import Settings
from squeeze.objects import Plan
from tests.api.planning import CONFIG, LLAMA, llama_shapes, safetensors
from tests.api.serving import serve
from tests.hub import FaultyHub

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "org/llama", "r": 4, "lora_alpha": 8, "bias": "none"}
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def _adapter(columns: int = 256, **settings: Any) -> dict[str, bytes]:
    shapes: dict[str, tuple[int, ...]] = {f"{Q}.lora_A.weight": (4, columns), f"{Q}.lora_B.weight": (256, 4)}
    return {
        "adapter_config.json": json.dumps(ADAPTER | settings).encode(),
        "adapter_model.safetensors": safetensors(shapes),
    }


MODELS = {
    "org/llama": LLAMA,
    "org/tuned": LLAMA,
    "org/wider": {**LLAMA, "model.safetensors": safetensors(llama_shapes() | {"model.norm.weight": (300,)})},
    "org/gpt2": {**LLAMA, "config.json": b'{"model_type": "gpt2"}'},
    "org/rounded": {**LLAMA, "config.json": json.dumps({**CONFIG, "quantization_config": {"bits": 4}}).encode()},
    "org/adapter": _adapter(),
    "org/narrow": _adapter(columns=200),
    "org/foreign": _adapter(base_model_name_or_path="org/other"),
    "org/prompt": _adapter(peft_type="PROMPT_TUNING"),
    "org/pickled": {"adapter_config.json": json.dumps(ADAPTER).encode(), "adapter_model.bin": b"x" * 100},
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyHub]:
    with FaultyHub() as hub:
        for name, files in MODELS.items():
            hub.add_files(name, files, tmp_path_factory.mktemp("hub"))
        yield hub


def step(*models: Any, **fields: Any) -> dict[str, Any]:
    return {"kind": "merge", "method": "linear", "models": list(models)} | fields


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, _valkey: str, hub: FaultyHub) -> Iterator[Callable[..., Any]]:
    data = tmp_path_factory.mktemp("merging")
    settings = Settings(data, f"sqlite:///{data}/squeeze.db", _valkey, (data / "storage").as_uri())
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_ENDPOINT", hub.url)
        with serve(settings) as running:

            def ask(route: str, *steps: dict[str, Any], model: str = "org/llama") -> Any:
                return running.client.post(f"/v1/{route}", json={"model": model, "steps": steps})

            yield ask


REFUSED = [
    ("org/gpt2", "model_malformed", "model_type 'gpt2'", True),
    ("org/rounded", "model_already_compressed", "16-bit model", True),
    ("org/foreign", "model_malformed", "same_base", True),
    ("org/prompt", "model_malformed", "PROMPT_TUNING", True),
    ("org/wider", "model_malformed", "shape", False),
    ("org/narrow", "model_malformed", "another model", False),
    ("org/pickled", "model_malformed", "as safetensors", False),
    ("org/absent", "model_not_found", "org/absent", False),
]


@pytest.mark.parametrize(("wrong", "code", "words", "at_once"), REFUSED)
def test_what_doesn_t_go_together_is_told_by_the_plan_and_at_once_where_settings_show_it(
    asked: Callable[..., Any], wrong: str, code: str, words: str, at_once: bool
) -> None:
    plan = Plan.model_validate(asked("plan", step("org/tuned", wrong)).json())
    (obstacle,) = plan.obstacles
    assert (obstacle.code, obstacle.param) == (code, "steps.0.models.1.model") and words in obstacle.message
    answer = asked("jobs", step("org/tuned", wrong))
    assert answer.status_code == (422 if at_once else 202), answer.text
    if at_once:
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == (code, "steps.0.models.1.model")


def test_models_and_adapters_that_go_together_are_planned_with_what_they_take(asked: Callable[..., Any]) -> None:
    merging = step("org/tuned", "org/adapter", {"model": "org/foreign", "same_base": True})
    plan = Plan.model_validate(asked("plan", merging).json())
    assert plan.feasible and plan.source_bytes and plan.result_bytes == {"safetensors": plan.source_bytes}
    assert plan.host_bytes and plan.host_bytes > 600_000_000
    assert plan.seconds is not None
    assert set(plan.seconds.stages) == {"loading", "merging", "evaluating", "certifying"}
    assert plan.disk_bytes is not None and plan.disk_bytes > 4 * plan.source_bytes
    chain = Plan.model_validate(asked("plan", merging, {"kind": "quantize", "method": "rtn"}).json())
    assert chain.feasible and chain.seconds is not None
    assert {"merging", "compressing"} <= set(chain.seconds.stages)
    assert chain.result_bytes["compressed-tensors"] < plan.source_bytes
    assert asked("jobs", merging).status_code == 202
