"""HQQ: turns each group's zero point so that few weights err much rather than all a little, without data.

Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023), and the authors' code:
min over z of Σ|W − s·(q − z)|^p with p = 0.7, by turns over an auxiliary matrix of errors (generalised
soft-thresholding) and the zero point. We differ so: the layouts hold whole zero points, while theirs are floats, so
that z is rounded in every turn, which leaves the solver little to do: the result is mostly round-to-nearest's. The
scale is one of the latter's shrunken ranges, and each group keeps the pair with the least squared error. Neither is the
scale solved for, nor the pair chosen by p: on the bundled model that gave a divergence of 0.0055 where round-to-nearest
has 0.0038 at 4 bits (asymmetric), and 0.10 to 0.22 where it has 0.08 at 2.
"""

import torch
from torch import Tensor

from models.quantize.grid import SHRINK_LEAST, SHRINK_STEPS, dequantize, fit, round_to
from models.quantize.problem import Problem, Solution
from models.weights.codes import Codes, storable
from squeeze.steps.quantization import HQQ

P = 0.7
TURNS = 4  # whole zero points settle in one or two
BETA, KAPPA = 10.0, 1.01  # weight of the quadratic term, and its growth in each turn; the authors' defaults
LEAST = 1e-8


def quantize(problem: Problem, step: HQQ) -> Solution:  # noqa: ARG001 - the scheme says it all
    """Codes of linears, each weight rounded to the nearest point of its group's grid. Symmetric grids, which have no
    zero point to turn, are round-to-nearest's.
    """
    W, scheme = problem.W, problem.scheme
    grouped = W.view(W.shape[0], -1, problem.group_size)
    if scheme.symmetric:
        scale, zero = fit(grouped, scheme.bits, True, problem.dtype, importance=None)
    else:
        scale, zero = solve(grouped, scheme.bits, problem.dtype)
    codes = round_to(grouped, scale, zero, scheme.bits)
    return Solution(Codes(codes.to(torch.uint8).view(W.shape), scale, zero.to(torch.uint8), scheme))


def solve(W: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group, both (out, groups) float32, storable and whole.

    W: (out, groups, group_size) float32.
    """
    top = float(2**bits - 1)
    low, high = W.amin(dim=-1).clamp_max(0), W.amax(dim=-1).clamp_min(0)
    # The threshold means something in units of the weights' own size, which differs from group to group.
    unit = W.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(LEAST)
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    for shrink in torch.linspace(1.0, SHRINK_LEAST[bits], SHRINK_STEPS).tolist():
        scale = storable((high - low) * (shrink / top), dtype)
        zero = torch.round(-low * shrink / scale).clamp(1, top)
        for turn in range(TURNS):
            codes = round_to(W, scale, zero, bits)
            difference = W - dequantize(codes, scale, zero)
            error = difference.square().sum(dim=-1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
            target = W - shrunk(difference / unit, BETA * KAPPA**turn) * unit
            turned = torch.round((codes - target / scale.unsqueeze(-1)).mean(dim=-1)).clamp(1, top)
            if torch.equal(turned, zero):
                break
            zero = turned
    return best_scale, best_zero


def shrunk(x: Tensor, beta: float) -> Tensor:
    """The minimiser e of |e|^P + β/2·(e − x)², approximately: sign(x)·max(|x| − |x|^(P−1)/β, 0)."""
    size = x.abs()
    return x.sign() * (size - size.clamp_min(LEAST).pow(P - 1) / beta).clamp_min(0)
