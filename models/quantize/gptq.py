"""GPTQ: rounds a linear's columns one by one, each time making the columns to come pay for the error.

Source: Frantar et al., arXiv 2210.17323, §3 and the authors' reference code, as Chen et al., arXiv 2507.18553, write
it: with H = G D² Gᵀ, G unit triangular, a column's target is its own weight plus what the errors of the columns before
it put on it through G. That takes one Cholesky factorisation and no inverse, and gives the same codes. We differ so:
linears with a shared input share the Hessian and its factor; activation order keeps every group where it was (static
groups: scales are fitted to the original weights before the columns move), so that any loader reads the result; scales
minimise the Hessian-weighted rounding error over shrunken ranges instead of spanning min to max; a column whose inputs
were never active is rounded to nearest instead of being set to zero, since text that we did not see may use it; the
weight is held transposed, so that a column is contiguous, and worked on in bands of rows. With
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
from models.statistics import Factor, Hessian, multiplies_bfloat16
from squeeze.errors import FactorisationFailed
from squeeze.steps import GPTQ, RTN

FEW_COLUMNS = 32  # rounded one by one, before what they put on others becomes a product; group sizes are multiples
BAND_WEIGHTS = 1 << 22  # worked on together on a CPU, where three copies of so many are held
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
    factor = _factor(hessian, step)
    if drift is not None and drift.count:
        _make_up(W, drift.sum, factor)
    grid = _Grid(scheme.bits, scheme.symmetric, problem.dtype, factor.diagonal.view(-1, problem.group_size))
    band_rows = max(1, BAND_WEIGHTS // W.shape[1]) if W.device.type == "cpu" else len(W)
    coarse = problem.dtype == torch.bfloat16 and multiplies_bfloat16(W.device)
    # In bfloat16 a target errs by some 0.3 % of what earlier errors put on it, a hundredth of a step of the grid. That
    # may tip a few codes to their other neighbour, which costs next to nothing; the errors that go on are exact.
    product_dtype = torch.bfloat16 if coarse else torch.float32
    bands = [
        _round_columns(band, factor, product_dtype, grid, step.activation_order) for band in torch.split(W, band_rows)
    ]
    codes, scale, zero = (torch.cat(parts) for parts in zip(*bands, strict=True))
    return Solution(Codes(codes, scale, zero.to(torch.uint8), scheme), factor.damping, factor.escalations)


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


def _factor(hessian: Hessian, step: GPTQ) -> Factor:
    """Of the Hessian, which keeps it in place of its sum. The column that is rounded first stands last."""
    if hessian.factor is not None:
        return hessian.factor
    diagonal = hessian.sum.diagonal().clone()
    # Stable, so that ties (columns never active) fall the same way on every run.
    order = (
        torch.argsort(diagonal, descending=True, stable=True)
        if step.activation_order
        else torch.arange(len(diagonal), device=diagonal.device)
    )
    layout = order.flip(0)
    mean = float(diagonal.mean())
    if mean <= 0:  # no input was ever active: nothing to compensate
        mean = 1.0
    damping, escalations = step.damping, 0
    while damping <= MOST_DAMPING:
        added = torch.where(diagonal == 0, mean, damping * mean)
        # Transposed, a symmetric matrix is itself, and lies as LAPACK wants it: factorised in place.
        A = _reordered(hessian.sum, layout).mT
        A.diagonal().add_(added[layout])
        _, failed = torch.linalg.cholesky_ex(A, out=(A, torch.empty((), dtype=torch.int32, device=A.device)))
        D = A.diagonal().clone()
        if not failed and bool(torch.isfinite(D).all()):
            factor = Factor(A.div_(D), D, layout, diagonal, added, damping, escalations)
            hessian.replace(factor)
            return factor
        damping, escalations = damping * DAMPING_FACTOR, escalations + 1
    raise FactorisationFailed(
        f"the Hessian of a layer with {len(layout)} inputs is not positive definite even with damping "
        f"{MOST_DAMPING:g}; its activations are degenerate: give other or more calibration text"
    )


def _make_up(W: Tensor, drift: Tensor, factor: Factor) -> None:
    """Adds W Σ(x̃ − x)xᵀ (Σ x xᵀ)⁻¹ to W, (out, in): to reach on x what it would have put out on x̃, as far as it can.

    drift: Σ(x̃ − x)xᵀ, (in, in). factor: of Σ x xᵀ, damped.
    """
    G, layout = factor.G, factor.layout
    wanted = (W @ drift)[:, layout]
    wanted = torch.linalg.solve_triangular(G.mT, wanted, upper=True, left=False, unitriangular=True)
    wanted.div_(factor.D.square())
    W[:, layout] += torch.linalg.solve_triangular(G, wanted, upper=False, left=False, unitriangular=True)


def _reordered(H: Tensor, order: Tensor) -> Tensor:
    """H[order][:, order] without a second copy on the way."""
    A = torch.empty_like(H)
    for start in range(0, len(H), GATHERED_ROWS):
        rows = order[start : start + GATHERED_ROWS]
        torch.index_select(H[rows], 1, order, out=A[start : start + len(rows)])
    return A


def _round_columns(
    W: Tensor, factor: Factor, product_dtype: torch.dtype, grid: _Grid, static_groups: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 of the paper on some rows. Returns codes (out, in) uint8, scale and zero (out, groups) float32."""
    rows, columns = W.shape
    originals = W.T.contiguous()[factor.layout]  # (in, out): a column of W is a contiguous row here
    groups_of = torch.div(factor.layout, grid.group_size, rounding_mode="floor").tolist()
    S, Z = torch.empty(columns // grid.group_size, rows, device=W.device), torch.empty(0)
    fits_as_it_goes = not static_groups and grid.group_size < columns
    if fits_as_it_goes:
        Z = torch.empty_like(S)
    else:
        S, Z = (part.T.contiguous() for part in grid.of(W, slice(None)))
    band = _Band(
        factor.G, product_dtype, grid, groups_of, originals, originals.clone(), torch.empty_like(originals), S, Z
    )
    band.round(0, columns, fits_as_it_goes)
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=W.device)
    codes[factor.layout] = band.codes()
    return codes.T.contiguous(), S.T.contiguous(), Z.T.contiguous()


@dataclass(frozen=True)
class _Band:
    """Some rows of a weight, transposed and in the factor's order, while their columns are rounded from the last on.

    G: of the factor. product_dtype: in which blocks of errors are multiplied by it.
    originals, targets, errors: (in, out) float32. groups_of: of each column. S, Z: scale and zero, (groups, out).
    """

    G: Tensor
    product_dtype: torch.dtype
    grid: _Grid
    groups_of: list[int]
    originals: Tensor
    targets: Tensor
    errors: Tensor
    S: Tensor
    Z: Tensor

    def round(self, start: int, stop: int, fits: bool) -> None:
        """Rounds columns start … stop − 1, whose targets hold what all columns from `stop` on put on them.

        By halves: once the latter is done, what it puts on the former is one product. fits: each group's scale is
        fitted when it is reached, to its targets then.
        """
        group_size = self.grid.group_size
        if fits and stop - start == group_size:
            group = self.groups_of[start]
            scale, zero = self.grid.of(self.targets[start:stop].flip(0).T.contiguous(), slice(group, group + 1))
            self.S[group], self.Z[group] = scale[:, 0], zero[:, 0]
            fits = False
        if stop - start <= FEW_COLUMNS:
            self._round_singly(start, stop)
            return
        unit = group_size if fits else FEW_COLUMNS
        middle = start + max(1, (stop - start) // unit // 2) * unit
        self.round(middle, stop, fits)
        G, errors = self.G[middle:stop, start:middle].T, self.errors[middle:stop]
        if self.product_dtype == torch.float32 or stop - middle <= FEW_COLUMNS:
            self.targets[start:middle].addmm_(G, errors)
        else:
            self.targets[start:middle] += G.to(self.product_dtype) @ errors.to(self.product_dtype)
        self.round(start, middle, fits)

    def _round_singly(self, start: int, stop: int) -> None:
        columns, top = slice(start, stop), 2**self.grid.bits - 1
        G, errors, scales, zeros = (
            self.G[columns, columns],
            self.errors[columns],
            self.S.unbind(),
            self.Z.unbind(),
        )
        parts = (self.originals[columns], self.targets[columns], errors)
        each = list(zip(*(part.unbind() for part in parts), self.groups_of[columns], strict=True))
        for i in range(len(each) - 1, -1, -1):
            w, t, error, group = each[i]
            if i + 1 < len(each):
                t.addmv_(errors[i + 1 :].T, G[i + 1 :, i])
            t.div_(scales[group]).round_().add_(zeros[group]).clamp_(0, top)  # the code
            torch.sub(t, zeros[group], out=error).mul_(scales[group])
            torch.sub(w, error, out=error)

    def codes(self) -> Tensor:
        """(in, out) uint8, once all columns are rounded: they stand where their targets were."""
        return self.targets.to(torch.uint8)
