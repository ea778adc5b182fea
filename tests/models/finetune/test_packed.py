"""Linears that keep their weights as packed codes: the weight they multiply by, gradients, what they hold."""

import pytest
import torch
from torch import Tensor, nn

from models.finetune import packed
from models.finetune.packed import PackedLinear
from models.weights.codes import Codes, storable
from squeeze.steps.schemes import Group, Scheme


def codes_of(rows: int, columns: int, group_size: Group, bits: int = 4) -> Codes:
    """Random ones, with scales of either sign."""
    scheme = Scheme("int", bits, group_size)
    groups = columns // scheme.columns(columns)
    return Codes(
        torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8),
        storable(torch.randn(rows, groups), torch.bfloat16),
        torch.full((rows, groups), 2 ** (bits - 1), dtype=torch.uint8),
        scheme,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, "channel"])
def test_it_multiplies_by_the_weight_that_the_codes_name(
    monkeypatch: pytest.MonkeyPatch, group_size: Group, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(packed, "BAND_WEIGHTS", 500)  # several bands, the last one shorter
    codes, bias = codes_of(40, 96, group_size), nn.Parameter(torch.randn(40, dtype=dtype))
    linear, W = PackedLinear(codes, bias, dtype), codes.dequantize(dtype)
    assert torch.equal(linear.weight, W) and linear.weight.dtype == dtype
    x = torch.randn(2, 3, 96, dtype=dtype)
    assert torch.equal(linear(x), nn.functional.linear(x, W) + bias)


def test_its_input_gets_the_gradient_of_a_linear_and_nothing_is_kept_for_it() -> None:
    codes = codes_of(40, 96, 32)
    x = torch.randn(5, 96, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        y = PackedLinear(codes, None, torch.float32)(x)
    assert kept == []
    (found,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad((x @ codes.dequantize(torch.float32).t()).square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_it_holds_half_a_byte_a_weight_and_two_a_group() -> None:
    linear = PackedLinear(codes_of(64, 256, 128), None, torch.bfloat16)
    assert not list(linear.parameters())
    assert sum(one.numel() * one.element_size() for one in linear.buffers()) == 64 * 256 // 2 + 64 * 2 * 2
