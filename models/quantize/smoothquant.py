"""SmoothQuant: integers of eight bits on both sides of the multiplication, outliers of the activations smoothed first.

Source: Xiao et al., arXiv 2211.10438 §4: column j of the weights is multiplied by max|X_j|^α / max|W_j|^(1−α), the
inputs are divided by it, and then both round well. Differs: whatever can take over the division is used, rows of an
earlier linear as well as norms; the weights are rounded to nearest over a searched range, or by GPTQ.
"""

import torch
from torch import Tensor

from models.quantize import gptq, rtn
from models.quantize.problem import Problem, Solution
from squeeze.steps.quantization import GPTQ, RTN, SmoothQuant

LEAST = 1e-5  # of a column's largest magnitude: what was never active can't tell how far it reaches


def quantize(problem: Problem, step: SmoothQuant) -> Solution:
    """Codes of linears with one input, whose columns `fold` has scaled where something could take over the scale."""
    if step.rounding == "gptq":
        return gptq.quantize(problem, GPTQ(method="gptq", bits=8, group_size="channel"))
    return rtn.quantize(problem, RTN(method="rtn", bits=8, group_size="channel"))


def fold(problem: Problem, step: SmoothQuant) -> Tensor | None:
    """By what each column is multiplied, (in,) float32; None where the inputs were never active."""
    if problem.statistics is None or problem.statistics.moments is None:
        raise ValueError("SmoothQuant needs the moments of the layer's inputs")
    inputs, weights = problem.statistics.moments.largest, problem.W.abs().amax(dim=0)
    if problem.ties is not None:
        inputs, weights = _largest_of_tied(inputs, problem.ties), _largest_of_tied(weights, problem.ties)
    if not bool(inputs.any()):
        return None
    scale = inputs.clamp_min(LEAST).pow(step.alpha) / weights.clamp_min(LEAST).pow(1 - step.alpha)
    scale = scale.clamp_min(LEAST)
    # A column that nothing reached keeps its size beside the others.
    scale = torch.where(inputs > 0, scale, scale.log().mean().exp())
    return scale / scale.log().mean().exp()


def _largest_of_tied(values: Tensor, ties: Tensor) -> Tensor:
    """The largest among the columns that come from the same output of the producer. values: (in,), not negative."""
    largest = torch.zeros(int(ties.max()) + 1, device=values.device)
    return largest.scatter_reduce_(0, ties, values, "amax")[ties]
