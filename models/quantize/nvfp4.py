"""NVFP4: E2M1 weights in blocks of 16 with an E4M3 scale each, under one float32 scale; activations stay in 16 bits.

Source: NVIDIA's format as compressed-tensors stores it (`nvfp4-pack-quantized`): weight = E2M1 · E4M3 scale / divisor,
where the divisor brings the largest block scale to 448. Differs: each block's scale is searched for the least squared
error, from clipping its largest weight to putting it at 4 instead of 6, where the numbers lie closer.
"""

import torch
from torch import Tensor

from models.quantize.problem import Problem, Solution
from models.weights.float_codes import LARGEST_E2M1, LARGEST_E4M3, Float4Codes, e2m1, to_e2m1, to_e4m3
from squeeze.steps.quantization import NVFP4

STRETCHES = tuple(0.7 + 0.05 * number for number in range(18))  # of the scale that puts a block's largest weight at 6
LEAST_SCALE = 2.0**-9  # E4M3's smallest positive number


def quantize(problem: Problem, step: NVFP4) -> Solution:  # noqa: ARG001 - the scheme says it all
    """Codes of linears. The divisor is shared by the linears of a problem: engines that fuse them keep one."""
    W = problem.W
    blocks = W.view(W.shape[0], -1, problem.group_size)
    largest = W.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    divisor = (LARGEST_E4M3 * LARGEST_E2M1 / largest).clamp(max=torch.finfo(torch.float32).max).reshape(1)
    scale = _fit(blocks, divisor)
    codes = to_e2m1(blocks / (scale.float() / divisor).unsqueeze(-1)).view(W.shape)
    return Solution(Float4Codes(codes, scale, divisor, problem.scheme))


def _fit(blocks: Tensor, divisor: Tensor) -> Tensor:
    """blocks: (out, blocks, 16) float32. Returns the scales, (out, blocks) float8_e4m3fn, before their division."""
    usual = blocks.abs().amax(dim=-1) * (divisor / LARGEST_E2M1)
    best = to_e4m3(usual.clamp_min(LEAST_SCALE))
    best_error = torch.full_like(usual, torch.inf)
    for stretch in STRETCHES:
        scale = to_e4m3((usual * stretch).clamp_min(LEAST_SCALE)).float()
        real = (scale / divisor).unsqueeze(-1)
        error = (e2m1(to_e2m1(blocks / real)) * real - blocks).square_().sum(dim=-1)
        best = torch.where(error < best_error, scale, best.float()).to(torch.float8_e4m3fn)
        best_error = torch.minimum(error, best_error)
    return best
