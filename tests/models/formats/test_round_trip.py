"""What every format writes it reads back, and what it can't hold it refuses."""

import itertools
from pathlib import Path

import pytest
import torch

from models.formats import layout
from models.progress import Silent
from models.weights.codes import Codes, Encoded
from models.weights.quantized import Site
from squeeze.errors import FormatUnfit, GroupSizeIndivisible
from squeeze.names import Format
from squeeze.steps.quantization import RTN, GroupSize
from tests.models.rounding import rounded
from tests.models.tiny import gpt2, llama

BITS = (2, 3, 4, 8)
GROUPS: tuple[GroupSize, ...] = (32, 64, 128, "channel")
FORMATS: tuple[Format, ...] = ("compressed-tensors", "gptq", "awq")
HELD = [("compressed-tensors", "llama"), ("compressed-tensors", "gpt2"), ("gptq", "llama")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": llama(root / "llama", dtype=torch.bfloat16, num_hidden_layers=1),
        "gpt2": gpt2(root / "gpt2", dtype=torch.bfloat16, n_layer=1),
    }


def equal(a: Encoded, b: Encoded) -> bool:
    assert isinstance(a, Codes)
    assert isinstance(b, Codes)
    return (
        torch.equal(a.codes, b.codes)
        and torch.equal(a.scale, b.scale)
        and torch.equal(a.zero, b.zero)
        and (a.bits, a.group_size, a.symmetric) == (b.bits, b.group_size, b.symmetric)
    )


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("bits", "group_size"), list(itertools.product(BITS, GROUPS)))
@pytest.mark.parametrize(("name", "family"), HELD)
def test_codes_scales_and_zeros_come_back_as_they_were(
    models: dict[str, Path],
    tmp_path: Path,
    name: Format,
    family: str,
    bits: int,
    group_size: GroupSize,
    symmetric: bool,
) -> None:
    source, quantized = rounded(
        models[family], tmp_path / "work", bits=bits, group_size=group_size, symmetric=symmetric
    )

    layout(name).write(source, quantized, tmp_path / "out", Silent())

    for module in quantized.sites:
        assert equal(layout(name).read(tmp_path / "out", module), quantized.codes(module)), module


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_codes_make_the_same_bytes(models: dict[str, Path], tmp_path: Path, name: Format) -> None:
    source, quantized = rounded(models["llama"], tmp_path / "work", symmetric=False)

    layout(name).write(source, quantized, tmp_path / "one", Silent())
    layout(name).write(source, quantized, tmp_path / "two", Silent())

    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("name", FORMATS)
def test_a_group_size_that_does_not_divide_the_inputs_is_refused_with_those_that_do(name: Format) -> None:
    site = Site("model.layers.0.mlp.down_proj", rows=64, columns=96, transposed=False)

    with pytest.raises(GroupSizeIndivisible, match=r"128.*96 inputs of model\.layers\.0\.mlp\.down_proj.*32") as caught:
        layout(name).refuse([site], {site.name: RTN(method="rtn", group_size=128).scheme()})

    assert "64" not in caught.value.message


def test_gptq_refuses_outputs_that_end_within_a_word_and_names_bits_that_do_not() -> None:
    site = Site("model.layers.0.mlp.up_proj", rows=72, columns=64, transposed=False)

    with pytest.raises(FormatUnfit, match=r"multiple of 32; model\.layers\.0\.mlp\.up_proj has 72: use 4 or 8 bits"):
        layout("gptq").refuse([site], {site.name: RTN(method="rtn", bits=3, group_size=32).scheme()})

    layout("gptq").refuse([site], {site.name: RTN(method="rtn", bits=4, group_size=32).scheme()})
    layout("compressed-tensors").refuse([site], {site.name: RTN(method="rtn", bits=3, group_size=32).scheme()})


def test_gptq_refuses_transposed_layers_and_names_the_format_that_holds_them() -> None:
    site = Site("transformer.h.0.attn.c_attn", rows=384, columns=128, transposed=True)

    with pytest.raises(FormatUnfit, match="compressed-tensors"):
        layout("gptq").refuse([site], {site.name: RTN(method="rtn").scheme()})


def test_gptq_refuses_a_zero_point_of_zero_which_readers_would_carry_into_its_neighbour(
    models: dict[str, Path], tmp_path: Path
) -> None:
    source, quantized = rounded(models["llama"], tmp_path / "work", symmetric=False)

    class Broken(type(quantized)):  # type: ignore[misc]
        def codes(self, name: str) -> Codes:
            codes: Codes = super().codes(name)
            codes.zero[0, 0] = 0
            return codes

    broken = Broken(**vars(quantized))
    with pytest.raises(FormatUnfit, match="zero point of 0"):
        layout("gptq").write(source, broken, tmp_path / "out", Silent())

    assert [path.name for path in tmp_path.iterdir()] == ["work"]  # nothing half-written is left
