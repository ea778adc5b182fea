"""Blocks say to the `gguf` package's own dequantizers what they say to ours, and round no worse than its quantizers."""

import gguf
import pytest
import torch
from torch import Tensor

from models.ggml.blocks import to_blocks
from models.ggml.encoder import decode_bytes, encode, fit, round_to
from models.ggml.layout import Grid, pack, unpack
from models.ggml.types import TYPES, Name, number_of, row_bytes

QUANTIZED: list[Name] = list(TYPES)
K_TYPES: list[Name] = [name for name in QUANTIZED if TYPES[name].columns == 256]
ALL: list[Name] = [*QUANTIZED, "f32", "f16", "bf16"]


def weights(rows: int = 12, columns: int = 512, seed: int = 0) -> Tensor:
    """Rows of different spread, columns of different spread: as weights have them."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    return W * (0.2 + torch.rand(columns, generator=generator))


def error(found: Tensor, W: Tensor, importance: Tensor | None = None) -> float:
    squares = (found - W).square() if importance is None else (found - W).square() * importance
    whole = W.square() if importance is None else W.square() * importance
    return float(squares.sum() / whole.sum())


@pytest.mark.parametrize("name", ALL)
def test_the_gguf_package_reads_the_very_values(name: Name) -> None:
    packed = encode(weights(), name)

    theirs = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType(number_of(name)))

    assert packed.shape == (12, row_bytes(name, 512))
    assert torch.equal(decode_bytes(packed, name), torch.from_numpy(theirs.copy()))


@pytest.mark.parametrize("name", QUANTIZED)
def test_any_bytes_come_back_after_they_were_taken_apart(name: Name) -> None:
    kind = TYPES[name]
    codes = torch.randint(0, kind.top + 1, (5, 512), dtype=torch.uint8)
    least, greatest = kind.scales or (0, 0)
    shape = (5, 512 // kind.group)
    grid = Grid(
        d=torch.rand(5, 512 // kind.columns).half().float(),
        dmin=torch.rand(5, 512 // kind.columns).half().float() if kind.offset else None,
        scales=torch.randint(least, greatest + 1, shape, dtype=torch.int16) if kind.scales else None,
        offsets=torch.randint(0, greatest + 1, shape, dtype=torch.int16) if kind.scales and kind.offset else None,
    )

    packed = pack(codes, grid, kind)
    found, found_grid = unpack(packed, kind)

    assert torch.equal(found, codes)
    for part in ("d", "dmin", "scales", "offsets"):
        expected, got = getattr(grid, part), getattr(found_grid, part)
        assert (expected is None and got is None) or torch.equal(expected, got), part
    assert torch.equal(pack(found, found_grid, kind), packed)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_searched_scales_err_less_than_those_of_the_gguf_package(name: Name) -> None:
    W = weights()
    kind = gguf.GGMLQuantizationType(number_of(name))

    theirs = gguf.quants.dequantize(gguf.quants.quantize(W.numpy(), kind), kind)

    assert error(decode_bytes(encode(W, name), name), W) <= error(torch.from_numpy(theirs), W)


@pytest.mark.parametrize("name", QUANTIZED)
def test_more_important_inputs_are_rounded_better(name: Name) -> None:
    W = weights()
    importance = torch.rand(512).pow(4)

    plain = decode_bytes(encode(W, name), name)
    weighted = decode_bytes(encode(W, name, importance), name)

    assert error(weighted, W, importance) <= error(plain, W, importance)


def test_more_bits_err_less() -> None:
    W = weights()

    errors = [error(decode_bytes(encode(W, name), name), W) for name in K_TYPES]

    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.12  # Q2_K
    assert errors[-1] < 0.0006  # Q6_K


@pytest.mark.parametrize("name", K_TYPES)
def test_super_blocks_are_within_half_a_step_of_the_grid(name: Name) -> None:
    W = weights()
    kind = TYPES[name]
    grid = fit(W, name)

    codes = round_to(W, grid, kind)

    off = (decode_bytes(pack(codes, grid, kind), name) - W).abs()
    inner = (codes > 0) & (codes < kind.top)  # what lies beyond the grid's ends is cut off there
    steps = grid.step().abs().repeat_interleave(kind.group, dim=1)
    assert bool((off <= steps * 0.5001)[inner].all())


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("value", [0.0, -0.25, 3e-7])
def test_a_group_of_like_weights_stays_what_it_is(name: Name, value: float) -> None:
    W = torch.full((2, 512), value)

    found = decode_bytes(encode(W, name), name)

    torch.testing.assert_close(found, W, rtol=0.06, atol=2e-6)


def test_inputs_that_were_never_active_still_count() -> None:
    W = weights()

    found = decode_bytes(encode(W, "q4_k", torch.zeros(512)), "q4_k")

    assert error(found, W) < 0.01


def test_rows_divided_are_rows_divided() -> None:
    blocks = to_blocks(weights(), "q5_k", None)
    by = torch.rand(12) + 0.5

    divided = blocks.divided(by, torch.float32)

    expected = blocks.dequantize(torch.float32) / by.unsqueeze(-1)
    torch.testing.assert_close(divided.dequantize(torch.float32), expected, rtol=2e-3, atol=4e-3)


def test_slices_of_rows_are_slices_of_blocks() -> None:
    blocks = to_blocks(weights(), "q3_k", None)

    assert torch.equal(blocks.rows(3, 7).dequantize(torch.float32), blocks.dequantize(torch.float32)[3:7])
