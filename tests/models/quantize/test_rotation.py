"""A rotated model computes what the model did, rounds better where it has outliers, and loads like any other."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from models.formats import layout
from models.measuring.evaluation import measure
from models.pipeline import check
from models.progress import Silent
from models.quantize.rotation import Rotated, told
from models.streaming import engine
from models.streaming.calls import Calls, run
from models.streaming.frame import Frame
from squeeze.errors import ArchitectureUnsupported
from squeeze.shapes.architectures import ARCHITECTURES, ROTATABLE, refuse_unrotatable
from squeeze.steps.quantization import RTN
from tests.models.engine_parts import CPU, ROUNDING, frame_of, thrown
from tests.models.job_parts import spec_of
from tests.models.tiny import FAMILIES, VOCABULARY


def logits(frame: Frame) -> Tensor:
    ids = torch.randint(0, VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(1))
    calls = Calls(frame, [ids])
    (hidden,) = calls.enter(ids)
    with torch.no_grad():
        for index in range(frame.count):
            with frame.block(index) as module:
                hidden = run(module, calls.batch(index, hidden))
        with frame.surroundings():
            return frame.leave(hidden, ids)


@pytest.mark.parametrize("family", ROTATABLE)
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
def test_the_function_is_unchanged_and_the_weights_are_not(tmp_path: Path, family: str, tied: bool) -> None:
    frame = frame_of(FAMILIES[family](tmp_path / "model", tie_word_embeddings=tied))
    rotated = Rotated.of(frame.source)
    result = Frame(rotated, torch.float32, CPU)
    result.refuse_misfits()
    before, after = logits(frame), logits(result)
    assert float((after - before).abs().max()) <= 1e-5 * float(before.abs().max())
    for site in [*frame.sites(0), *frame.sites(1)]:
        key = frame.source.module_key(site.name, "weight")
        assert not torch.allclose(rotated.tensor(key), frame.source.tensor(key), atol=1e-3)
    assert rotated.config["tie_word_embeddings"] is False
    assert (rotated.untied_bytes > 0) is (frame.source.file_key("lm_head.weight") is None)


@pytest.mark.parametrize("hidden", [96, 184])
def test_hidden_sizes_that_are_no_power_of_two_are_turned_too(tmp_path: Path, hidden: int) -> None:
    model = FAMILIES["qwen2"](tmp_path / "model", hidden_size=hidden, num_attention_heads=2, num_key_value_heads=1)
    frame = frame_of(model)
    before, after = logits(frame), logits(Frame(Rotated.of(frame.source), torch.float32, CPU))
    assert float((after - before).abs().max()) <= 1e-5 * float(before.abs().max())


@pytest.mark.parametrize("family", sorted(set(ARCHITECTURES) - set(ROTATABLE)))
def test_a_family_whose_norms_stand_in_the_way_is_refused_by_name(family: str) -> None:
    with pytest.raises(ArchitectureUnsupported, match=f"{family} models.*llama") as refused:
        refuse_unrotatable(family, "steps.0.rotation")
    assert refused.value.param == "steps.0.rotation"


def test_a_rotation_is_refused_from_the_config_alone(tmp_path: Path) -> None:
    model = FAMILIES["gemma2"](tmp_path / "model")
    with pytest.raises(ArchitectureUnsupported, match="gemma2") as refused:
        check(spec_of({"rotation": "hadamard"}), model)
    assert refused.value.param == "steps.0.rotation"


def with_outliers(directory: Path) -> Path:
    """The same function as the usual tiny Llama, but a few input columns of its weights stand far out."""
    model = FAMILIES["llama"](directory)
    tensors = load_file(directory / "model.safetensors")
    for block in range(2):
        prefix = f"model.layers.{block}"
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            tensors[f"{prefix}.{norm}.weight"][::40] /= 16
            for reader in readers:
                tensors[f"{prefix}.{reader}.weight"][:, ::40] *= 16
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return model


def test_weights_with_outliers_round_better_once_rotated(tmp_path: Path) -> None:
    frame, windows = frame_of(with_outliers(tmp_path / "model")), thrown()
    rotated = Rotated.of(frame.source)
    result = Frame(rotated, frame.dtype, CPU)
    lost = []
    for name, one in (("plain", frame), ("rotated", result)):
        done = engine.quantize(one, ROUNDING, None, windows, tmp_path / name, "", Silent(), reference=frame)
        streams = done.activations.original, done.activations.compressed
        lost.append(measure(one, windows, *streams, Silent(), reference=frame).quality.divergence_nats or 0.0)
    assert lost[1] < lost[0] / 2
    story = told(rotated, frame, result)
    assert story.peak_after < story.peak_before
    assert story.untied_bytes == 0


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
def test_a_written_rotated_model_loads_in_transformers_as_it_was_measured(tmp_path: Path, tied: bool) -> None:
    frame = frame_of(FAMILIES["qwen2"](tmp_path / "model", tie_word_embeddings=tied))
    result = Frame(Rotated.of(frame.source), frame.dtype, CPU)
    windows = thrown()
    step = RTN(method="rtn", group_size=32, bits=8)
    done = engine.quantize(result, step, None, windows, tmp_path / "work", "", Silent(), reference=frame)
    streams = done.activations.original, done.activations.compressed
    quality = measure(result, windows, *streams, Silent(), reference=frame).quality
    layout("compressed-tensors").write(result.source, done.model, tmp_path / "out", Silent())
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert whole.config.tie_word_embeddings is False
    with torch.no_grad():
        predictions = torch.cat([whole(row[None]).logits[:, :-1] for row in windows.ids])
    loss = torch.nn.functional.cross_entropy(predictions.flatten(0, 1), windows.ids[:, 1:].flatten())
    assert math.exp(float(loss)) == pytest.approx(quality.perplexity_after, rel=1e-3)
