"""A cast to float16: no codes, no scales, no data."""

from models.quantize.problem import Problem, Solution
from models.weights.plain import TYPES, Plain, saturated
from squeeze.steps.quantization import FP16


def quantize(problem: Problem, step: FP16) -> Solution:  # noqa: ARG001 - the scheme says it all
    """The weights of linears, rounded to the nearest that float16 holds."""
    return Solution(Plain(saturated(problem.W, TYPES[problem.scheme.element]), problem.scheme))
