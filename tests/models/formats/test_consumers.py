"""The libraries that define the formats read what was written, and compute what the codes stand for.

gptqmodel's CPU kernels for 4 bits round activations and sums to bfloat16, and its others dequantize in float16,
whatever the model's own type; the tolerances say so.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from models.files.checkpoint import read_config
from models.formats import layout
from models.progress import Silent
from models.weights.codes import Codes
from models.weights.quantized import QuantizedModel
from squeeze.names import Format
from squeeze.shapes.architectures import HELD_BY
from squeeze.steps.quantization import GroupSize
from tests.models.rounding import dequantized, nearest, rounded
from tests.models.tiny import FAMILIES, KINDS, MIXTURES, llama

# What gptqmodel, optimum and transformers say when they load or are imported.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

RECIPES: list[tuple[int, GroupSize, bool]] = [
    (bits, group_size, symmetric)
    for bits in (2, 3, 4, 8)
    for group_size in (32, 64, 128, "channel")
    for symmetric in (True, False)
]
FEW: list[tuple[torch.dtype, tuple[int, GroupSize, bool]]] = [
    (torch.float32, (2, 32, False)),
    (torch.bfloat16, (3, 64, True)),
    (torch.float32, (4, 128, False)),
    (torch.bfloat16, (4, "channel", False)),
]
HELD: list[tuple[Format, str]] = [
    (name, family)
    for family in KINDS
    if family not in MIXTURES
    for name in HELD_BY[family]
    if name in ("compressed-tensors", "gptq")
]
IGNORED = {
    "llama": ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"),
    "opt": ("model.decoder.layers.1.fc1",),
    "gpt2": ("transformer.h.0.attn.c_attn",),
    "gpt_neox": ("gpt_neox.layers.0.mlp.dense_4h_to_h",),
}


@pytest.fixture(scope="module")
def one_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("one") / "llama", num_hidden_layers=1)


def written(
    model: Path, work: Path, name: Format, recipe: tuple[int, GroupSize, bool], ignored: tuple[str, ...] = ()
) -> tuple[Path, QuantizedModel]:
    bits, group_size, symmetric = recipe
    source, quantized = rounded(
        model, work / "codes", bits=bits, group_size=group_size, symmetric=symmetric, ignored=ignored
    )
    layout(name).write(source, quantized, work / name, Silent())
    return work / name, quantized


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = model.eval()(ids).logits.float()
    return found


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_compressed_tensors_own_compressor_makes_and_reads_the_same_tensors(
    one_block: Path, tmp_path: Path, recipe: tuple[int, GroupSize, bool]
) -> None:
    out, quantized = written(one_block, tmp_path, "compressed-tensors", recipe)
    ours = load_file(out / "model.safetensors")
    config = QuantizationConfig.model_validate(read_config(out)["quantization_config"])
    scheme = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config.format)

    for name in quantized.sites:
        codes = quantized.codes(name)
        middle = 2 ** (codes.bits - 1)
        plain = {"weight": codes.dequantize(torch.float32), "weight_scale": codes.scale}
        if not codes.symmetric:
            plain["weight_zero_point"] = (codes.zero.to(torch.int16) - middle).to(torch.int8)
        theirs = compressor.compress(plain, scheme)
        mine = {key.removeprefix(f"{name}."): value for key, value in ours.items() if key.startswith(f"{name}.")}
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
        assert torch.equal(compressor.decompress(mine, scheme)["weight"], plain["weight"]), name


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodels_own_packer_makes_the_same_words(
    bits: int, symmetric: bool, one_block: Path, tmp_path: Path
) -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    out, quantized = written(one_block, tmp_path, "gptq", (bits, 32, symmetric))
    ours = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    codes = quantized.codes(name)
    rows, columns = codes.codes.shape
    theirs = TorchLinear(bits, 32, symmetric, False, columns, rows, bias=False)
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data = codes.dequantize(torch.float32)

    theirs.pack_original(linear, codes.scale, codes.zero.float(), torch.arange(columns, dtype=torch.int32) // 32)
    theirs.qzero_format(format=2)
    convert_gptq_v2_to_v1_format_module(theirs, QuantizeConfig(bits=bits, group_size=32, offload_to_disk=False))

    for part in ("qweight", "qzeros", "scales", "g_idx"):
        assert torch.equal(ours[f"{name}.{part}"], getattr(theirs, part)), part


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_transformers_loads_compressed_tensors_to_the_very_weights(
    one_block: Path, tmp_path: Path, recipe: tuple[int, GroupSize, bool]
) -> None:
    out, quantized = written(one_block, tmp_path, "compressed-tensors", recipe)

    loaded = AutoModelForCausalLM.from_pretrained(out)

    assert torch.equal(logits(loaded), logits(dequantized(one_block, quantized, torch.float32)))
    for name in quantized.sites:
        assert torch.equal(loaded.get_submodule(name).weight, quantized.codes(name).dequantize(torch.float32)), name


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_transformers_loads_gptq_to_the_weights_that_the_codes_stand_for(
    one_block: Path, tmp_path: Path, recipe: tuple[int, GroupSize, bool]
) -> None:
    out, quantized = written(one_block, tmp_path, "gptq", recipe)

    loaded = AutoModelForCausalLM.from_pretrained(out)

    for name in quantized.sites:
        weight = loaded.get_submodule(name).dequantize_weight().float().t()
        torch.testing.assert_close(weight, quantized.codes(name).dequantize(torch.float32), rtol=2**-10, atol=1e-6)
    apart = logits(loaded) - logits(dequantized(one_block, quantized, torch.float32))
    assert apart.square().mean().sqrt() < 0.02  # of logits that spread by 1.1; a zero point taken for 8 gives 1.0


@pytest.mark.parametrize(("dtype", "recipe"), FEW, ids=str)
@pytest.mark.parametrize(("name", "family"), HELD)
def test_every_family_computes_the_logits_of_its_dequantized_weights(
    tmp_path: Path, name: Format, family: str, dtype: torch.dtype, recipe: tuple[int, GroupSize, bool]
) -> None:
    model = FAMILIES[family](tmp_path / "model", dtype=dtype)
    ignored = IGNORED.get(family, ()) if recipe[1] == "channel" else ()
    out, quantized = written(model, tmp_path, name, recipe, ignored)

    loaded = AutoModelForCausalLM.from_pretrained(out)

    assert loaded.dtype == dtype
    apart = logits(loaded) - logits(dequantized(model, quantized, dtype))
    allowed = 0.0 if name == "compressed-tensors" else 0.03  # root mean square, of logits that spread by 1.1
    assert apart.square().mean().sqrt() <= allowed
    assert all(type(loaded.get_submodule(one)).__name__ in {"Linear", "Conv1D"} for one in ignored)


def test_rounding_to_nearest_in_these_tests_errs_by_half_a_step_at_most() -> None:
    weight = torch.randn(64, 128)

    codes: Codes = nearest(weight, 4, 32, symmetric=False)

    error = (codes.dequantize(torch.float32) - weight).abs().view(64, 4, 32)
    assert (error <= codes.scale.unsqueeze(-1) * 1.05).all()
