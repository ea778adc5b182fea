"""GPTQ: rounds a linear's columns one by one, each time making the columns to come pay for the error.

Source: Frantar et al., arXiv 2210.17323, §3 and the authors' reference code. We differ so: linears with a shared input
share the Hessian and its factor; activation order keeps every group where it was (static groups: scales are fitted to
the original weights before the columns move), so that any loader reads the result; scales minimise the
Hessian-weighted rounding error over shrunken ranges instead of spanning min to max; a column whose inputs were never
active is rounded to nearest instead of being set to zero, since text that we did not see may use it; the weight is
held transposed, so that a column is contiguous.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from models.codes import Codes
from models.quantize.grid import fit
from models.quantize.solution import Solution
from models.statistics import Hessian
from squeeze.errors import FactorisationFailed
from squeeze.steps import GPTQ

BLOCK_COLUMNS = 128  # rounded before the columns after them are updated at once; group sizes divide it
DAMPING_FACTOR = 10.0  # each time that the factorisation fails, until the damping exceeds MOST_DAMPING
MOST_DAMPING = 10.0


def quantize(W: Tensor, statistics: Hessian | None, step: GPTQ, group_size: int, dtype: torch.dtype) -> Solution:
    """Codes of one linear.

    W: (out, in) float32. statistics: of its calibration inputs. dtype: of the model, which bounds what scales can be
    stored. Raises FactorisationFailed where no damping makes the Hessian positive definite.
    """
    if statistics is None:
        raise ValueError("GPTQ needs the Hessian of the layer's inputs")
    H = statistics.matrix
    diagonal = H.diagonal()
    columns = W.shape[1]
    # Stable, so that ties (columns never active) fall the same way on every run.
    order = (
        torch.argsort(diagonal, descending=True, stable=True)
        if step.activation_order
        else torch.arange(columns, device=W.device)
    )
    U, damping, escalations = _factor(statistics, H, order, step)
    importance = diagonal.view(-1, group_size)
    scale = zero = None
    if step.activation_order:
        scale, zero = fit(W.view(W.shape[0], -1, group_size), step.bits, step.symmetric, dtype, importance)

    def fit_group(columns_of_group: Tensor, group: int) -> tuple[Tensor, Tensor]:
        grouped = columns_of_group.T.unsqueeze(1)  # (group_size, out) -> (out, 1, group_size)
        one_scale, one_zero = fit(grouped, step.bits, step.symmetric, dtype, importance[group : group + 1])
        return one_scale[:, 0], one_zero[:, 0]

    codes, scale, zero = _round_columns(W, U, order, scale, zero, fit_group, group_size, 2**step.bits - 1)
    return Solution(
        Codes(codes, scale, zero.to(torch.uint8), step.bits, group_size, step.symmetric), damping, escalations
    )


def _factor(statistics: Hessian, H: Tensor, order: Tensor, step: GPTQ) -> tuple[Tensor, float, int]:
    """U (in, in), upper triangular with H⁻¹ = Uᵀ U in the given column order; the damping that it took; escalations."""
    key = (step.activation_order, step.damping)
    if key in statistics.factors:
        return statistics.factors[key]
    ordered = H[order][:, order]
    mean = float(ordered.diagonal().mean())
    if mean <= 0:  # no input was ever active: nothing to compensate
        mean = 1.0
    dead = ordered.diagonal() == 0
    damping, escalations = step.damping, 0
    while damping <= MOST_DAMPING:
        damped = ordered.clone()
        damped.diagonal().add_(damping * mean)
        damped.diagonal()[dead] = mean
        L, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
            if not failed and bool(torch.isfinite(U).all()):
                statistics.factors[key] = (U, damping, escalations)
                return statistics.factors[key]
        damping, escalations = damping * DAMPING_FACTOR, escalations + 1
    raise FactorisationFailed(
        f"the Hessian of a layer with {H.shape[0]} inputs is not positive definite even with damping {MOST_DAMPING:g}; "
        "its activations are degenerate: give other or more calibration text"
    )


def _round_columns(
    W: Tensor,
    U: Tensor,
    order: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    fit_group: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    group_size: int,
    top: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loop of the paper's Algorithm 1. Returns codes (out, in) uint8, scale and zero (out, groups) float32.

    Without given scales, `fit_group` fits them as each group is reached, to weights that already paid for earlier
    errors. A group either lies within one lazy block or is the whole row, so its weights stand as they should by then.
    """
    rows, columns = W.shape
    Wt = W.T[order].contiguous()  # (in, out): a column of W is a contiguous row here
    Qt = torch.empty(columns, rows, dtype=torch.uint8, device=W.device)
    groups_of = torch.div(order, group_size, rounding_mode="floor").tolist()
    fitting = scales is None or zeros is None
    St = torch.empty(columns // group_size, rows, device=W.device) if scales is None else scales.T.contiguous()
    Zt = torch.empty_like(St) if zeros is None else zeros.T.contiguous()
    for start in range(0, columns, BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, columns)
        Wb, Ub = Wt[start:end], U[start:end, start:end]
        errors = torch.empty_like(Wb)
        for i in range(end - start):
            group = groups_of[start + i]
            if fitting and (start + i) % group_size == 0:
                St[group], Zt[group] = fit_group(Wt[start + i : start + i + group_size], group)
            w, s, z = Wb[i], St[group], Zt[group]
            q = (w / s).round_().add_(z).clamp_(0, top)
            Qt[start + i] = q.to(torch.uint8)
            error = torch.sub(w, (q - z).mul_(s)).div_(Ub[i, i])
            errors[i] = error
            if i + 1 < end - start:
                Wb[i + 1 :].addr_(Ub[i, i + 1 :], error, alpha=-1)
        if end < columns:
            Wt[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=W.device)
    codes[:, order] = Qt.T
    return codes, St.T.contiguous(), Zt.T.contiguous()
