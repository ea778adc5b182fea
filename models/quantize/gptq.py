"""GPTQ: integer codes with error feedback, on scales that are searched.

Source: Frantar et al., arXiv 2210.17323, §3 (`models.quantize.feedback`). We differ so: linears with a shared input
share the Hessian and its factor; activation order keeps every group where it was (static groups: scales are fitted to
the original weights before the columns move), so that any loader reads the result; scales minimise the
Hessian-weighted rounding error over shrunken ranges instead of spanning min to max. With asymmetric calibration the
weight first makes up for what earlier layers changed, as a whole and exactly (least squares on Σ(x̃ − x)xᵀ, the minimum
of the same objective), where GPTAQ (Li et al., arXiv 2504.02692) does so column by column. Zeros of
a weight that was pruned stay zero.

Where the step asks for zeros itself, one sweep of SparseGPT (`models.prune.sparsegpt`) finds which, and what the others
become, and a second one rounds that, its zeros standing. In one order the two add up to the sweep that does both at
once (Frantar and Alistarh, arXiv 2301.00774, §3.5): what a column's zeros and its rounding put on another are sums. We
differ so: grids fit what is left, since the zeros are known beforehand, and each sweep has the order that it does best
in, the columns' own for zeros, that of activations for rounding. On the bundled model at 4 bits and 2:4, all in one
sweep had a divergence of 0.037, this 0.029.
"""

from dataclasses import replace

import torch
from torch import Tensor

from models.prune.sparsegpt import zero_columns
from models.prune.zeroing.masks import lowest_of_layer
from models.quantize import rtn
from models.quantize.feedback import Levels, factorised, factorised_in_order, round_columns
from models.quantize.grid import fit
from models.quantize.problem import Problem, Solution, pruned
from models.streaming.statistics import Factor
from models.weights.codes import Codes
from squeeze.steps.quantization import GPTQ, RTN

# With fewer, layers are rounded to nearest: on the bundled model at 2 bits GPTQ lost to that with 64 tokens for 256
# columns (divergence 0.090 against 0.086) and won with 128 (0.080); at 4 bits it won with 64 too (0.0034, 0.0040).
LEAST_TOKENS_PER_COLUMN = 0.5


def quantize(problem: Problem, step: GPTQ) -> Solution:
    """Codes of linears with one input. Raises FactorisationFailed where no damping makes H positive definite."""
    if problem.statistics is None or problem.statistics.hessian is None:
        raise ValueError("GPTQ needs the Hessian of the layer's inputs")
    W, scheme, drift = problem.W, problem.scheme, problem.statistics.drift
    if problem.statistics.count < LEAST_TOKENS_PER_COLUMN * W.shape[1]:
        _zero_smallest(problem, step)
        why = f"rtn: {problem.statistics.count:,} calibration tokens came to {W.shape[1]:,} columns"
        return replace(rtn.quantize(problem, RTN(method="rtn")), instead=why)
    hessian = problem.statistics.hessian
    in_order = factorised_in_order(hessian, step.damping) if step.zeroed and step.activation_order else None
    factor = factorised(hessian, step.damping, by_activation=step.activation_order)
    if drift is not None and drift.count:
        _make_up(W, drift.sum, factor)
    for one in problem.each(W) if step.zeroed else ():
        one.copy_(zero_columns(one, in_order or factor, step.zeroed, step.group))
    zeros = W == 0 if step.zeroed else pruned(W)
    importance = factor.diagonal.view(-1, problem.group_size)

    def fitted(W: Tensor, groups: slice) -> tuple[Tensor, Tensor]:
        grouped = W.view(len(W), -1, problem.group_size)
        return fit(grouped, scheme.bits, scheme.symmetric, problem.dtype, importance[groups])

    def refit(targets: Tensor, group: int) -> tuple[Tensor, Tensor]:
        scale, zero = fitted(targets, slice(group, group + 1))
        return scale[:, 0], zero[:, 0]

    static = step.activation_order or len(importance) == 1
    if static:
        scale, zero = fitted(W, slice(None))
    else:
        scale, zero = (torch.empty(len(W), len(importance), device=W.device) for _ in range(2))
    levels = Levels(scale, zero, None, 2**scheme.bits - 1)
    codes = round_columns(W, factor, levels, problem.dtype, None if static else refit, zeros)
    encoded = Codes(codes, levels.scale, levels.zero.to(torch.uint8), scheme)
    return Solution(encoded, factor.damping, factor.escalations)


def _zero_smallest(problem: Problem, step: GPTQ) -> None:
    for W in problem.each(problem.W) if step.zeroed else ():
        W.masked_fill_(lowest_of_layer(W.abs(), step.zeroed, step.group), 0)


def _make_up(W: Tensor, drift: Tensor, factor: Factor) -> None:
    """Adds W Σ(x̃ − x)xᵀ (Σ x xᵀ)⁻¹ to W, (out, in): to reach on x what it would have put out on x̃, as far as it can.

    drift: Σ(x̃ − x)xᵀ, (in, in). factor: of Σ x xᵀ, damped.
    """
    G, layout = factor.G, factor.layout
    wanted = (W @ drift)[:, layout]
    wanted = torch.linalg.solve_triangular(G.mT, wanted, upper=True, left=False, unitriangular=True)
    wanted.div_(factor.D.square())
    W[:, layout] += torch.linalg.solve_triangular(G, wanted, upper=False, left=False, unitriangular=True)
