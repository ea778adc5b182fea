"""Plans from the Hub (through the real client), from directories and from earlier jobs: figures and every obstacle."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.settings import Settings
from squeeze.costs.work import counted
from squeeze.objects import Plan
from squeeze.shapes.model import shape_of
from squeeze.specs.job_spec import JobSpec
from tests.api.serving import SPEC, Running, report, serve
from tests.hub import FaultyHub

CONFIG = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 640, "max_position_embeddings": 512}


def _headed(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """A header without tensors."""
    packed = json.dumps({name: {"dtype": "BF16", "shape": shape} for name, shape in shapes.items()}).encode()
    return len(packed).to_bytes(8, "little") + packed


def _safetensors(shapes: dict[str, tuple[int, ...]]) -> bytes:
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    packed = json.dumps(header).encode()
    return len(packed).to_bytes(8, "little") + packed + bytes(at)


def _shapes(blocks: int = 2) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (1000, 256), "model.norm.weight": (256,)}
    for block in range(blocks):
        prefix = f"model.layers.{block}"
        shapes[f"{prefix}.self_attn.q_proj.weight"] = (256, 256)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (256, 640)
        shapes[f"{prefix}.input_layernorm.weight"] = (256,)
    return shapes


LLAMA = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": _safetensors(_shapes())}
SHARDED = {
    "config.json": LLAMA["config.json"],
    "a.safetensors": _safetensors(dict(list(_shapes().items())[:3])),
    "b.safetensors": _safetensors(dict(list(_shapes().items())[3:])),
    "model.safetensors.index.json": json.dumps({"weight_map": {"x": "b.safetensors", "y": "a.safetensors"}}).encode(),
}
KNOWN = json.dumps({**CONFIG, "vocab_size": 1000}).encode()
CONV = {"transformer.h.0.mlp.c_proj.weight": (96, 64), "wte.weight": (100, 64)}  # (in, out): 96 inputs
MODELS = {
    "org/llama": LLAMA,
    "org/sharded": SHARDED,
    "org/deep": {"config.json": KNOWN, "model.safetensors": _safetensors(_shapes(4))},
    "org/shallow": {"config.json": KNOWN, "model.safetensors": _safetensors(_shapes(2))},
    "org/gated": LLAMA,
    "org/unknown": {**LLAMA, "config.json": b'{"model_type": "mamba"}'},
    "org/classifier": {
        **LLAMA,
        "config.json": json.dumps({**CONFIG, "architectures": ["LlamaForSequenceClassification"]}).encode(),
    },
    "org/custom": {**LLAMA, "config.json": b'{"model_type": "own", "auto_map": {}}'},
    "org/quantized": {**LLAMA, "config.json": json.dumps({**CONFIG, "quantization_config": {"bits": 4}}).encode()},
    "org/gpt2": {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": _safetensors(CONV)},
    "org/empty": {"config.json": LLAMA["config.json"]},
    "org/bare": {"README.md": b"x"},
    "org/broken": {**LLAMA, "model.safetensors": b"\xff" * 100},
    "org/nojson": {**LLAMA, "config.json": b"<html>"},
    "org/endless": {**LLAMA, "model.safetensors": _headed({"model.layers.0.x.weight": (10**200, 4)})},
    "org/absurd": {**LLAMA, "config.json": json.dumps({**CONFIG, "hidden_size": 10**400}).encode()},
    "org/pickled": {"config.json": LLAMA["config.json"], "pytorch_model.bin": b"x" * 1000},
    "org/vast": {**LLAMA, "config.json": b" " * (2 << 20)},
}


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyHub]:
    """A Hub that has MODELS, and may be made ill."""
    with FaultyHub() as hub:
        for name, files in MODELS.items():
            hub.add_files(name, files, tmp_path_factory.mktemp("hub"))
        hub.repos["org/gated"].token = "hf_of_somebody_else"
        texts = tmp_path_factory.mktemp("texts")
        (texts / "train.txt").write_bytes(b" " * (2 << 20))
        hub.add_dataset("org/texts", texts)
        yield hub


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory, _valkey: str, sick: FaultyHub) -> Iterator[Callable[..., Plan]]:
    """Plans a spec against that Hub."""
    data = tmp_path_factory.mktemp("plan")
    settings = Settings(data, f"sqlite:///{data}/squeeze.db", _valkey, (data / "storage").as_uri())
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_ENDPOINT", sick.url)
        with serve(settings) as running:

            def plan(model: str, step: dict[str, Any] | None = None, **changes: Any) -> Plan:
                first = changes.pop("replaced", None) or {**SPEC["steps"][0], **(step or {})}
                steps = changes.pop("steps", [first])
                answer = running.client.post("/v1/plan", json={"model": model, "steps": steps, **changes})
                assert answer.status_code == 200, answer.text
                return Plan.model_validate(answer.json())

            yield plan


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


def test_a_config_with_absurd_numbers_is_planned_without_them(planner: Callable[..., Plan]) -> None:
    assert planner("org/absurd").source_bytes == planner("org/llama").source_bytes


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


def test_a_dataset_has_to_be_there(planner: Callable[..., Plan]) -> None:
    assert planner("org/llama", data={"source": "hub:org/texts:train"}).feasible
    (obstacle,) = planner("org/llama", evaluation={"source": "hub:org/none"}).obstacles
    assert (obstacle.code, obstacle.param) == ("data_unusable", "evaluation.source")
    assert "no dataset org/none" in obstacle.message


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
    shape = shape_of(CONFIG, _shapes())
    work = {stage: count.whole for stage, count in counted(shape, JobSpec.model_validate(SPEC)).items()}
    spent = {"seconds": {stage: 7 * each for stage, each in before.stages.items()}, "work": work}
    finished = report() | {"device": "CPU, 64 threads"}
    running.succeed(running.submit(), {}, tmp_path, finished | {"spent": finished["spent"] | spent})
    after = plan().seconds
    assert after is not None and after.basis == "from 1 job of gptq on this service's CPU, 64 threads"
    assert abs(after.likely - 7 * before.likely) < 0.05 * after.likely


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
    for name, content in SHARDED.items():
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
