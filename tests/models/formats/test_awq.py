"""The awq layout: what is in its words, what it refuses, and what gptqmodel's kernels make of it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from models.files.checkpoint import read_config
from models.formats import layout
from models.progress import Silent
from models.weights.codes import Codes
from models.weights.quantized import QuantizedModel, Site
from squeeze.errors import FormatUnfit
from squeeze.steps.quantization import RTN, GroupSize
from tests.models.rounding import dequantized, rounded
from tests.models.tiny import FAMILIES

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

# Nibble i of a word holds this one of its eight columns, as AutoAWQ wrote them.
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)


def written(
    work: Path, family: str, dtype: torch.dtype, group_size: GroupSize, symmetric: bool, ignored: tuple[str, ...] = ()
) -> tuple[Path, Path, QuantizedModel]:
    model = FAMILIES[family](work / "model", dtype=dtype)
    source, quantized = rounded(model, work / "codes", group_size=group_size, symmetric=symmetric, ignored=ignored)
    layout("awq").write(source, quantized, work / "out", Silent())
    return model, work / "out", quantized


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 128])
def test_what_was_written_comes_back(tmp_path: Path, group_size: GroupSize, symmetric: bool) -> None:
    _, out, quantized = written(tmp_path, "llama", torch.bfloat16, group_size, symmetric)
    for name in quantized.sites:
        kept, read = quantized.codes(name), layout("awq").read(out, name)
        assert isinstance(kept, Codes)
        assert isinstance(read, Codes)
        assert all(torch.equal(getattr(kept, part), getattr(read, part)) for part in ("codes", "scale", "zero"))
        assert read.scheme == kept.scheme


def test_the_words_hold_what_the_layout_says(tmp_path: Path) -> None:
    _, out, quantized = written(tmp_path, "llama", torch.float32, 64, False)
    name = "model.layers.1.mlp.down_proj"
    tensors, codes = load_file(out / "model.safetensors"), quantized.codes(name)
    assert isinstance(codes, Codes)
    words, zeros = tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"]
    rows, columns = codes.codes.shape
    assert words.shape == (columns, rows // 8)
    for nibble, place in enumerate(NIBBLES):
        assert torch.equal((words >> (4 * nibble)) & 15, codes.codes.t()[:, place::8].int())
        assert torch.equal((zeros >> (4 * nibble)) & 15, codes.zero.t()[:, place::8].int())
    assert torch.equal(tensors[f"{name}.scales"].float(), codes.scale.t())


@pytest.mark.parametrize(
    ("family", "dtype", "group_size", "symmetric", "ignored"),
    [
        ("llama", torch.bfloat16, 128, False, ()),
        ("llama", torch.float32, 128, True, ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")),
        ("opt", torch.float32, 32, False, ("model.decoder.layers.1.fc1",)),
        ("gemma2", torch.bfloat16, 64, True, ()),
    ],
)
def test_transformers_computes_the_logits_of_the_dequantized_weights(
    tmp_path: Path, family: str, dtype: torch.dtype, group_size: GroupSize, symmetric: bool, ignored: tuple[str, ...]
) -> None:
    model, out, quantized = written(tmp_path, family, dtype, group_size, symmetric, ignored)
    ids = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(0))

    loaded = AutoModelForCausalLM.from_pretrained(out).eval()

    plain = dequantized(model, quantized, dtype).eval()
    with torch.no_grad():
        apart = loaded(ids).logits.float() - plain(ids).logits.float()
    assert apart.square().mean().sqrt() < 0.03  # of logits that spread by 1.1; gptqmodel's kernels sum in bfloat16
    assert all("Awq" in type(loaded.get_submodule(name)).__name__ for name in quantized.sites)
    assert all(type(loaded.get_submodule(name)).__name__ == "Linear" for name in ignored)


def test_zero_points_are_announced_whatever_the_codes_are(tmp_path: Path) -> None:
    # vLLM takes a file without them for one whose codes start at 0.
    _, out, _ = written(tmp_path, "llama", torch.bfloat16, 128, True)
    config = read_config(out)["quantization_config"]
    assert config["zero_point"] is True
    assert config["meta"]["symmetric"] is True
    assert config["modules_to_not_convert"] == ["lm_head"]


@pytest.mark.parametrize(
    ("site", "says"),
    [
        (Site("a.c_attn", rows=64, columns=64, transposed=True), "Conv1D"),
        (Site("a.up_proj", rows=60, columns=64, transposed=False), "outputs to be a multiple of 8; a.up_proj has 60"),
    ],
)
def test_layers_that_it_can_not_hold_are_refused(site: Site, says: str) -> None:
    with pytest.raises(FormatUnfit, match=says):
        layout("awq").refuse([site], {site.name: RTN(method="rtn", group_size=32).scheme()})


def test_layers_that_are_stored_differently_are_refused() -> None:
    sites = [Site(name, rows=64, columns=64, transposed=False) for name in ("a", "b")]
    schemes = {name: RTN(method="rtn", group_size=size).scheme() for name, size in (("a", 32), ("b", 64))}
    with pytest.raises(FormatUnfit, match="alike"):
        layout("awq").refuse(sites, schemes)
