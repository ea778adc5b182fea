"""NormalFloat of 4 bits (QLoRA): every weight to the nearest quantile of its block of 64; needs no data."""

import torch

from models.quantize.problem import Problem, Solution
from models.weights.normal_float import Joined, encode
from squeeze.steps.quantization import NF4


def quantize(problem: Problem, step: NF4) -> Solution:  # noqa: ARG001 - the scheme says it all
    """Codes of linears, each for itself: where scales are nested, all of a linear share their mean.

    Source: arXiv 2305.14314 §3.
    """
    heights = list(problem.heights) or [len(problem.W)]
    return Solution(Joined(tuple(encode(W, problem.scheme) for W in torch.split(problem.W, heights))))
