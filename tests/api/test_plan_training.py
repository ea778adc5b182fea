"""Plans of jobs that train: what learns, who teaches, and for how long."""

from collections.abc import Callable
from typing import Any

import pytest

from squeeze.objects import Plan
from tests.api.serving import SPEC


def test_a_training_s_plan_counts_its_adapter_and_the_merged_model(planner: Callable[..., Plan]) -> None:
    step = {"kind": "finetune", "method": "lora", "rank": 8, "merge": True}
    plan = planner("org/llama", replaced=step, data={"source": "hub:org/texts"})
    assert plan.feasible and plan.source_bytes is not None
    assert plan.result_bytes == {"peft": 4 * 8 * 2 * (512 + 896), "safetensors": plan.source_bytes}
    assert plan.host_bytes is not None and plan.host_bytes == plan.least_host_bytes > 1_000_000_000
    assert plan.seconds is None, "nobody knows how long a dataset is"
    (obstacle,) = planner("org/llama", replaced=step, data={"source": "hub:org/texts"}, formats=["gguf"]).obstacles
    assert (obstacle.code, obstacle.param) == ("format_unfit", "formats")


def test_the_plan_of_an_adapter_beside_gptq_counts_both_and_knows_who_can_t_have_it(
    planner: Callable[..., Plan],
) -> None:
    step = {"kind": "finetune", "method": "qlora", "base": "gptq", "rank": 8, "steps": 10}
    data = {"source": "hub:org/texts", "sequence_length": 256}
    plan, rounded = planner("org/llama", replaced=step, data=data), planner("org/llama", formats=["gptq"])
    assert plan.feasible and plan.result_bytes == {"peft": 4 * 8 * 2 * (512 + 896), **rounded.result_bytes}
    assert plan.seconds is not None and {"compressing", "training"} < set(plan.seconds.stages)
    assert plan.host_bytes is not None and plan.host_bytes > 1_000_000_000
    for model, more, code, param in (
        ("org/gpt2", {}, "format_unfit", "formats.1"),
        ("org/gpt2", {"group_size": 64}, "group_size_indivisible", "steps.0.group_size"),
    ):
        obstacles = planner(model, replaced=step | more, data=data).obstacles
        assert (code, param) in [(one.code, one.param) for one in obstacles]


def test_a_distillation_s_plan_counts_the_student_and_sees_that_a_teacher_is_too_shallow(
    planner: Callable[..., Plan],
) -> None:
    step = {"kind": "distill", "method": "logits", "student": {"layers": 1}}
    plan = planner("org/llama", replaced=step, data={})
    assert plan.feasible and plan.source_bytes is not None and set(plan.result_bytes) == {"safetensors"}
    assert plan.source_bytes // 2 < plan.result_bytes["safetensors"] < plan.source_bytes
    (obstacle,) = planner("org/llama", replaced=step | {"student": {"layers": 2}}, data={}).obstacles
    assert (obstacle.code, obstacle.param) == ("model_malformed", "steps.0.student.layers")


CUT = {"kind": "distill", "method": "logits", "student": {"layers": 2}, "steps": 100}
SHORT = {"sequence_length": 256}


@pytest.mark.parametrize(
    "step",
    [{}, {"top_k": "all"}, {"method": "hidden"}, {"method": "sequence"}, {"method": "on_policy"}],
    ids=lambda step: "-".join(step.values()) or "logits",
)
def test_a_distillation_s_plan_has_seconds_and_memory(planner: Callable[..., Plan], step: dict[str, Any]) -> None:
    plan = planner("org/deep", replaced=CUT | step, data=SHORT)
    assert plan.feasible and plan.seconds is not None and plan.host_bytes and plan.least_host_bytes
    assert [*plan.seconds.stages] == ["loading", "teaching", "training", "exporting", "certifying"]
    assert all(seconds > 0 for seconds in plan.seconds.stages.values())
    assert plan.least_host_bytes <= plan.host_bytes
    longer = planner("org/deep", replaced=CUT | step | {"steps": 1000}, data=SHORT).seconds
    assert longer is not None and longer.stages["training"] > 8 * plan.seconds.stages["training"]
    assert abs(plan.seconds.fixed + 4 * plan.seconds.per_block - plan.seconds.likely) < 0.01 * plan.seconds.likely


def test_what_a_teacher_says_takes_room_on_disk(planner: Callable[..., Plan]) -> None:
    kept, beside = (planner("org/deep", replaced=CUT | {"top_k": top_k}, data=SHORT) for top_k in (64, "all"))
    assert kept.disk_bytes and beside.disk_bytes
    assert kept.disk_bytes > beside.disk_bytes + 100 * 8 * 256 * (64 * 4 + 2)


def test_time_of_a_distillation_is_told_where_the_teacher_s_text_is_known(planner: Callable[..., Plan]) -> None:
    hub = {"source": "hub:org/texts", **SHORT}
    for step, known in (({}, False), ({"method": "sequence"}, False), ({"top_k": "all"}, True)):
        plan = planner("org/deep", replaced=CUT | step, data=hub)
        assert (plan.seconds is not None) == known and plan.host_bytes is not None
    whole = {name: value for name, value in CUT.items() if name != "steps"}
    assert planner("org/deep", replaced=whole, data=SHORT).seconds is not None, "all of the generic text, once"


def test_a_student_of_its_own_is_looked_at_too(planner: Callable[..., Plan]) -> None:
    named = CUT | {"student": {"model": "org/shallow"}}
    plan, cut = planner("org/deep", replaced=named, data=SHORT), planner("org/deep", replaced=CUT, data=SHORT)
    assert plan.feasible and plan.result_bytes == cut.result_bytes and plan.host_bytes == cut.host_bytes
    assert plan.result_bytes["safetensors"] == planner("org/llama").source_bytes
    for student, code in (
        ("org/absent", "model_not_found"),
        ("org/quantized", "model_already_compressed"),
        ("org/unknown", "architecture_unsupported"),
    ):
        refused = planner("org/deep", replaced=CUT | {"student": {"model": student}}, data=SHORT)
        assert [(one.code, one.param) for one in refused.obstacles] == [(code, "steps.0.student.model")]
        assert refused.seconds is None and refused.host_bytes is None


def test_what_follows_a_distillation_is_counted_of_the_student(planner: Callable[..., Plan]) -> None:
    chain = planner("org/deep", steps=[CUT, SPEC["steps"][0]], data=SHORT)
    alone = planner("org/llama", data=SHORT)
    assert chain.feasible and chain.result_bytes == alone.result_bytes
    assert chain.seconds is not None and alone.seconds is not None
    assert chain.seconds.stages["compressing"] == alone.seconds.stages["compressing"]
    assert "teaching" in chain.seconds.stages and "training" in chain.seconds.stages


def test_a_training_s_plan_knows_its_time_where_it_knows_its_tokens(planner: Callable[..., Plan]) -> None:
    data = {"source": "hub:org/texts", "sequence_length": 256}
    lora = {"kind": "finetune", "method": "lora", "rank": 8, "steps": 100}
    few, many = (
        planner("org/llama", replaced=lora | more, data=data) for more in ({}, {"steps": 1000, "micro_batch_size": 1})
    )
    assert few.seconds is not None and many.seconds is not None and few.host_bytes and many.host_bytes
    assert 9 * few.seconds.stages["training"] < many.seconds.stages["training"] < 11 * few.seconds.stages["training"]
    assert set(few.seconds.stages) == {"loading", "training", "exporting", "certifying"}
    assert "reference machine" in few.seconds.basis and few.seconds.low < few.seconds.likely < few.seconds.high
    assert many.host_bytes <= few.host_bytes


def test_a_plan_of_a_training_that_finds_its_own_numbers_tells_those_that_it_can(planner: Callable[..., Plan]) -> None:
    auto = {"learning_rate": "auto", "batch_size": "auto", "micro_batch_size": "auto"}
    lora = {"kind": "finetune", "method": "lora", "rank": 8, "steps": 100}
    plan = planner("org/llama", replaced=lora | auto, data={"source": "hub:org/texts", "sequence_length": "auto"})
    assert plan.feasible and plan.host_bytes is not None and plan.seconds is not None
    assert [(one.name, one.value) for one in plan.chosen] == [("learning_rate", 1e-3)]
    usual = planner("org/llama", replaced=lora, data={"source": "hub:org/texts"})
    assert usual.chosen == [] and usual.host_bytes is not None


def test_a_chain_takes_the_seconds_of_all_steps_and_the_memory_of_the_largest(planner: Callable[..., Plan]) -> None:
    data = {"source": "hub:org/texts", "sequence_length": 256}
    lora = {"kind": "finetune", "method": "lora", "steps": 100, "merge": True}
    alone, chain, after = (planner("org/llama", steps=steps, data=data) for steps in (
        [lora], [lora, SPEC["steps"][0]], [SPEC["steps"][0]]))  # fmt: skip
    assert alone.seconds is not None and chain.seconds is not None and after.seconds is not None
    assert chain.seconds.stages["training"] == alone.seconds.stages["training"]
    assert chain.seconds.stages["compressing"] == after.seconds.stages["compressing"]
    assert chain.seconds.likely > alone.seconds.stages["training"] + after.seconds.likely
    assert alone.host_bytes and chain.host_bytes and after.host_bytes
    assert chain.host_bytes >= max(alone.host_bytes // 2, after.host_bytes)
    assert chain.disk_bytes is not None and after.disk_bytes is not None and chain.disk_bytes > after.disk_bytes


def test_where_zeros_are_takes_a_byte_for_each_weight_while_they_are_trained_around(
    planner: Callable[..., Plan],
) -> None:
    zeroing = {"kind": "prune", "method": "wanda"}
    full = {"kind": "finetune", "method": "full", "batch_size": 256, "micro_batch_size": 256}
    dense, zeroed, behind = (
        planner("org/llama", steps=steps, data={"source": "hub:org/texts", "sequence_length": 512})
        for steps in ([full], [zeroing, full], [full, zeroing])
    )
    assert zeroed.host_bytes - dense.host_bytes == 2 * 256 * (256 + 640)
    assert behind.host_bytes == dense.host_bytes, "there are no zeros yet"
