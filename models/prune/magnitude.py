"""Magnitude pruning: the smallest weights of a layer become zero. The baseline that the others have to beat; no data.

Source: Han et al., arXiv 1506.02626; compared over a whole layer, as the baseline of Wanda and SparseGPT is (arXiv
2306.11695 §4).
"""

from models.prune.zeroing.masks import lowest_of_layer
from models.quantize.problem import Problem, Solution
from models.weights.plain import Plain
from squeeze.steps.sparsifying import Magnitude


def prune(problem: Problem, step: Magnitude) -> Solution:
    """Weights of linears, in each of them the smallest zero; the others as they are."""
    W = problem.W
    for one in problem.each(W):
        one.masked_fill_(lowest_of_layer(one.abs(), problem.scheme.sparsity, step.group), 0)
    return Solution(Plain(W.to(problem.dtype), problem.scheme))
