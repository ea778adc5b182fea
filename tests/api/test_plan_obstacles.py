"""Every obstacle that a plan names, wherever the model comes from."""

from collections.abc import Callable
from pathlib import Path

import pytest

from squeeze.objects import Plan
from tests.api.planning import MODELS
from tests.api.serving import SPEC, Running, report
from tests.hub import FaultyHub


def test_a_config_with_absurd_numbers_is_planned_without_them(planner: Callable[..., Plan]) -> None:
    assert planner("org/absurd").source_bytes == planner("org/llama").source_bytes


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        ("org/absent", "model_not_found", "org/absent"),
        ("org/llama@nowhere", "model_not_found", "nowhere"),
        ("org/gated", "model_gated", "HF_TOKEN"),
        ("org/unknown", "architecture_unsupported", "mamba"),
        ("org/classifier", "architecture_unsupported", "is a classifier"),
        ("org/custom", "model_unsafe", "Python code"),
        ("org/quantized", "model_already_compressed", "quantized already"),
        ("org/empty", "model_malformed", "no weights"),
        ("org/bare", "model_malformed", "config.json"),
        ("org/broken", "model_malformed", "model.safetensors"),
        ("org/nojson", "model_malformed", "config.json"),
        ("org/endless", "model_malformed", "does not describe"),
        ("org/vast", "model_malformed", "config.json"),
        ("/etc", "model_directory_forbidden", "SQUEEZE_MODEL_ROOTS"),
        ("job-00000000", "job_not_found", "job-00000000"),
    ],
)
def test_what_stands_in_the_way_is_named(planner: Callable[..., Plan], model: str, code: str, words: str) -> None:
    plan = planner(model)
    assert not plan.feasible
    found = {obstacle.code: obstacle.message for obstacle in plan.obstacles}
    assert code in found, found
    assert words in found[code]


def test_one_obstacle_does_not_hide_the_others(planner: Callable[..., Plan]) -> None:
    plan = planner("org/gpt2", data={"source": "file-00000000"}, formats=["gptq"])
    params = {obstacle.param: obstacle for obstacle in plan.obstacles}
    assert set(params) == {"data.source", "formats.0", "steps.0.group_size"}
    assert params["formats.0"].code == "format_unfit" and "compressed-tensors" in params["formats.0"].message
    assert "96 inputs" in params["steps.0.group_size"].message
    assert planner("org/gpt2", {"group_size": 32}).feasible


def test_a_dataset_has_to_be_there(planner: Callable[..., Plan]) -> None:
    assert planner("org/llama", data={"source": "hub:org/texts:train"}).feasible
    (obstacle,) = planner("org/llama", evaluation={"source": "hub:org/none"}).obstacles
    assert (obstacle.code, obstacle.param) == ("data_unusable", "evaluation.source")
    assert "no dataset org/none" in obstacle.message


def test_legacy_weights_are_no_obstacle_but_tell_less(planner: Callable[..., Plan]) -> None:
    plan = planner("org/pickled")
    assert (plan.feasible, plan.source_bytes, plan.parameters, plan.result_bytes) == (True, 1000, None, {})


def test_a_mirror_that_tells_little_or_sends_too_much_gives_the_same_plan(
    planner: Callable[..., Plan], sick: FaultyHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planner("org/llama")
    monkeypatch.setattr(sick.faults, "bare_listing", True)
    monkeypatch.setattr(sick.faults, "ignore_range", True)
    assert planner("org/llama") == plan


@pytest.mark.parametrize("status", [500, 429, 403])
def test_a_hub_that_refuses_is_an_obstacle(
    planner: Callable[..., Plan], sick: FaultyHub, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(sick.faults, "status", status)
    assert [obstacle.code for obstacle in planner("org/llama").obstacles] == ["hub_unavailable"]


def test_a_hub_that_is_down_is_an_obstacle(start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    plan = Plan.model_validate(start().client.post("/v1/plan", json=SPEC).json())
    assert [obstacle.code for obstacle in plan.obstacles] == ["hub_unavailable"]


def test_a_directory_and_an_earlier_job_are_looked_at_too(start: Callable[..., Running], tmp_path: Path) -> None:
    directory = tmp_path / "models" / "llama"
    directory.mkdir(parents=True)
    for name, content in MODELS["org/sharded"].items():
        (directory / name).write_bytes(content)
    running = start(model_roots=(tmp_path / "models",))
    local = Plan.model_validate(running.client.post("/v1/plan", json={**SPEC, "model": str(directory)}).json())
    assert local.feasible and local.parameters
    job_id = running.submit()
    early = Plan.model_validate(running.client.post("/v1/plan", json={**SPEC, "model": job_id}).json())
    assert [obstacle.code for obstacle in early.obstacles] == ["spec_invalid"]
    files = {f"compressed-tensors/{name}": content for name, content in MODELS["org/quantized"].items()}
    running.succeed(job_id, files, tmp_path, report())
    again = Plan.model_validate(running.client.post("/v1/plan", json={**SPEC, "model": job_id}).json())
    assert [obstacle.code for obstacle in again.obstacles] == ["model_already_compressed"]
    assert again.parameters == local.parameters


def test_a_wrong_spec_is_refused_as_it_is_at_submit(shared: Running) -> None:
    body = {**SPEC, "steps": [{**SPEC["steps"][0], "bitz": 4}]}
    plan, submit = (shared.client.post(path, json=body) for path in ("/v1/plan", "/v1/jobs"))
    assert plan.status_code == submit.status_code == 422
    assert plan.json()["detail"] == submit.json()["detail"]
