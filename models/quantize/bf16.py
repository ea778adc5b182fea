"""A cast to bfloat16: no codes, no scales, no data."""

from models.quantize.problem import Problem, Solution
from models.weights.plain import TYPES, Plain, saturated
from squeeze.steps.quantization import BF16


def quantize(problem: Problem, step: BF16) -> Solution:  # noqa: ARG001 - the scheme says it all
    """The weights of linears, rounded to the nearest that bfloat16 holds."""
    return Solution(Plain(saturated(problem.W, TYPES[problem.scheme.element]), problem.scheme))
