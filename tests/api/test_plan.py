"""Plans from the Hub (through the real client): what the headers, the text and finished jobs tell."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from squeeze.costs.work import counted
from squeeze.objects import Plan
from squeeze.shapes.model import shape_of
from squeeze.specs.job_spec import JobSpec
from tests.api.planning import CONFIG, LLAMA, llama_shapes
from tests.api.serving import SPEC, Running, report
from tests.hub import FaultyHub


@pytest.mark.parametrize("model", ["org/llama", "org/sharded", "org/llama@main"])
def test_a_plan_counts_what_the_headers_say(planner: Callable[..., Plan], sick: FaultyHub, model: str) -> None:
    plan = planner(model, formats=["compressed-tensors", "gptq"])
    commit = sick.repos[model.split("@", maxsplit=1)[0]].refs["main"]
    assert (plan.feasible, plan.obstacles, plan.model_revision) == (True, [], commit)
    linear = 2 * (256 * 256 + 256 * 640)
    other = 1000 * 256 + 256 * 3
    assert plan.parameters == linear + other
    assert plan.source_bytes == 2 * (linear + other)
    groups = 2 * 256 * (2 + 5)
    assert plan.result_bytes["compressed-tensors"] == 2 * other + linear // 2 + 2 * groups
    assert plan.result_bytes["gptq"] == plan.result_bytes["compressed-tensors"] + groups // 2 + 4 * 2 * (256 + 640)
    assert plan.host_bytes is not None and plan.host_bytes > 900_000_000, "two processes with their libraries"
    assert plan.least_host_bytes is not None and plan.least_host_bytes <= plan.host_bytes
    assert plan.disk_bytes is not None and plan.disk_bytes > plan.source_bytes


def test_fewer_bits_and_larger_groups_make_less(planner: Callable[..., Plan]) -> None:
    sizes = [
        planner("org/llama", step).result_bytes["compressed-tensors"]
        for step in (
            {"bits": 8},
            {"bits": 4, "group_size": 32},
            {"bits": 4},
            {"bits": 4, "group_size": "channel"},
            {"bits": 2},
        )
    ]
    assert sizes == sorted(sizes, reverse=True)
    ignoring = planner("org/llama", {"ignore": ["*.down_proj"]}).result_bytes["compressed-tensors"]
    assert ignoring > sizes[2]


def test_a_target_in_bits_or_bytes_is_what_the_plan_counts_with(planner: Callable[..., Plan]) -> None:
    def size(step: dict[str, Any]) -> int:
        return planner("org/llama", step).result_bytes["compressed-tensors"]

    three, four = size({"bits": 3}), size({"bits": 4})
    assert size({"bits": "auto", "target_bits": 3.5}) == (three + four) // 2
    assert size({"bits": "auto", "target_bytes": three + 7}) == three + 7
    plan = planner("org/llama", {"bits": "auto", "target_bytes": 1000})
    assert [(one.code, one.param) for one in plan.obstacles] == [("spec_invalid", "steps.0.target_bytes")]


def test_a_rotation_counts_the_head_that_it_unties_and_names_who_can_t_have_one(planner: Callable[..., Plan]) -> None:
    plain, rotated = planner("org/llama"), planner("org/llama", {"rotation": "hadamard"})
    embedding = 2 * 1000 * 256
    assert rotated.result_bytes["compressed-tensors"] == plain.result_bytes["compressed-tensors"] + embedding
    refused = planner("org/gpt2", {"rotation": "hadamard", "group_size": 32})
    assert [(one.code, one.param) for one in refused.obstacles] == [("architecture_unsupported", "steps.0.rotation")]


def test_a_model_that_samples_its_own_text_needs_its_whole_self_in_memory(planner: Callable[..., Plan]) -> None:
    streaming, sampling = planner("org/llama"), planner("org/llama", data={"source": "self"})
    assert streaming.host_bytes is not None and sampling.host_bytes is not None and streaming.source_bytes is not None
    assert sampling.feasible and sampling.host_bytes >= streaming.source_bytes + 400_000_000 + (1 << 30)
    rounding = {"method": "rtn"}
    plain, unused = (planner("org/llama", rounding, data=data) for data in ({}, {"source": "self"}))
    assert plain.host_bytes == unused.host_bytes


def test_time_is_that_of_the_reference_machine_until_a_job_has_finished(planner: Callable[..., Plan]) -> None:
    seconds = {method: planner("org/llama", {"method": method}).seconds for method in ("rtn", "gptq", "autoround")}
    told = [one for one in seconds.values() if one is not None]
    assert len(told) == 3 and all("reference machine" in one.basis for one in told)
    compressing = [one.stages["compressing"] for one in told]
    assert compressing == sorted(compressing)
    assert all(one.low < one.likely < one.high for one in told)
    assert all(abs(one.fixed + 2 * one.per_block - one.likely) < 0.01 * one.likely for one in told)
    assert planner("org/pickled").seconds is None


def test_finished_jobs_of_the_service_tell_how_long_the_next_one_takes(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    directory = tmp_path / "models" / "llama"
    directory.mkdir(parents=True)
    for name, content in LLAMA.items():
        (directory / name).write_bytes(content)
    running = start(model_roots=(tmp_path / "models",))

    def plan() -> Plan:
        return Plan.model_validate(running.client.post("/v1/plan", json={**SPEC, "model": str(directory)}).json())

    before = plan().seconds
    assert before is not None
    shape = shape_of(CONFIG, llama_shapes())
    work = {stage: count.whole for stage, count in counted(shape, JobSpec.model_validate(SPEC)).items()}
    spent = {"seconds": {stage: 7 * each for stage, each in before.stages.items()}, "work": work}
    finished = report() | {"device": "CPU, 64 threads"}
    running.succeed(running.submit(), {}, tmp_path, finished | {"spent": finished["spent"] | spent})
    after = plan().seconds
    assert after is not None and after.basis == "from 1 job of gptq on this service's CPU, 64 threads"
    assert abs(after.likely - 7 * before.likely) < 0.05 * after.likely
