"""Round to nearest: every weight on its own. The baseline that the others have to beat; needs no data."""

import torch

from models.quantize.grid import fit, round_to
from models.quantize.problem import Problem, Solution
from models.weights.codes import Codes
from squeeze.steps.quantization import RTN


def quantize(problem: Problem, step: RTN) -> Solution:  # noqa: ARG001 - the scheme says it all
    """Codes of linears, each weight rounded to the nearest point of its group's grid."""
    W, scheme = problem.W, problem.scheme
    grouped = W.view(W.shape[0], -1, problem.group_size)
    scale, zero = fit(grouped, scheme.bits, scheme.symmetric, problem.dtype, importance=None)
    codes = round_to(grouped, scale, zero, scheme.bits)
    return Solution(Codes(codes.to(torch.uint8).view(W.shape), scale, zero.to(torch.uint8), scheme))
