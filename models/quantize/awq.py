"""AWQ: scales up the input columns that matter before rounding, and clips each group where that costs least.

Source: Lin et al., arXiv 2306.00978, §3 and the authors' released code (clipping is described there alone). We differ
so: the error of a trial is the exact output error of the linears that share the input, from their Hessian, where the
paper runs the calibration tokens through them anew for every trial; a column's importance is the root mean square of
its inputs, which the Hessian has, where the paper takes the mean magnitude; each group's range is clipped by the error
of the group's own part of the output, from the Hessian's diagonal block.
"""

import torch
from torch import Tensor

from models.codes import Codes, storable
from models.quantize.grid import dequantize, fit, round_to
from models.quantize.problem import Problem, Solution
from squeeze.steps import AWQ

SMALLEST = 1e-4  # of an unnormalised scale, as the released code has it


def fold(problem: Problem, step: AWQ) -> Tensor | None:
    """The scale of each input column, (in,) float32, with the least output error; None where none beats no scale."""
    H = _hessian(problem)
    X = importance(problem, H)
    best, least = None, torch.inf
    for ratio in torch.linspace(0, 1, step.grid + 1).tolist():
        s = scale_of(X, ratio)
        W, G = problem.W * s, H / s / s.unsqueeze(-1)
        error = output_error(search_round(W, problem, G) - W, G)
        if error < least:
            best, least = s, error
    return best


def importance(problem, H):
    X = H.diagonal().sqrt()
    if problem.ties is not None:
        X = tied(X.square(), problem.ties).sqrt()
    return X


def tied(X, ties):
    rows = int(ties.max()) + 1
    total = torch.zeros(rows).index_add_(0, ties, X)
    return (total / torch.bincount(ties, minlength=rows))[ties]


def scale_of(X: Tensor, ratio: float) -> Tensor:
    """X^ratio, normalised so that the extremes lie as far above one as below (the released code's)."""
    s = X.pow(ratio).clamp_min(SMALLEST)
    return s / (s.max() * s.min()).sqrt()


def search_round(W, problem, G):
    grouped = W.view(W.shape[0], -1, problem.group_size)
    scale, zero = fit(grouped, problem.scheme.bits, problem.scheme.symmetric, problem.dtype, G.diagonal().view(-1, problem.group_size))
    return dequantize(round_to(grouped, scale, zero, problem.scheme.bits), scale, zero).view(W.shape)


def quantize(problem: Problem, step: AWQ) -> Solution:
    H = _hessian(problem)
    W, scheme, g = problem.W, problem.scheme, problem.group_size
    grouped = W.view(W.shape[0], -1, g)
    scale, zero = clip(grouped, scheme.bits, scheme.symmetric, problem.dtype, H)
    codes = round_to(grouped, scale, zero, scheme.bits)
    return Solution(Codes(codes.to(torch.uint8).view(W.shape), scale, zero.to(torch.uint8), scheme))

LEAST = {2: 0.5, 3: 0.6, 4: 0.7, 8: 0.9}
STEPS = 20

def clip(grouped, bits, symmetric, dtype, H):
    g = grouped.shape[-1]
    blocks = torch.stack([H[i : i + g, i : i + g] for i in range(0, len(H), g)])  # (groups, g, g)
    top = float(2**bits - 1)
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    for shrink in torch.linspace(1, LEAST[bits], STEPS).tolist():
        scale = storable((high - low) * (shrink / top), dtype)
        zero = torch.full_like(scale, 2.0 ** (bits - 1)) if symmetric else torch.round(-low * shrink / scale).clamp(1, top)
        E = dequantize(round_to(grouped, scale, zero, bits), scale, zero) - grouped
        error = (torch.einsum("ogi,gij->ogj", E, blocks) * E).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def output_error(D: Tensor, H: Tensor) -> float:
    return float(((D @ H) * D).sum(dtype=torch.float64))


def _hessian(problem: Problem) -> Tensor:
    if problem.statistics is None or problem.statistics.hessian is None:
        raise ValueError("AWQ needs the Hessian of the layer's inputs")
    return problem.statistics.hessian.matrix
