"""GPTQ: rounds a linear's columns one by one, each time making the columns to come pay for the error.

Source: Frantar et al., arXiv 2210.17323, §3 and the authors' reference code, as Chen et al., arXiv 2507.18553, write
it: with H = G D² Gᵀ, G unit triangular, a column's target is its own weight plus what the errors of the columns before
it put on it through G. That takes one Cholesky factorisation and no inverse, and gives the same codes. We differ so:
linears with a shared input share the Hessian and its factor; activation order keeps every group where it was (static
groups: scales are fitted to the original weights before the columns move), so that any loader reads the result; scales
minimise the Hessian-weighted rounding error over shrunken ranges instead of spanning min to max; a column whose inputs
were never active is rounded to nearest instead of being set to zero, since text that we did not see may use it; the
weight is held transposed, so that a column is contiguous, and worked on in bands of rows that fit the cache. With
asymmetric calibration the weight first makes up for what earlier layers changed, as a whole and exactly (least squares
on Σ(x̃ − x)xᵀ, the minimum of the same objective), where GPTAQ (Li et al., arXiv 2504.02692) does so column by column.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.codes import Codes
from models.quantize import rtn
from models.quantize.grid import fit
from models.quantize.problem import Problem, Solution
from models.statistics import Hessian
from squeeze.errors import FactorisationFailed
from squeeze.steps import GPTQ, RTN

BLOCK_COLUMNS = 128  # rounded before the columns after them are updated at once; group sizes divide it
BAND_ROWS = 1024  # of the weight, worked on together on a CPU: a block's columns of them fit the second-level cache
GATHERED_ROWS = 256  # of the Hessian, put into another order at once
# With fewer, layers are rounded to nearest: on the bundled model at 2 bits GPTQ lost to that with 64 tokens for 256
# columns (divergence 0.090 against 0.086) and won with 128 (0.080); at 4 bits it won with 64 too (0.0034, 0.0040).
LEAST_TOKENS_PER_COLUMN = 0.5
DAMPING_FACTOR = 3.0  # each time that the factorisation fails, until the damping exceeds MOST_DAMPING
MOST_DAMPING = 10.0


def quantize(problem: Problem, step: GPTQ) -> Solution:
    """Codes of linears with one input. Raises FactorisationFailed where no damping makes H positive definite."""
    if problem.statistics is None or problem.statistics.hessian is None:
        raise ValueError("GPTQ needs the Hessian of the layer's inputs")
    W, scheme, hessian, drift = problem.W, problem.scheme, problem.statistics.hessian, problem.statistics.drift
    if problem.statistics.count < LEAST_TOKENS_PER_COLUMN * W.shape[1]:
        why = f"rtn: {problem.statistics.count:,} calibration tokens came to {W.shape[1]:,} columns"
        return replace(rtn.quantize(problem, RTN(method="rtn")), instead=why)
    diagonal = hessian.sum.diagonal()
    # Stable, so that ties (columns never active) fall the same way on every run.
    order = (
        torch.argsort(diagonal, descending=True, stable=True)
        if step.activation_order
        else torch.arange(W.shape[1], device=W.device)
    )
    G, scale, damping, escalations = _factor(hessian, order, step)
    if drift is not None and drift.count:
        _make_up(W, drift.sum, G, scale, order.flip(0))
    grid = _Grid(scheme.bits, scheme.symmetric, problem.dtype, diagonal.view(-1, problem.group_size))
    band_rows = BAND_ROWS if W.device.type == "cpu" else len(W)
    factor = _Factor(G, order.flip(0), hessian.product_dtype)
    bands = [_round_columns(band, factor, grid, step.activation_order) for band in torch.split(W, band_rows)]
    codes, scale, zero = (torch.cat(parts) for parts in zip(*bands, strict=True))
    return Solution(Codes(codes, scale, zero.to(torch.uint8), scheme), damping, escalations)


@dataclass(frozen=True)
class _Grid:
    """What a group's scale and zero point are fitted to besides its weights. importance: (groups, group_size)."""

    bits: int
    symmetric: bool
    dtype: torch.dtype
    importance: Tensor

    @property
    def group_size(self) -> int:
        return self.importance.shape[1]

    def of(self, W: Tensor, groups: slice) -> tuple[Tensor, Tensor]:
        """Scale and zero, (out, groups) each. W: (out, columns of these groups)."""
        grouped = W.view(len(W), -1, self.group_size)
        return fit(grouped, self.bits, self.symmetric, self.dtype, self.importance[groups])


@dataclass(frozen=True)
class _Factor:
    """G as `_factor` gives it, the input columns in its order, and in which type blocks of errors are multiplied by it.

    In bfloat16 they err by some 0.3 % of what earlier errors put on a column's target, which is a few steps of the grid
    at most: the codes hardly differ, and what they cost is still accounted for exactly, as the errors are.
    """

    G: Tensor
    layout: Tensor
    dtype: torch.dtype


def _factor(hessian: Hessian, order: Tensor, step: GPTQ) -> tuple[Tensor, Tensor, float, int]:
    """G (in, in), unit lower triangular, and D (in,) with Σ x xᵀ = G D² Gᵀ; the damping that it took; escalations.

    Rows and columns stand in the reverse of `order`: the column that is rounded first is the last.
    """
    key = (step.activation_order, step.damping)
    if key in hessian.factors:
        return hessian.factors[key]
    mean = float(hessian.sum.diagonal().mean())
    if mean <= 0:  # no input was ever active: nothing to compensate
        mean = 1.0
    damping, escalations = step.damping, 0
    while damping <= MOST_DAMPING:
        # Transposed, a symmetric matrix is itself, and lies as LAPACK wants it: factorised in place.
        A = _reordered(hessian.sum, order.flip(0)).mT
        dead = A.diagonal() == 0
        A.diagonal().add_(damping * mean)[dead] = mean
        _, failed = torch.linalg.cholesky_ex(A, out=(A, torch.empty((), dtype=torch.int32, device=A.device)))
        scale = A.diagonal().clone()
        if not failed and bool(torch.isfinite(scale).all()):
            hessian.factors[key] = (A.div_(scale), scale, damping, escalations)
            return hessian.factors[key]
        damping, escalations = damping * DAMPING_FACTOR, escalations + 1
    raise FactorisationFailed(
        f"the Hessian of a layer with {len(order)} inputs is not positive definite even with damping {MOST_DAMPING:g}; "
        "its activations are degenerate: give other or more calibration text"
    )


def _make_up(W: Tensor, drift: Tensor, G: Tensor, D: Tensor, layout: Tensor) -> None:
    """Adds W Σ(x̃ − x)xᵀ (Σ x xᵀ)⁻¹ to W, (out, in): to reach on x what it would have put out on x̃, as far as it can.

    drift: Σ(x̃ − x)xᵀ, (in, in). G, D, layout: of Σ x xᵀ, damped, as `_factor` gives them.
    """
    wanted = (W @ drift)[:, layout]
    wanted = torch.linalg.solve_triangular(G.mT, wanted, upper=True, left=False, unitriangular=True).div_(D.square())
    W[:, layout] += torch.linalg.solve_triangular(G, wanted, upper=False, left=False, unitriangular=True)


def _reordered(H: Tensor, order: Tensor) -> Tensor:
    """H[order][:, order] without a second copy on the way."""
    A = torch.empty_like(H)
    for start in range(0, len(H), GATHERED_ROWS):
        rows = order[start : start + GATHERED_ROWS]
        torch.index_select(H[rows], 1, order, out=A[start : start + len(rows)])
    return A


def _round_columns(W: Tensor, factor: _Factor, grid: _Grid, static_groups: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 of the paper on some rows. Returns codes (out, in) uint8, scale and zero (out, groups) float32.

    Without static groups, scales are fitted as each group is reached, to targets that already hold what earlier errors
    put on them. A group is then a block of columns, or the whole row.
    """
    rows, columns = W.shape
    G, layout = factor.G, factor.layout  # from the last to the first
    T = W.T[layout]  # targets, (in, out): a column of W is a contiguous row here
    originals = T.clone()
    fit_by_group = not static_groups and grid.group_size <= BLOCK_COLUMNS
    block_columns = grid.group_size if fit_by_group else BLOCK_COLUMNS
    groups_of = torch.div(layout, grid.group_size, rounding_mode="floor")
    S = torch.empty(columns // grid.group_size, rows, device=W.device)
    Z = torch.empty_like(S)
    if not fit_by_group:
        S, Z = (part.T.contiguous() for part in grid.of(W, slice(None)))
    top = 2.0**grid.bits - 1
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=W.device)
    for stop in range(columns, 0, -block_columns):
        start = max(stop - block_columns, 0)
        if fit_by_group:
            group = int(groups_of[start])
            scale, zero = grid.of(T[start:stop].flip(0).T.contiguous(), slice(group, group + 1))
            S[group], Z[group] = scale[:, 0], zero[:, 0]
        block = slice(start, stop)
        Q, errors = _round_block(T[block], originals[block], G[block, block], S, Z, groups_of[block], top)
        codes[:, layout[block]] = Q.T
        if start:
            if factor.dtype == torch.float32:
                T[:start].addmm_(G[block, :start].T, errors)
            else:
                T[:start] += G[block, :start].T.to(factor.dtype) @ errors.to(factor.dtype)
    return codes, S.T.contiguous(), Z.T.contiguous()


def _round_block(
    T: Tensor, originals: Tensor, G: Tensor, S: Tensor, Z: Tensor, groups_of: Tensor, top: float
) -> tuple[Tensor, Tensor]:
    """Codes uint8 and errors float32 of a block of columns, (columns, out) each, from the last to the first.

    T: targets, which are used up, and originals, (columns, out). G: (columns, columns). S, Z: (groups, out).
    """
    Q, errors = torch.empty_like(T), torch.empty_like(T)
    zeros = Z[groups_of]
    least, most = -zeros, top - zeros
    scales = S[groups_of]
    for i in range(len(T) - 1, -1, -1):
        t, q, s = T[i], Q[i], scales[i]
        if i + 1 < len(T):
            t.addmv_(errors[i + 1 :].T, G[i + 1 :, i])
        torch.div(t, s, out=q).round_()
        torch.clamp(q, least[i], most[i], out=q)
        torch.addcmul(originals[i], q, s, value=-1, out=errors[i])
    return Q.add_(zeros).to(torch.uint8), errors
