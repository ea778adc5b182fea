"""MXFP4: E2M1 weights in blocks of 32 that share a power of two; activations stay in 16 bits.

Source: OCP Microscaling Formats v1.0 §5.3, §6.3, where the shared exponent is that of the largest magnitude, less 2.
Differs: of that exponent and its neighbours, each block takes the one with the least squared error; the rule alone
clips what lies between 6 and 8 times the scale.
"""

import torch
from torch import Tensor

from models.quantize.problem import Problem, Solution
from models.weights.float_codes import E8M0_BIAS, Float4Codes, e2m1, power_of_two, to_e2m1
from squeeze.steps.quantization import MXFP4

TOP_EXPONENT = 2  # of E2M1: its largest number, 6, is 1.5 · 2²
NEIGHBOURS = (0, 1, -1)
LEAST, MOST = 1, 254  # exponents whose power of two is a normal bfloat16; 255 is no number


def quantize(problem: Problem, step: MXFP4) -> Solution:  # noqa: ARG001 - the scheme says it all
    """Codes of linears, each weight rounded to the nearest number under its block's scale."""
    W = problem.W
    blocks = W.view(W.shape[0], -1, problem.group_size)
    exponents = _fit(blocks)
    codes = to_e2m1(blocks / power_of_two(exponents).unsqueeze(-1)).view(W.shape)
    return Solution(Float4Codes(codes, exponents, torch.ones(1, device=W.device), problem.scheme))


def _fit(blocks: Tensor) -> Tensor:
    """blocks: (out, blocks, 32) float32. Returns the exponents, (out, blocks) uint8."""
    largest = blocks.abs().amax(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    ruled = torch.frexp(largest).exponent - 1 - TOP_EXPONENT + E8M0_BIAS  # frexp: largest in ½ … 1 times 2^exponent
    best = ruled.clamp(LEAST, MOST).to(torch.uint8)
    best_error = torch.full_like(largest, torch.inf)
    for offset in NEIGHBOURS:
        exponents = (ruled + offset).clamp(LEAST, MOST).to(torch.uint8)
        scale = power_of_two(exponents).unsqueeze(-1)
        error = (e2m1(to_e2m1(blocks / scale)) * scale - blocks).square_().sum(dim=-1)
        best = torch.where(error < best_error, exponents, best)
        best_error = torch.minimum(error, best_error)
    return best
