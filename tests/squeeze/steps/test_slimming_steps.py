"""What may be asked of a step that makes a model smaller: what makes no sense is refused; what it costs is counted."""

from typing import Any

import pytest
from pydantic import ValidationError

from squeeze.costs.slimming_work import counted_slimming, looking_bytes, slimming_bytes
from squeeze.errors import FormatUnfit, SpecInvalid
from squeeze.shapes.model import shape_of
from squeeze.shapes.slimmed import blocks_left, carried, elements_of, narrowed
from squeeze.specs.formats import refuse_unfit
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.slimming import Depth, Slim, Width

GPTQ = {"kind": "quantize", "method": "gptq"}
LORA = {"kind": "finetune", "method": "lora"}
DATA = {"source": "file-abcdefgh"}
CONFIG = {"hidden_size": 64, "vocab_size": 1000}


def depth(**fields: Any) -> dict[str, Any]:
    return {"kind": "prune", "method": "depth"} | (fields or {"blocks": 2})


def width(**fields: Any) -> dict[str, Any]:
    return {"kind": "prune", "method": "width"} | fields


def job(*steps: dict[str, Any], **fields: Any) -> JobSpec:
    return JobSpec.model_validate({"model": "org/base", "steps": steps} | fields)


def llama(blocks: int = 4) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (1000, 64), "model.norm.weight": (64,)}
    for n in range(blocks):
        found[f"model.layers.{n}.self_attn.q_proj.weight"] = (64, 64)
        found[f"model.layers.{n}.mlp.down_proj.weight"] = (64, 192)
        found[f"model.layers.{n}.self_attn.rotary_emb.inv_freq"] = (8,)
    return found


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (depth(params_target=None), "say how small"),
        (depth(blocks=2, params_target=0.5), "say how small"),
        (depth(blocks=2, speed_target=1.5), "say how small"),
        (depth(speed_target=1.0), "greater than 1"),
        (width(params_target=0.5, speed_target=1.5), "say how small"),
        (depth(blocks=0), "greater than or equal to 1"),
        (depth(params_target=1.0), "less than 1"),
        (depth(params_target=0.0), "greater than 0"),
        (depth(blocks=2, importance="size"), "influence"),
        (depth(blocks=2, iterative=True), "set `importance` to it"),
        (width(), "say how small"),
        (width(params_target=0.5, heads=2), "say how small"),
        (width(intermediate_size=500), "480 or 512, not 500"),
        (width(hidden_size=100), "96 or 128, not 100"),
        (width(blocks=2), "Extra inputs"),
        (width(heads=2, importance="influence"), "'activation' or 'gradient'"),
    ],
)
def test_what_is_no_size_is_refused(step: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        job(step)


@pytest.mark.parametrize(
    ("steps", "fields", "words"),
    [
        ([depth(), LORA], {"data": DATA}, "set its `merge`|let the step that trains merge it"),
        ([depth(), LORA | {"merge": True}], {"data": DATA, "formats": ["peft"]}, "take safetensors alone"),
        ([depth()], {"limits": {"gpus": 2}}, "one process"),
        ([GPTQ, depth()], {}, "the step that quantizes be the last"),
        ([{"kind": "prune", "method": "wanda"}, depth()], {}, "would fill or move"),
    ],
)
def test_steps_that_don_t_go_with_it_are_refused(
    steps: list[dict[str, Any]], fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        job(*steps, **fields)


def test_it_is_written_as_a_plain_model_and_other_steps_go_on_with_that() -> None:
    assert job(depth()).formats == ("safetensors",)
    assert job(depth(), GPTQ).formats == ("compressed-tensors",)
    assert job(depth(), LORA | {"merge": True}, data=DATA).formats == ("safetensors",)
    with pytest.raises(FormatUnfit, match="add a step that quantizes"):
        refuse_unfit(job(depth()).steps, ("gguf",))


def test_a_share_is_met_by_as_many_blocks_as_fit_and_the_least_that_can_be_is_told() -> None:
    sides = carried({"num_hidden_layers": 4}, llama(5))  # the fifth only predicts further tokens
    outside, each = 64064, 64 * 64 + 64 * 192
    assert elements_of(sides) == outside + 4 * each
    for target in (0.63, 0.75, 0.8749, 0.999):
        left = blocks_left(Depth(method="depth", params_target=target), CONFIG, sides)
        assert outside + left * each <= target * elements_of(sides) and 1 <= left <= 3
        assert left == 3 or outside + (left + 1) * each > target * elements_of(sides)
    with pytest.raises(SpecInvalid, match=r"can be is 0\.621"):
        blocks_left(Depth(method="depth", params_target=0.5), CONFIG, sides)
    with pytest.raises(SpecInvalid, match="from 1 to 3, not 4"):
        blocks_left(Depth(method="depth", blocks=4), CONFIG, sides)
    config, smaller = narrowed(Depth(method="depth", blocks=3), {"num_hidden_layers": 4}, sides)
    assert config["num_hidden_layers"] == 3 and elements_of(smaller) == outside + 3 * each


@pytest.mark.parametrize(("part", "target", "left"), [("prompt", 1.3, 3), ("prompt", 2.0, 1), ("writing", 1.3, 2)])
def test_about_how_many_blocks_a_speed_leaves_is_told_by_multiply_adds(part: str, target: float, left: int) -> None:
    sides, step = llama(), Depth.model_validate({"method": "depth", "speed_target": target, "speed_of": part})
    assert blocks_left(step, CONFIG, sides) == left
    tokens, blocks, head = (128 if part == "prompt" else 1), 4 * (64 * 64 + 64 * 192), 64000
    times = [(tokens * blocks + head) / (tokens * blocks * n / 4 + head) for n in (left, left + 1)]
    assert times[1] < target and (times[0] >= target or left == 1)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Depth(method="depth", speed_target=4.0), "with one decoder block of 4 left, a model is less than 4 times"),
        (Width(method="width", speed_target=4.1), "less than 4 times as fast: speed_target is less than that"),
    ],
)
def test_a_speed_that_nothing_can_have_is_refused(step: Slim, words: str) -> None:
    config: dict[str, Any] = {"model_type": "llama", "num_attention_heads": 8, **CONFIG}
    with pytest.raises(SpecInvalid, match=words):
        narrowed(step, config, llama() if isinstance(step, Depth) else wide())


def test_about_how_narrow_a_speed_is_goes_the_way_of_a_share() -> None:
    config: dict[str, Any] = {"model_type": "llama", "num_attention_heads": 8, "vocab_size": 1000}
    sizes = []
    for target in (1.2, 1.6, 2.5):
        step = Width(method="width", speed_target=target, speed_of="prompt")
        settings, _ = narrowed(step, config, wide())
        sizes.append(tuple(settings[name] for name in ("intermediate_size", "num_attention_heads", "hidden_size")))
    assert sizes == [(768, 8, 256), (512, 6, 256), (512, 4, 192)]


def test_a_student_is_named_unless_a_step_before_made_one() -> None:
    logits = {"kind": "distill", "method": "logits"}
    assert not job(depth(), logits, GPTQ).steps[1].student.named
    assert job(logits | {"student": {"layers": 2}}).steps[0].student.named
    with pytest.raises(ValidationError, match="say who learns"):
        job(logits)
    with pytest.raises(ValidationError, match="leave `student` out"):
        job(depth(), logits | {"student": {"layers": 2}})
    with pytest.raises(ValidationError, match="say who learns"):
        job(logits | {"student": {"layers": 2, "model": "org/other"}})


def wide() -> dict[str, tuple[int, ...]]:
    """Eight heads of 32 in four groups; 1024 neurons, of which 128 are an eighth."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (1000, 256), "model.norm.weight": (256,)}
    for n in range(2):
        attention, mlp = f"model.layers.{n}.self_attn", f"model.layers.{n}.mlp"
        found |= {f"{attention}.{one}_proj.weight": (256, 256) for one in "qo"}
        found |= {f"{attention}.{one}_proj.weight": (128, 256) for one in "kv"}
        found |= {f"{mlp}.gate_proj.weight": (1024, 256), f"{mlp}.down_proj.weight": (256, 1024)}
    return found


@pytest.mark.parametrize(
    ("target", "sizes"), [(0.9, (256, 768, 4)), (0.75, (256, 512, 4)), (0.6, (256, 512, 2)), (0.5, (192, 640, 2))]
)
def test_a_share_takes_neurons_first_then_groups_of_heads_then_channels(target: float, sizes: tuple[int, ...]) -> None:
    config, whole = {"model_type": "llama", "num_attention_heads": 8}, wide()
    settings, smaller = narrowed(Width(method="width", params_target=target), config, whole)
    assert tuple(settings[f"{name}"] for name in ("hidden_size", "intermediate_size", "num_key_value_heads")) == sizes
    assert settings["head_dim"] == 32 and settings["num_attention_heads"] == 2 * sizes[2]
    assert 0.8 * target < elements_of(smaller) / elements_of(whole) <= target
    assert smaller["model.layers.1.self_attn.o_proj.weight"] == (sizes[0], 64 * sizes[2])


def test_what_it_costs_grows_with_the_text_and_not_with_the_blocks() -> None:
    shapes = [shape_of({"hidden_size": 64, "vocab_size": 1000}, llama(blocks)) for blocks in (4, 8)]
    spec = job(depth(), data={"samples": 16, "sequence_length": 256})
    (step,) = spec.steps
    assert isinstance(step, Slim)
    first, second = (counted_slimming(shape, spec, step) for shape in shapes)
    assert second["compressing"].blocks == pytest.approx(2 * first["compressing"].blocks)
    assert slimming_bytes(shapes[0], spec, step) == slimming_bytes(shapes[1], spec, step)
    whole, least = slimming_bytes(shapes[0], spec, step)
    more, as_little = slimming_bytes(shapes[0], job(depth(), data={"samples": 64, "sequence_length": 256}), step)
    assert more > whole > least == as_little
    removing = Depth(method="depth", blocks=2, importance="perplexity")
    judged = [counted_slimming(shape, spec, removing)["compressing"].blocks for shape in shapes]
    assert 2 * judged[0] < judged[1] < 4 * judged[0]
    assert slimming_bytes(shapes[1], spec, removing)[0] > slimming_bytes(shapes[0], spec, removing)[0] > whole
    assert slimming_bytes(shapes[1], spec, removing)[1] == slimming_bytes(shapes[0], spec, removing)[1]
    assert looking_bytes(shapes[0], spec, removing) == 2 * 16 * 256 * 5 * 64 * 2 and not looking_bytes(
        shapes[0], spec, step
    )
    going_back = Width(method="width", heads=2, importance="gradient")
    back = [counted_slimming(shape, spec, going_back)["compressing"] for shape in shapes]
    assert back[1].blocks == pytest.approx(2 * back[0].blocks) and back[0].fixed > first["compressing"].fixed
    assert back[0].blocks > 2 * first["compressing"].blocks
    assert slimming_bytes(shapes[0], spec, going_back) == slimming_bytes(shapes[1], spec, going_back)
    assert slimming_bytes(shapes[0], spec, going_back)[1] > least
    assert looking_bytes(shapes[0], spec, going_back) == 16 * 256 * 5 * 64 * 2
    again = removing.model_copy(update={"iterative": True})
    assert 1.4 * judged[0] < counted_slimming(shapes[0], spec, again)["compressing"].blocks < 2 * judged[0]
    chain = job(depth(), GPTQ)
    assert "certifying" not in counted_slimming(shapes[0], chain, chain.steps[0])


TRIM = {"kind": "prune", "method": "vocabulary"}
LOGITS = {"kind": "distill", "method": "logits"}


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([TRIM | {"size": 100}], "64 or 128, not 100"),
        ([TRIM | {"size": 128, "params_target": 0.5}], "say how small once"),
        ([TRIM, TRIM], "keep one of them"),
        ([depth(), TRIM, LOGITS], "other tokens"),
        ([TRIM, LOGITS | {"student": {"model": "org/other"}}], "other tokens"),
        ([TRIM, LOGITS], "say who learns"),
    ],
)
def test_a_vocabulary_is_trimmed_once_and_before_who_teaches(steps: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        job(*steps, data=DATA)
    with pytest.raises(ValidationError, match="name a file"):
        job(TRIM)
    assert len(job(TRIM, depth(), LOGITS, GPTQ, data=DATA).steps) == 4
    assert len(job(TRIM, LOGITS | {"student": {"layers": 2}}, data=DATA).steps) == 2
