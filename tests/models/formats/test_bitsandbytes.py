"""bitsandbytes reads what was written, and its own quantizer makes the same tensors."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from models.files.checkpoint import open_model, read_config
from models.formats import layout
from models.progress import Silent
from models.quantize import int8, nf4
from models.quantize.problem import Problem
from models.streaming import engine
from models.streaming.activations import rounded
from models.weights.normal_float import NormalFloat, dynamic_map, encode
from models.weights.quantized import Site
from squeeze.errors import FormatUnfit
from squeeze.shapes.architectures import HELD_BY
from squeeze.steps.quantization import NF4, Int8, Quantize
from squeeze.steps.schemes import Scheme
from tests.models.engine_parts import frame_of
from tests.models.rounding import dequantized
from tests.models.tiny import FAMILIES, llama

# What bitsandbytes and transformers say when they load or are imported.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

STEPS: dict[str, Quantize] = {
    "nested": NF4(method="nf4"),
    "nf4": NF4(method="nf4", double_quantization=False),
    "int8": Int8(method="int8"),
}

TRIED = ("llama", "gpt2", "mpt", "opt")  # always; the others where there is time


def written(model: Path, work: Path, step: Quantize) -> tuple[Path, Any]:
    done = engine.quantize(frame_of(model), step, None, None, work / "codes", "", Silent())
    layout("bitsandbytes").write(open_model(model), done.model, work / "out", Silent())
    return work / "out", done.model


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 512, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = model.eval()(ids).logits.float()
    return found


def nearly(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Codes of which at most one in a hundred is the neighbour."""
    apart = (a.int() - b.int()).abs()
    return int(apart.max()) <= 1 and float((apart > 0).float().mean()) <= 0.01


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_codes_and_scales_are_bitsandbytes_own(nested: bool, dtype: torch.dtype) -> None:
    W = (torch.randn(96, 320, generator=torch.Generator().manual_seed(1)) * 0.05).to(dtype)
    W[3] = 0
    ours = encode(W.float(), Scheme("nf4", 4, 64, nested=nested))
    packed, state = bnb.functional.quantize_4bit(W, blocksize=64, compress_statistics=nested, quant_type="nf4")
    theirs = packed.view(-1)
    codes = ours.codes.view(-1, 2)
    assert torch.equal((codes[:, 0] << 4) | codes[:, 1], theirs)
    if not nested:
        assert torch.equal(ours.absmax, state.absmax)
    else:  # half way between two values its kernels for CPUs take either
        assert nearly(ours.absmax, state.absmax)
        assert ours.offset == state.offset
        assert torch.equal(ours.nested_absmax, state.state2.absmax)
        assert torch.equal(dynamic_map(), state.state2.code)
    back = bnb.functional.dequantize_4bit(packed, state)
    same = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(ours.dequantize(dtype), back, rtol=0.02 if nested else same, atol=1e-8)


def test_blocks_of_nf4_reach_over_the_ends_of_rows() -> None:
    W = torch.randn(7, 43, generator=torch.Generator().manual_seed(1))  # 301 weights: four blocks and a part
    ours = encode(W, Scheme("nf4", 4, 64))
    assert ours.absmax.tolist() == [float(part.abs().max()) for part in W.view(-1).split(64)]
    error = (ours.dequantize(torch.float32) - W).abs().view(-1)
    assert all((part <= 0.16 * top).all() for part, top in zip(error.split(64), ours.absmax, strict=True))


def test_linears_that_are_joined_share_no_scale() -> None:
    W = torch.randn(96, 64, generator=torch.Generator().manual_seed(2))
    step = NF4(method="nf4")
    joined = nf4.quantize(Problem(W, None, step.scheme(), torch.float32, ("a", "b"), (32, 64)), step).encoded
    alone = nf4.quantize(Problem(W[32:].clone(), None, step.scheme(), torch.float32), step).encoded
    assert all(torch.equal(a, b) for a, b in zip(joined.rows(32, 96).tensors().values(), alone.tensors().values()))  # noqa: B905
    assert torch.equal(joined.dequantize(torch.float32)[32:], alone.dequantize(torch.float32))
    by = torch.full((96,), 2.0)
    torch.testing.assert_close(
        joined.divided(by, torch.float32).dequantize(torch.float32),
        joined.dequantize(torch.float32) / 2,
        rtol=0.02,
        atol=0.01,
    )


def test_int8_codes_and_scales_are_bitsandbytes_own() -> None:
    W = (torch.randn(48, 200, generator=torch.Generator().manual_seed(3)) * 0.05).half().float()
    W[5] = 0
    step = Int8(method="int8")
    ours = int8.quantize(Problem(W.clone(), None, step.scheme(), torch.float32), step).encoded
    theirs, largest, _ = bnb.functional.int8_vectorwise_quant(W.half())
    assert torch.equal(ours.tensors()["codes"].to(torch.int16) - 128, theirs.to(torch.int16))
    torch.testing.assert_close(ours.tensors()["scale"].view(-1) * 127, largest, rtol=1e-6, atol=0)


def test_activations_are_rounded_as_bitsandbytes_rounds_them() -> None:
    generator = torch.Generator().manual_seed(4)
    X = torch.randn(1, 40, 128, generator=generator)
    X[:, :, 7] *= 9  # some of these tokens have an outlier there, others not
    X[0, 3, 100] = -6.5
    W = (torch.randn(64, 128, generator=generator) * 0.05).half().float()
    step = Int8(method="int8")
    weight = int8.quantize(Problem(W.clone(), None, step.scheme(), torch.float32), step).encoded.dequantize(
        torch.float32
    )
    linear = bnb.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False, threshold=6.0)
    linear.weight = bnb.nn.Int8Params(W, requires_grad=False, has_fp16_weights=False).to("cpu")
    with torch.no_grad():
        theirs = linear.eval()(X)
    ours = torch.nn.functional.linear(rounded(X, "llm-int8"), weight)
    assert (ours - theirs).abs().max() < 2e-3 * theirs.abs().max()
    assert (ours - torch.nn.functional.linear(rounded(X, "int8"), weight)).abs().max() > 1e-2 * theirs.abs().max()


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_directory_is_what_transformers_saves(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model = llama(tmp_path / "model", dtype=dtype, num_hidden_layers=1)
    out, _ = written(model, tmp_path, STEPS[name])
    kind = (
        {"load_in_8bit": True}
        if name == "int8"
        else {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": name == "nested",
            "bnb_4bit_compute_dtype": dtype,
        }
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, quantization_config=BitsAndBytesConfig(llm_int8_skip_modules=["lm_head"], **kind)
    )
    theirs.save_pretrained(tmp_path / "theirs")
    mine, saved = load_file(out / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors")
    assert mine.keys() == saved.keys()
    for key in mine:
        assert (mine[key].dtype, mine[key].shape) == (saved[key].dtype, saved[key].shape), key
        if name == "nested" and key.endswith("weight.absmax"):
            assert nearly(mine[key], saved[key])
        elif name != "int8":
            assert torch.equal(mine[key], saved[key]), key
        elif key.endswith("SCB"):
            torch.testing.assert_close(mine[key], saved[key], rtol=1e-3, atol=0)  # theirs is of float16 weights
    config = read_config(out)["quantization_config"]
    assert config == read_config(tmp_path / "theirs")["quantization_config"]


@pytest.mark.parametrize("name", ["nf4", "int8"])
@pytest.mark.parametrize(
    "family",
    [
        family if family in TRIED else pytest.param(family, marks=pytest.mark.slow)
        for family, formats in HELD_BY.items()
        if "bitsandbytes" in formats
    ],
)
def test_every_family_computes_the_logits_of_its_dequantized_weights(tmp_path: Path, family: str, name: str) -> None:
    model = FAMILIES[family](tmp_path / "model")
    out, quantized = written(model, tmp_path, STEPS[name])
    loaded, plain = AutoModelForCausalLM.from_pretrained(out), dequantized(model, quantized, torch.float32)
    if name == "int8":
        for site in quantized.sites:
            plain.get_submodule(site).register_forward_pre_hook(lambda _, given: rounded(given[0], "llm-int8"))
    expected = logits(plain)
    apart = (logits(loaded) - expected).square().mean().sqrt()
    # bfloat16 kernels, and inputs that lie just at the threshold; nf4 taken for uniform codes gives 0.4
    assert apart < 0.03 * expected.std()


@pytest.mark.parametrize("name", STEPS)
def test_codes_come_back_as_they_were(tmp_path: Path, name: str) -> None:
    out, quantized = written(llama(tmp_path / "model", num_hidden_layers=1), tmp_path, STEPS[name])
    for module in quantized.sites:
        ours, back = quantized.codes(module), layout("bitsandbytes").read(out, module)
        assert back.scheme == ours.scheme
        for part, tensor in ours.tensors().items():
            torch.testing.assert_close(back.tensors()[part], tensor, rtol=1e-6, atol=0)


def test_layers_that_the_library_can_t_compute_on_a_cpu_are_refused() -> None:
    site = Site("model.layers.0.mlp.down_proj", rows=64, columns=96, transposed=False)
    with pytest.raises(FormatUnfit, match=r"model\.layers\.0\.mlp\.down_proj has 96 and 64.*`ignore`"):
        layout("bitsandbytes").refuse([site], {site.name: NF4(method="nf4").scheme()})
    layout("bitsandbytes").refuse([site], {site.name: Int8(method="int8").scheme()})


def test_scales_of_scales_are_counted() -> None:
    assert NF4(method="nf4").scheme().bits_per_weight(4096) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))
    assert NF4(method="nf4", double_quantization=False).scheme().bits_per_weight(4096) == 4.5
    assert isinstance(encode(torch.randn(4, 64), Scheme("nf4", 4, 64)), NormalFloat)
