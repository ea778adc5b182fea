"""What a request may ask of training: combinations that make no sense are refused with what would."""

from typing import Any

import pytest
from pydantic import ValidationError

from squeeze.errors import FormatUnfit
from squeeze.specs.formats import refuse_unfit
from squeeze.specs.job_spec import JobSpec

DATA = {"source": "file-abcdefgh"}
GPTQ = {"kind": "quantize", "method": "gptq"}


def lora(**fields: Any) -> dict[str, Any]:
    return {"kind": "finetune", "method": "lora"} | fields


def logits(**fields: Any) -> dict[str, Any]:
    return {"kind": "distill", "method": "logits", "student": {"layers": 2}} | fields


def job(*steps: dict[str, Any], **fields: Any) -> JobSpec:
    return JobSpec.model_validate({"model": "org/model", "steps": steps, "data": DATA} | fields)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lora(steps=10, epochs=2), "steps and epochs all say how long"),
        (lora(tokens=10, epochs=2), "epochs and tokens all say how long"),
        (lora(patience=3), "say `evaluate_every` too"),
        (lora(batch_size=4, micro_batch_size=5), "more than a batch of 4"),
        (lora(init="pissa", dora=True), "take one of them"),
        (lora(init="loftq"), "'default' or 'pissa'"),
        (lora(method="qlora", init="loftq", base="int8"), "set base to nf4"),
        (lora(method="qlora", init="loftq", dora=True), "take one of them"),
        (lora(method="qlora", init="loftq", merge=True), "leave `merge` out"),
        (lora(method="qlora", base="nf3"), "'nf4', 'int8' or 'gptq'"),
        (lora(method="qlora", init="loftq", base="gptq"), "set base to nf4"),
        (lora(method="qlora", base="gptq", dora=True), "leave `dora` out, or take base nf4 or int8"),
        (lora(method="qlora", base="gptq", double_quantization=False), "double_quantization is of nf4"),
        (lora(method="qlora", group_size=64), "group_size is of gptq.*set base to gptq"),
        (lora(method="qlora", base="gptq", group_size=16), "32, 64, 128 or 'channel'"),
        (lora(rank=0), "greater than or equal to 1"),
        (lora(precision="fp8"), "'auto', 'fp32', 'bf16' or 'fp16'"),
        (lora(optimizer="sgd"), "'adamw', 'adamw8bit'"),
        (lora(ema=1.0), "less than 1"),
        (lora(bits=4), "Extra inputs"),
        (lora(method="prompt", merge=True), "can't be merged into the weights: leave `merge` out"),
        (lora(method="prefix", packing=True), "a sequence of its own: leave `packing` out"),
        (lora(method="prefix", activation_checkpointing=True), "lost where activations are computed again"),
        (lora(method="head", layers=-1), "greater than or equal to 0"),
        (lora(method="head", merge=True), "Extra inputs"),
        (logits(student={}), "say who learns"),
        (logits(student={"layers": 0}), "greater than or equal to 1"),
        (logits(top_k=0), "a number from 1 to 4096, or `all`"),
        (logits(objective="tv"), "'forward_kl', 'reverse_kl' or 'jsd'"),
        (logits(alpha=1.5), "less than or equal to 1"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(list(value)[2:]),
)
def test_fields_that_don_t_go_together_are_refused(step: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        job(step)


@pytest.mark.parametrize(
    ("steps", "fields", "words"),
    [
        ([lora(), lora()], {}, "set its `merge` to true"),
        ([GPTQ, lora()], {}, "let the step that quantizes be the last"),
        ([lora(), GPTQ], {}, "set its `merge` to true"),
        ([lora(method="qlora", sharding="full")], {"limits": {"gpus": 2}}, "set sharding to ddp"),
        ([lora(optimizer="galore")], {"limits": {"gpus": 2}}, "galore is computed on one GPU alone"),
        ([lora(method="prompt"), GPTQ], {}, "what prompt learns can't be merged.*let it be the last step"),
        ([lora()], {"data": {}}, "learns from examples: name a file"),
        ([lora()], {"data": {"source": "self"}}, "learns from examples: name a file"),
        ([lora(sharding="full")], {"limits": {"gpus": 1}}, "says what several GPUs hold"),
        ([lora(batch_size=2)], {"limits": {"gpus": 4}}, "a batch of 2 sequences can't be dealt out to 4 GPUs"),
        ([lora(sharding="hybrid")], {"limits": {"gpus": 3}}, "3 GPUs can't be halved"),
        ([GPTQ, logits()], {}, "let the step that quantizes be the last"),
        ([logits()], {"data": {"source": "self"}}, "learns from text that is there"),
        ([logits(method="on_policy", sharding="full")], {"limits": {"gpus": 2}}, "stands whole on every GPU"),
        ([lora(merge=True), logits(student={})], {}, "say who learns"),
    ],
    ids=[
        "twice",
        "after quantizing",
        "unmerged",
        "quantized base on GPUs",
        "optimizer on GPUs",
        "unmergeable",
        "no data",
        "own text",
        "parts for one GPU",
        "small batch",
        "odd halves",
        "distilling what is quantized",
        "distilling own text",
        "GPUs on policy",
        "distilling what was trained",
    ],
)
def test_steps_that_can_t_follow_each_other_are_refused(
    steps: list[dict[str, Any]], fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        job(*steps, **fields)


def test_formats_are_what_the_last_step_makes_where_none_are_named() -> None:
    assert job(lora()).formats == ("peft",)
    assert job(lora(merge=True)).formats == ("peft", "safetensors")
    assert job(lora(merge=True), GPTQ).formats == ("compressed-tensors",)
    assert job(logits(), data={}).formats == ("safetensors",)
    assert job(logits(), GPTQ).formats == ("compressed-tensors",)


@pytest.mark.parametrize(
    ("steps", "formats", "param"),
    [
        ([lora()], ["safetensors"], "steps.0.merge"),
        ([lora(method="prefix")], ["safetensors"], "formats"),
        ([lora(merge=True)], ["gptq"], "formats"),
        ([logits()], ["peft"], "formats"),
        ([lora(merge=True), GPTQ], ["peft"], "formats"),
        ([GPTQ], ["peft"], "formats"),
    ],
)
def test_formats_that_can_t_hold_it_are_refused(steps: list[dict[str, Any]], formats: list[str], param: str) -> None:
    spec = job(*steps, formats=formats)
    with pytest.raises(FormatUnfit) as refused:
        refuse_unfit(spec.steps, spec.formats)
    assert refused.value.param == param
    refuse_unfit(job(lora(merge=True)).steps, ["safetensors"])


def test_a_classifier_is_the_last_that_a_job_makes_and_written_whole() -> None:
    spec = job(lora(method="head"))
    assert spec.formats == ("safetensors",) and spec.label_column == "label" and job(lora()).label_column is None
    refuse_unfit(spec.steps, spec.formats)
    with pytest.raises(ValidationError, match="head makes a classifier, which no step goes on with"):
        job(lora(method="head"), GPTQ)
    for name in ("peft", "gguf"):
        with pytest.raises(FormatUnfit, match="head"):
            refuse_unfit(spec.steps, (name,))


def test_an_adapter_beside_gptq_s_weights_is_written_with_these() -> None:
    step = lora(method="qlora", base="gptq")
    assert job(step).formats == ("peft", "gptq") and job(lora(method="qlora")).formats == ("peft",)
    assert job(step | {"merge": True}).formats == ("peft", "gptq", "safetensors")
    for formats in (["peft", "gptq"], ["gptq"]):
        refuse_unfit(job(step).steps, formats)
    refuse_unfit(job(step | {"merge": True}).steps, ["safetensors"])
    with pytest.raises(FormatUnfit, match="add gptq to `formats`"):
        refuse_unfit(job(step).steps, ["peft"])
    for other, words in ((lora(method="qlora"), "Set `base` to gptq"), (lora(), "gptq can't hold what lora makes")):
        with pytest.raises(FormatUnfit, match=words):
            refuse_unfit(job(other).steps, ["peft", "gptq"])


def test_what_was_written_of_it_is_read_again() -> None:
    (step,) = job(lora(method="qlora", base="gptq", group_size="channel")).steps
    assert type(step).model_validate(step.model_dump(mode="json")) == step
