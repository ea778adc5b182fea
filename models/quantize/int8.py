"""LLM.int8(): each output row in integers of 8 bits, its largest weight at 127; needs no data.

What the readers of the result add as it runs, outlying columns of the inputs multiplied as they are, is simulated by
`models.streaming.activations`.
"""

import torch

from models.quantize.problem import Problem, Solution
from models.weights.codes import Codes
from squeeze.steps.quantization import Int8

LARGEST = 127
ZERO = 128


def quantize(problem: Problem, step: Int8) -> Solution:  # noqa: ARG001 - the scheme says it all
    """Codes of linears, −127 … 127 about the zero point 128.

    Source: arXiv 2208.07339 §3. Differs from bitsandbytes, which rounds the weights to float16 first.
    """
    W = problem.W
    largest = W.abs().amax(dim=-1, keepdim=True)
    # The order of bitsandbytes' operations; a row of zeros has no scale.
    codes = torch.round(W * (LARGEST / largest)).nan_to_num_(0.0)
    zero = torch.full_like(largest, ZERO, dtype=torch.uint8)
    return Solution(Codes((codes + ZERO).to(torch.uint8), largest / LARGEST, zero, problem.scheme))
