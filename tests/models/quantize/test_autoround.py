"""AutoRound: its written-out gradient against autograd's, and what the descent gains on whole blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.quantize import autoround
from models.quantize.autoround import Learned
from squeeze.steps.quantization import AutoRound
from squeeze.steps.schemes import Scheme
from tests.models.engine_parts import compressed, thrown
from tests.models.tiny import FAMILIES


class Straight(torch.autograd.Function):
    """Rounds, and passes gradients on as if it had not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def learned(symmetric: bool, bits: int = 3, seed: int = 0) -> Learned:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(12, 64, generator=generator) * 0.1
    one = Learned.started(W, Scheme("int", bits, 32, symmetric), torch.float32, None)
    one.V.copy_(torch.rand(one.V.shape, generator=generator) - 0.5)
    one.above.mul_(torch.rand(one.above.shape, generator=generator) * 0.4 + 0.6)  # so that some weights are clipped
    return one


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_step_goes_against_the_gradient_that_autograd_finds(symmetric: bool) -> None:
    one, top = learned(symmetric), 7.0
    G = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
    V, above, below = (part.clone().double().requires_grad_() for part in (one.V, one.above, one.below))
    low, high = one.low.double() * (above if symmetric else below), one.high.double() * above
    scale = (high - low) / top
    if symmetric:
        codes = torch.clamp(Straight.apply(one.W.double() / scale[..., None] + V), -4, 3)
    else:
        # Where codes are clipped, the weight is the end of the range itself, not its rounded zero point.
        zero = Straight.apply(-low / scale)[..., None]
        raw = Straight.apply(one.W.double() / scale[..., None] + V)
        codes = torch.where(raw < -zero, low[..., None] / scale[..., None], raw)
        codes = torch.where(raw > top - zero, high[..., None] / scale[..., None], codes)
    ((codes * scale[..., None]).reshape(12, 64) * G).sum().backward()
    before = [part.clone() for part in (one.V, one.above, one.below)]

    one.descend(G, rate=1e-3)

    for part, was, gradient in zip((one.V, one.above), before, (V.grad, above.grad), strict=False):
        assert gradient is not None
        moved = (part - was).double()
        free = (gradient.abs() > 1e-6) & ((was - gradient.sign() * 1e-3).abs() < (0.5 if part is one.V else 1.5))
        assert free.float().mean() > 0.3
        assert torch.equal(moved.sign()[free], -gradient.sign()[free])
    if not symmetric:
        assert below.grad is not None
        free = below.grad.abs() > 1e-6
        assert torch.equal((one.below - before[2]).sign()[free], -below.grad.sign()[free].float())


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_and_zero_points_stay_where_formats_hold_them(symmetric: bool) -> None:
    one = learned(symmetric, bits=2)
    for seed in range(50):
        one.descend(torch.randn(12, 64, generator=torch.Generator().manual_seed(seed)), rate=0.02)
    codes = one.codes()
    assert int(codes.codes.max()) <= 3
    assert int(codes.zero.min()) >= 1
    assert int(codes.zero.max()) <= 3
    assert torch.equal(codes.scale.half().float(), codes.scale)
    assert torch.equal(codes.dequantize(torch.float32), one.weight())


def test_a_step_looks_at_eight_sequences_of_as_few_batches_as_hold_them() -> None:
    draws = autoround._draws([3, 3, 3, 2], torch.Generator().manual_seed(0))
    for _ in range(20):
        drawn = next(draws)
        assert sum(len(rows) for _, rows in drawn) == 8
        assert len({number for number, _ in drawn}) == len(drawn) <= 4
        assert all(len(rows.unique()) == len(rows) for _, rows in drawn)
    assert sum(len(rows) for _, rows in next(autoround._draws([2, 1], torch.Generator()))) == 3


@pytest.mark.parametrize(("family", "symmetric"), [("llama", True), ("gpt2", False), ("opt", False)])
def test_the_descent_brings_the_block_s_outputs_nearer_than_rounding_to_nearest(
    tmp_path: Path, family: str, symmetric: bool
) -> None:
    model = FAMILIES[family](tmp_path / "model")
    errors = {}
    for iterations in (0, 60):
        step = AutoRound(method="autoround", bits=2, group_size=32, symmetric=symmetric, iterations=iterations)
        done, _ = compressed(model, tmp_path / str(iterations), step)
        errors[iterations] = done.blocks[-1].relative_error
    assert errors[0] is not None and errors[60] is not None
    assert errors[60] < 0.8 * errors[0]


def test_the_same_seed_learns_the_same_codes_and_another_seed_others(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model", num_hidden_layers=1)
    step = AutoRound(method="autoround", bits=3, group_size=32, iterations=5)
    found = []
    with torch.random.fork_rng(devices=[]):
        for number, seed in enumerate((0, 0, 1)):
            torch.manual_seed(seed)
            done, _ = compressed(model, tmp_path / str(number), step, thrown(12))
            codes = [done.model.codes(name).dequantize(torch.float32) for name in done.model.sites]
            found.append(torch.cat([one.flatten() for one in codes]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
