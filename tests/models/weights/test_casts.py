"""16-bit casts: what is lost is counted, the result is what torch gives, and it is measured in its own type."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models.files.checkpoint import open_model, read_config
from models.formats import layout
from models.measuring.evaluation import measure
from models.pipeline import run
from models.progress import Silent
from models.streaming import engine
from models.streaming.frame import Frame
from models.weights import casts
from models.weights.plain import Plain, saturated
from squeeze.errors import ModelAlreadyCompressed, NotFinite
from squeeze.steps.quantization import BF16, FP16, Quantize
from squeeze.steps.schemes import Scheme
from tests.models.engine_parts import CPU, frame_of, perplexity_in_transformers, thrown
from tests.models.job_parts import inputs_of, spec_of
from tests.models.tiny import FAMILIES, gpt2, llama

STEPS: dict[torch.dtype, Quantize] = {torch.bfloat16: BF16(method="bf16"), torch.float16: FP16(method="fp16")}


def cast(model: Path, work: Path, dtype: torch.dtype) -> tuple[Path, engine.Quantization]:
    frame = Frame(open_model(model), torch.float32, CPU, stored=dtype)
    done = engine.quantize(frame, STEPS[dtype], None, None, work / "codes", "", Silent())
    layout("safetensors").write(open_model(model), done.model, work / "out", Silent())
    return work / "out", done


def changed(model: Path, name: str, value: torch.Tensor) -> Path:
    tensors = load_file(model / "model.safetensors")
    tensors[name] = value.to(tensors[name].dtype)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16])
def test_what_float16_can_t_hold_becomes_its_largest_and_is_counted(stored: torch.dtype) -> None:
    values = torch.tensor([0.0, 1.0, -65504.0, 70000.0, -1e30, 1e-9, 4e-8, -1e-6, 2.0**-14], dtype=stored)
    result, loss = saturated(values, torch.float16), casts.lost(values, torch.float16)
    assert torch.isfinite(result).all()
    assert result[3:5].tolist() == [65504.0, -65504.0]
    beyond = 3 if stored == torch.bfloat16 else 2  # which has no 65,504, but 65,536
    assert (loss.counts.saturated, loss.counts.zeroed, loss.counts.denormal) == (beyond, 1, 2)


def test_a_cast_within_the_range_is_torch_s_own_and_counts_nothing() -> None:
    values = torch.randn(300, 70, generator=torch.Generator().manual_seed(0)) + 2.0**-10
    for dtype in STEPS:
        loss = casts.lost(values, dtype)
        assert torch.equal(saturated(values, dtype), values.to(dtype))
        expected = (values.to(dtype).double() - values.double()).square().sum() / values.double().square().sum()
        assert loss.relative_error == pytest.approx(float(expected), rel=1e-4)
        assert (loss.counts.saturated, loss.counts.zeroed) == (0, 0)


@pytest.mark.parametrize("dtype", STEPS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_the_directory_holds_every_tensor_cast(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = FAMILIES[family](tmp_path / "model")
    out, done = cast(model, tmp_path, dtype)
    before, after = open_model(model), open_model(out)
    assert after.names() == before.names()
    assert all(torch.equal(after.tensor(name), before.tensor(name).to(dtype)) for name in before.names())
    config = read_config(out)
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert "quantization_config" not in config
    expected = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == dtype
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    site = next(iter(done.model.sites))
    kept = done.model.codes(site)
    assert isinstance(kept, Plain)
    assert torch.equal(kept.weight, layout("safetensors").read(out, site).dequantize(dtype))


def test_the_result_is_measured_in_its_own_type_against_the_source_in_its_own(tmp_path: Path) -> None:
    model, windows = llama(tmp_path / "model"), thrown()
    frame, reference = Frame(open_model(model), torch.bfloat16, CPU, stored=torch.bfloat16), frame_of(model)
    done = engine.quantize(
        frame, STEPS[torch.bfloat16], None, windows, tmp_path / "work", "", Silent(), reference=reference
    )
    streams = done.activations.original, done.activations.compressed
    quality = measure(frame, windows, *streams, Silent(), reference=reference).quality
    out, _ = cast(model, tmp_path / "other", torch.bfloat16)
    assert quality.perplexity_before == pytest.approx(perplexity_in_transformers(model, windows), rel=1e-5)
    assert quality.perplexity_after == pytest.approx(perplexity_in_transformers(out, windows), rel=2e-3)
    assert quality.divergence_nats is not None
    assert 0 < quality.divergence_nats < 0.01


def test_router_corrections_stay_in_float32_as_transformers_keeps_them(tmp_path: Path) -> None:
    model = FAMILIES["deepseek_v3"](tmp_path / "model")
    out, _ = cast(model, tmp_path, torch.bfloat16)
    corrections = [name for name in open_model(out).names() if name.endswith("e_score_correction_bias")]
    assert corrections
    for name in corrections:
        assert torch.equal(open_model(out).tensor(name), open_model(model).tensor(name))


def test_losses_are_told_by_tensor_and_noted_with_their_layers(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    weight = torch.randn(256, 128)
    weight[0, :3], weight[1, :2] = 1e5, 1e-9
    model = changed(llama(tmp_path / "model", num_hidden_layers=1), f"{name}.weight", weight)
    found = casts.losses(open_model(model), torch.float16)
    assert found[f"{name}.weight"].counts.saturated == 3
    overflow, underflow = casts.told(found, torch.float16)
    assert "3 weights of 1 tensors lie beyond ±65504" in overflow
    assert f"{name}.weight (3)" in overflow
    assert underflow.startswith("2 weights are smaller than float16 can hold")
    _, done = cast(model, tmp_path, torch.float16)
    (block,) = casts.noted(done.blocks, found, open_model(model))
    layer = next(layer for layer in block.layers if layer.name == name)
    assert layer.cast == found[f"{name}.weight"].counts
    assert layer.relative_error == found[f"{name}.weight"].relative_error > 0.01


def test_a_model_of_that_type_is_refused_and_damage_is_named(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", dtype=torch.bfloat16)
    with pytest.raises(ModelAlreadyCompressed, match="in bfloat16 already"):
        casts.losses(open_model(model), torch.bfloat16)
    changed(model, "model.norm.weight", torch.full((128,), float("nan")))
    with pytest.raises(NotFinite, match=r"model\.norm\.weight"):
        casts.losses(open_model(model), torch.float16)


def test_divided_rows_keep_their_type() -> None:
    plain = Plain(torch.ones(4, 8, dtype=torch.float16), Scheme("float16", 16, "channel"))
    halved = plain.divided(torch.full((4,), 2.0), torch.float32)
    assert halved.weight.dtype == torch.float16
    assert torch.equal(halved.rows(1, 3).dequantize(torch.float32), torch.full((2, 8), 0.5))


@pytest.mark.slow
def test_a_job_casts_bfloat16_to_float16_though_that_saves_no_bytes(tmp_path: Path) -> None:
    model, text = gpt2(tmp_path / "model", dtype=torch.bfloat16), tmp_path / "text"
    text.write_text("\n".join(f"line {n} of a text that says little" * 8 for n in range(400)))
    spec = spec_of(formats=["safetensors"], steps=[{"kind": "quantize", "method": "fp16"}])
    outcome = run(inputs_of(spec, model, text, tmp_path), Silent())
    assert outcome.report.certificates[0].outcome == "passed"
    assert outcome.report.sizes[0].ratio == pytest.approx(1.0, abs=0.02)
    assert outcome.report.bits_per_weight == 16.0
    assert all(layer.cast is not None for block in outcome.report.blocks for layer in block.layers)
