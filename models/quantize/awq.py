"""AWQ: scales up the input columns that matter before rounding, and clips each group where that costs least.

Source: Lin et al., arXiv 2306.00978, §3, and the authors' released code (where alone the clipping is). We differ so:
the error of a trial is the exact output error of all linears that share the input, tr(ΔW H ΔWᵀ), from their Hessian,
where the paper runs calibration tokens through them anew for every trial; weights are clipped in the trials too, as
they will be; a column's importance is the root mean square
of its inputs, which the Hessian has, where the paper takes the mean magnitude; a group's range is clipped by the error
of the group's own part of the outputs, from the Hessian's diagonal block, over all tokens instead of a sample of them;
whatever can take a scale over does, also repeated values of grouped-query attention, whose copies then share one.
"""

import torch
from torch import Tensor

from models.quantize.grid import bands, least, residual, round_to
from models.quantize.problem import Problem, Solution
from models.weights.codes import Codes
from squeeze.steps.quantization import AWQ

SMALLEST = 1e-4  # of a scale before it is normalised, as in the released code
SEARCH_ROWS = 1024  # of the weights, evenly spaced, at most, tell the error of a scale: trials cost rows · in²
CLIP_STEPS = 20
# Share of a range that is left at the least. A group's block does not see what its clipping does beside that of other
# groups, so that the search stops early: on the bundled model at 2 bits 0.5 gave a divergence of 0.078, 0.7 gave 0.073
# and 0.85 gave 0.098.
CLIP_LEAST = {2: 0.7, 3: 0.75, 4: 0.7, 8: 0.95}


def fold(problem: Problem, step: AWQ) -> Tensor | None:
    """The scale of each input column, (in,) float32, with the least output error: importance^ratio for the best of
    `step.grid` + 1 ratios from 0 to 1. None where no ratio beats 0, which scales nothing.
    """
    H = _hessian(problem)
    X = importance(H, problem.ties)
    W = problem.W[:: -(-len(problem.W) // SEARCH_ROWS)]
    blocks = diagonal_blocks(H, problem.group_size)
    best, lowest = None, torch.inf
    for ratio in torch.linspace(0, 1, step.grid + 1).tolist():
        s = scale_of(X, ratio)
        error = _scaled_error(W, problem, H, blocks, s)
        if error < lowest:
            best, lowest = (s if ratio else None), error
    return best


def quantize(problem: Problem, step: AWQ) -> Solution:  # noqa: ARG001 - `fold` was given what it asks for
    """Codes of linears with one input, whose columns `fold` has scaled where something could take over the scale."""
    W, scheme = problem.W, problem.scheme
    grouped = W.view(W.shape[0], -1, problem.group_size)
    blocks = diagonal_blocks(_hessian(problem), problem.group_size)
    scale, zero = clip(grouped, blocks, scheme.bits, scheme.symmetric, problem.dtype)
    codes = round_to(grouped, scale, zero, scheme.bits)
    return Solution(Codes(codes.to(torch.uint8).view(W.shape), scale, zero.to(torch.uint8), scheme))


def importance(H: Tensor, ties: Tensor | None) -> Tensor:
    """Root mean square of each input column, up to a factor, (in,). H: (in, in). Columns that are tied share theirs."""
    squares = H.diagonal()
    if ties is not None:
        sums = torch.zeros(int(ties.max()) + 1, device=H.device).index_add_(0, ties, squares)
        squares = (sums / torch.bincount(ties))[ties]
    return squares.sqrt()


def scale_of(X: Tensor, ratio: float) -> Tensor:
    """X^ratio, normalised so that the largest is as far above 1 as the smallest is below."""
    s = X.pow(ratio).clamp_min(SMALLEST)
    return s / (s.max() * s.min()).sqrt()


def clip(W: Tensor, blocks: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group with the least e·H_g·eᵀ among shrunken ranges; e: a row's errors in the group.

    W: (out, groups, group_size) float32. blocks: H_g, (groups, group_size, group_size). Returns scale (out, groups)
    float32, storable, and zero (out, groups) float32, whole numbers.
    """
    clipped = [_clip(band, blocks, bits, symmetric, dtype) for band in bands(W)]
    scale, zero = (torch.cat(parts) for parts in zip(*clipped, strict=True))
    return scale, zero


def diagonal_blocks(H: Tensor, size: int) -> Tensor:
    """What the columns of each group have to do with one another, (groups, size, size). H: (in, in)."""
    return torch.stack([H[start : start + size, start : start + size] for start in range(0, len(H), size)])


def _clip(W: Tensor, blocks: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    products = W.new_empty(W.shape[1], W.shape[0], W.shape[2])

    def error(residual: Tensor) -> Tensor:
        E = residual.transpose(0, 1)  # (groups, out, group_size)
        return torch.bmm(E, blocks, out=products).mul_(E).sum(dim=-1).T

    shrinks = torch.linspace(1.0, CLIP_LEAST[bits], CLIP_STEPS).tolist()
    return least(W, bits, symmetric, dtype, shrinks, error)


def _scaled_error(W: Tensor, problem: Problem, H: Tensor, blocks: Tensor, s: Tensor) -> float:
    """tr(ΔW H ΔWᵀ) with the columns of W multiplied by s, clipped and rounded, and divided again."""
    scheme, size = problem.scheme, problem.group_size
    grouped = s.view(-1, size)
    blocks = blocks / grouped.unsqueeze(1) / grouped.unsqueeze(2)
    total = 0.0
    for band in bands(W.view(len(W), -1, size)):
        scaled = band * grouped
        scale, zero = _clip(scaled, blocks, scheme.bits, scheme.symmetric, problem.dtype)
        D = residual(scaled, scale, zero, scheme.bits, torch.empty_like(scaled)).div_(grouped).view(len(band), -1)
        total += float((D @ H).mul_(D).sum(dtype=torch.float64))
    return total


def _hessian(problem: Problem) -> Tensor:
    if problem.statistics is None or problem.statistics.hessian is None:
        raise ValueError("AWQ needs the Hessian of the layer's inputs")
    return problem.statistics.hessian.matrix
