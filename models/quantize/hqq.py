"""HQQ: fits each group's grid to the bulk of its weights, without data: a few large errors cost less than many small ones.

Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023), and the authors' code:
min Σ|W − s·(q − z)|^p with p = 0.7, by turns over an auxiliary matrix of errors (generalised soft-thresholding) and the
grid. We differ so: the layouts hold whole zero points, while theirs are floats, so that the zero point is rounded in
every turn and the scale is solved for beside it; the start is the grid of least squared error; each group keeps the best
grid that it met.
"""

import torch
from torch import Tensor

from models.codes import Codes, storable
from models.quantize.grid import dequantize, fit, round_to
from models.quantize.problem import Problem, Solution
from squeeze.steps import HQQ

P = 0.7
TURNS = 20
BETA, KAPPA = 10.0, 1.01  # weight of the quadratic term, and its growth in each turn; the authors' defaults
LEAST = 1e-8


def quantize(problem: Problem, step: HQQ) -> Solution:  # noqa: ARG001 - the scheme says it all
    """Codes of linears, each weight rounded to the nearest point of its group's grid."""
    W, scheme = problem.W, problem.scheme
    grouped = W.view(W.shape[0], -1, problem.group_size)
    scale, zero = fit(grouped, scheme.bits, scheme.symmetric, problem.dtype, importance=None)
    scale, zero = solve(grouped, scale, zero, scheme.bits, scheme.symmetric, problem.dtype)
    codes = round_to(grouped, scale, zero, scheme.bits)
    return Solution(Codes(codes.to(torch.uint8).view(W.shape), scale, zero.to(torch.uint8), scheme))


def solve(
    W: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group with the least Σ|error|^P that the turns come by, no worse than the given.

    W: (out, groups, group_size) float32. scale, zero: (out, groups), storable and whole.
    """
    # The threshold means something in units of the weights' own size, which differs from group to group.
    unit = W.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(LEAST)
    best_scale, best_zero = scale, zero
    best_error = torch.full_like(scale, torch.inf)
    beta = BETA
    for turn in range(TURNS + 1):
        codes = round_to(W, scale, zero, bits)
        difference = W - dequantize(codes, scale, zero)
        error = difference.abs().pow(P).sum(dim=-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        if turn == TURNS or not bool(better.any()):
            break
        target = W - shrunk(difference / unit, beta) * unit
        if not symmetric:
            zero = torch.round((codes - target / scale.unsqueeze(-1)).mean(dim=-1)).clamp(1, 2**bits - 1)
        centred = codes - zero.unsqueeze(-1)
        fitted = (target * centred).sum(dim=-1) / centred.square().sum(dim=-1).clamp_min(LEAST)
        scale = torch.where(fitted > 0, storable(fitted, dtype), scale)
        beta *= KAPPA
    return best_scale, best_zero


def shrunk(x: Tensor, beta: float) -> Tensor:
    """The minimiser e of |e|^P + β/2·(e − x)², approximately: sign(x)·max(|x| − |x|^(P−1)/β, 0)."""
    size = x.abs()
    return x.sign() * (size - size.clamp_min(LEAST).pow(P - 1) / beta).clamp_min(0)
