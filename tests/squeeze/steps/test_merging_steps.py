"""What a request may ask of merging: what makes no sense is refused with what would; what it costs is counted."""

from typing import Any

import pytest
from pydantic import ValidationError

from squeeze.costs.merging_work import counted_merging, merging_bytes
from squeeze.errors import FormatUnfit
from squeeze.shapes.model import shape_of
from squeeze.specs.formats import refuse_unfit
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.merging import Merge

GPTQ = {"kind": "quantize", "method": "gptq"}
LORA = {"kind": "finetune", "method": "lora"}
DATA = {"source": "file-abcdefgh"}


def merge(*models: Any, **fields: Any) -> dict[str, Any]:
    return {"kind": "merge", "method": "linear", "models": list(models) or ["org/a", "org/b"]} | fields


def weighted(*weights: float) -> list[dict[str, Any]]:
    return [{"model": f"org/model-{n}", "weight": weight} for n, weight in enumerate(weights)]


def job(*steps: dict[str, Any], **fields: Any) -> JobSpec:
    return JobSpec.model_validate({"model": "org/base", "steps": steps} | fields)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (merge("org/a", method="ties"), "at least 2"),
        (merge("org/a", method="magmax"), "at least 2"),
        (merge(models=[]), "at least 1 item"),
        (merge(*weighted(1, -1)), "sum to zero"),
        (merge(*weighted(1, -3)), "sum to zero or less"),
        (merge(*weighted(1, 0)), "weight 0"),
        (merge(*weighted(0.5)), "set normalize to false"),
        (merge(*weighted(1, -1), method="ties"), "take the method linear"),
        (merge(*weighted(1, float("nan"))), "less than or equal to 100"),
        (merge("org/a", "../b"), "name a Hub id"),
        (merge({"model": "job-0123456789", "revision": "main"}), "only an id of the Hub"),
        (merge({"model": "org/a@v1", "revision": "main"}), "say it once"),
        (merge({"model": "org/a", "revision": "a/../b"}), "no revision"),
        (merge(density=0.2), "Extra inputs"),
        (merge(method="ties", density=0.0), "greater than 0"),
        (merge(method="dare", drop=1.0), "less than 1"),
    ],
)
def test_what_can_t_be_merged_is_refused(step: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        job(step)


@pytest.mark.parametrize(
    ("steps", "fields", "words"),
    [
        ([GPTQ | {"bits": 4}, merge()], {}, "let the step that quantizes be the last"),
        ([LORA | {"merge": True}, merge()], {"data": DATA}, "the first one"),
        ([merge(), merge()], {}, "let one step merge"),
        ([merge(), LORA], {"data": DATA}, "set its `merge` to true"),
        ([merge(), LORA | {"merge": True}], {"data": DATA, "formats": ["peft"]}, "safetensors alone"),
        ([merge()], {"limits": {"gpus": 2}}, "limits.gpus to 1"),
    ],
)
def test_steps_that_can_t_follow_each_other_are_refused(
    steps: list[dict[str, Any]], fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        job(*steps, **fields)


def test_every_model_that_is_merged_is_named_with_its_revision_and_its_field() -> None:
    spec = job(merge("org/a", {"model": "org/b", "revision": "v2"}, "job-0123456789"))
    fields = ("model", *(f"steps.0.models.{n}.model" for n in range(3)))
    assert spec.models == dict(zip(fields, ("org/base", "org/a", "org/b@v2", "job-0123456789"), strict=True))
    assert JobSpec.model_validate(spec.model_dump(mode="json")) == spec


def test_formats_are_what_the_last_step_makes() -> None:
    assert job(merge()).formats == ("safetensors",)
    assert job(merge(), GPTQ).formats == ("compressed-tensors",)
    assert job(merge(), LORA | {"merge": True}, data=DATA).formats == ("safetensors",)
    for name in ("gguf", "peft", "gptq"):
        spec = job(merge()).model_copy(update={"formats": (name,)})
        with pytest.raises(FormatUnfit, match="safetensors"):
            refuse_unfit(spec.steps, spec.formats)


def test_work_grows_with_entries_and_memory_with_the_largest_tensor_alone() -> None:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (1000, 256)}
    for block in range(4):
        shapes[f"model.layers.{block}.self_attn.q_proj.weight"] = (256, 256)
    shape = shape_of({"hidden_size": 256, "vocab_size": 1000}, shapes, "BF16", [])
    few, many = (job(merge(*(f"org/{n}" for n in range(count)))) for count in (2, 8))
    found = []
    for spec in (few, many):
        step = spec.steps[0]
        assert isinstance(step, Merge)
        found.append(counted_merging(shape, spec, step))
    assert 3 * found[0]["merging"].whole < found[1]["merging"].whole < 4 * found[0]["merging"].whole
    assert found[0]["evaluating"] == found[1]["evaluating"]
    assert merging_bytes(2_000_000_000) - merging_bytes(1_000_000_000) == 4_000_000_000
