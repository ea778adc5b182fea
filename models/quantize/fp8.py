"""E4M3 weights: eight-bit floating-point numbers with a scale a row, or one for all rows.

Source: Micikevicius et al., arXiv 2209.05433 §4. Differs: the scale is searched within one octave above the one that
puts the largest weight at 448. Relative precision is the same all over E4M3's range, so the larger scales cost nothing,
and among them is one under which the grid lies best.
"""

import torch
from torch import Tensor

from models.quantize.grid import FITTED_WEIGHTS, bands
from models.quantize.problem import Problem, Solution
from models.weights.float_codes import LARGEST_E4M3, Float8Codes, exact_in, to_e4m3
from squeeze.steps.quantization import FP8

OCTAVE_STEPS = 16


def quantize(problem: Problem, step: FP8) -> Solution:  # noqa: ARG001 - the scheme says it all
    """Codes of linears. One scale for all rows is shared by a problem's linears: engines that fuse them keep one."""
    W, whole = problem.W, problem.scheme.group_size == "tensor"
    rows = W.view(1, -1) if whole else W
    scale = torch.cat([_fit(band, problem.dtype) for band in bands(rows)])
    parts = bands(W)
    each = torch.split(scale.expand(len(W), 1), [len(part) for part in parts])
    codes = torch.cat([to_e4m3(part / own) for part, own in zip(parts, each, strict=True)])
    return Solution(Float8Codes(codes, scale.expand(len(W), 1).contiguous(), problem.scheme))


def _fit(W: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale of each row with the least squared error. W: (rows, n) float32. Returns (rows, 1) float32."""
    smallest = torch.linalg.vector_norm(W, torch.inf, dim=1, keepdim=True) / LARGEST_E4M3
    best_scale = exact_in(smallest, dtype)
    best_error = torch.full_like(best_scale, torch.inf)
    for number in range(OCTAVE_STEPS):
        scale = exact_in(smallest * 2 ** (number / OCTAVE_STEPS), dtype)
        error = torch.zeros_like(scale)
        for part in torch.split(W, FITTED_WEIGHTS, dim=1):  # all but of rows that are longer, one
            rounded = to_e4m3(torch.div(part, scale)).float()
            error += rounded.mul_(scale).sub_(part).square_().sum(dim=1, keepdim=True)
        best_scale = torch.where(error < best_error, scale, best_scale)
        best_error = torch.minimum(error, best_error)
    return best_scale
