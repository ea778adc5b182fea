"""HQQ on random weights: what it minimises, and the grids that it may use."""

import pytest
import torch
from torch import Tensor

from models.quantize import hqq, rtn
from models.quantize.problem import Problem
from models.weights.codes import Codes
from squeeze.steps.quantization import HQQ, RTN


def heavy_tailed(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    chi = torch.randn(3, rows, columns, generator=generator).square().sum(dim=0)
    return torch.randn(rows, columns, generator=generator) / chi.sqrt() * 0.05  # of Student's t with three degrees


def solved(W: Tensor, bits: int, symmetric: bool) -> tuple[Codes, Codes]:
    """HQQ's codes and those of rounding to nearest."""
    step = HQQ(method="hqq", bits=bits, symmetric=symmetric, group_size=64)
    nearest = RTN(method="rtn", bits=bits, symmetric=symmetric, group_size=64)
    problem = Problem(W.clone(), None, step.scheme(), torch.bfloat16)
    ours, theirs = hqq.quantize(problem, step).encoded, rtn.quantize(problem, nearest).encoded
    assert isinstance(ours, Codes) and isinstance(theirs, Codes)
    return ours, theirs


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_group_errs_more_than_rounded_to_nearest(bits: int) -> None:
    W = heavy_tailed(64, 256, seed=bits)
    ours, nearest = (
        (codes.dequantize(torch.float32) - W).square().view(64, 4, 64).sum(dim=-1) for codes in solved(W, bits, False)
    )
    assert (ours <= nearest * (1 + 1e-6)).all()


def test_a_symmetric_grid_has_no_zero_point_to_turn_and_is_round_to_nearest_s() -> None:
    ours, nearest = solved(heavy_tailed(16, 128, seed=1), 3, True)
    assert torch.equal(ours.codes, nearest.codes)
    assert torch.equal(ours.scale, nearest.scale)


@pytest.mark.parametrize("symmetric", [True, False])
def test_its_grids_are_those_that_formats_hold(symmetric: bool) -> None:
    codes, _ = solved(heavy_tailed(32, 128, seed=0) * torch.logspace(-6, 2, 32).unsqueeze(1), 2, symmetric)
    assert int(codes.zero.min()) >= 1
    assert int(codes.zero.max()) <= 3
    assert torch.equal(codes.scale.half().float(), codes.scale)
    if symmetric:
        assert (codes.zero == 2).all()


def test_the_shrinkage_leaves_large_errors_and_removes_small_ones() -> None:
    x = torch.tensor([-2.0, -0.01, 0.0, 0.01, 2.0])
    shrunk = hqq.shrunk(x, beta=10.0)
    assert shrunk[1:4].abs().max() == 0
    assert ((x - shrunk)[[0, 4]].abs() < 0.1).all()
