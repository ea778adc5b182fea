"""Error feedback: columns are rounded one by one, each time making the columns to come pay for the error, on any grid.

Source: Frantar et al., arXiv 2210.17323, §3 and the authors' reference code, as Chen et al., arXiv 2507.18553, write
it: with H = G D² Gᵀ, G unit triangular, a column's target is its own weight plus what the errors of the columns before
it put on it through G. That takes one Cholesky factorisation and no inverse, and gives the same codes. We differ so: a
column whose inputs were never active is rounded to nearest instead of being set to zero, since text that we did not see
may use it; the weight is held transposed, so that a column is contiguous, worked on in bands of rows, and by halves, so
that what columns put on others are products of large blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from models.streaming.statistics import Factor, Hessian, multiplies_bfloat16
from squeeze.errors import FactorisationFailed

FEW_COLUMNS = 32  # rounded one by one, before what they put on others becomes a product; group sizes are multiples
BAND_WEIGHTS = 1 << 22  # worked on together on a CPU, where three copies of so many are held
GATHERED_ROWS = 256  # of the Hessian, put into another order at once
DAMPING_FACTOR = 3.0  # each time that the factorisation fails, until the damping exceeds MOST_DAMPING
MOST_DAMPING = 10.0

Refit = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Scale and zero, (out,) each, for a group's targets, (out, group_size), and the group's number."""

RoundBlock = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, int], None]
"""`feedback_triton.round_block`."""


@dataclass(frozen=True)
class Levels:
    """What the codes 0 … top of each group stand for: (code − zero) · scale − shift.

    scale, zero, shift: (out, groups) float32; zero holds whole numbers; shift None: nothing is taken away.
    """

    scale: Tensor
    zero: Tensor
    shift: Tensor | None
    top: int


def factorised(hessian: Hessian, damping: float, *, by_activation: bool) -> Factor:
    """Its factor, which it keeps in place of its sum. The column that is rounded first stands last.

    damping: what is added to the diagonal, as a share of its mean. by_activation: the most active columns first.
    Raises FactorisationFailed where no damping makes it positive definite.
    """
    if hessian.factor is not None:
        return hessian.factor
    factor = _factor(hessian, damping, by_activation=by_activation)
    hessian.replace(factor)
    return factor


def factorised_in_order(hessian: Hessian, damping: float) -> Factor:
    """As `factorised`, the last column first; it keeps its sum, which another order needs."""
    if hessian.in_order is None:
        hessian.in_order = _factor(hessian, damping, by_activation=False)
    return hessian.in_order


def round_columns(
    W: Tensor,
    factor: Factor,
    levels: Levels,
    dtype: torch.dtype,
    refit: Refit | None = None,
    zeros: Tensor | None = None,
) -> Tensor:
    """Codes, (out, in) uint8. W: (out, in) float32. dtype: of the model. zeros: (out, in) bool, true for weights that
    become zero whatever is put on them, which levels without a shift have.

    refit: fits each group anew when it is reached, to targets that hold what the columns before put on them; what it
    finds goes into `levels`. Groups must then be reached one after the other.
    """
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    band_rows = max(1, BAND_WEIGHTS // W.shape[1]) if W.device.type == "cpu" else len(W)
    # In bfloat16 a target errs by some 0.3 % of what earlier errors put on it, a hundredth of a step of the grid. That
    # may tip a few codes to their other neighbour, which costs next to nothing; the errors that go on are exact.
    coarse = dtype == torch.bfloat16 and multiplies_bfloat16(W.device)
    for start in range(0, len(W), band_rows):
        rows = slice(start, start + band_rows)
        band = _Band.of(W[rows], factor, levels, rows, torch.bfloat16 if coarse else torch.float32, zeros)
        band.round(0, W.shape[1], refit)
        codes[rows] = band.codes(factor.layout)
        if refit is not None:
            levels.scale[rows], levels.zero[rows] = band.S.T, band.Z.T
    return codes


def _factor(hessian: Hessian, damping: float, *, by_activation: bool) -> Factor:
    diagonal = hessian.diagonal.clone()
    # Stable, so that ties (columns never active) fall the same way on every run.
    order = (
        torch.argsort(diagonal, descending=True, stable=True)
        if by_activation
        else torch.arange(len(diagonal), device=diagonal.device)
    )
    layout = order.flip(0)
    mean = float(diagonal.mean())
    if mean <= 0:  # no input was ever active: nothing to compensate
        mean = 1.0
    escalations = 0
    while damping <= MOST_DAMPING:
        added = torch.where(diagonal == 0, mean, damping * mean)
        # Transposed, a symmetric matrix is itself, and lies as LAPACK wants it: factorised in place.
        A = _reordered(hessian.sum, layout).mT
        A.diagonal().add_(added[layout])
        _, failed = torch.linalg.cholesky_ex(A, out=(A, torch.empty((), dtype=torch.int32, device=A.device)))
        D = A.diagonal().clone()
        if not failed and bool(torch.isfinite(D).all()):
            return Factor(A.div_(D), D, layout, diagonal, added, damping, escalations)
        damping, escalations = damping * DAMPING_FACTOR, escalations + 1
    raise FactorisationFailed(
        f"the Hessian of a layer with {len(layout)} inputs is not positive definite even with damping "
        f"{MOST_DAMPING:g}; its activations are degenerate: give other or more calibration text"
    )


def _reordered(H: Tensor, order: Tensor) -> Tensor:
    """H[order][:, order] without a second copy on the way."""
    A = torch.empty_like(H)
    for start in range(0, len(H), GATHERED_ROWS):
        rows = order[start : start + GATHERED_ROWS]
        torch.index_select(H[rows], 1, order, out=A[start : start + len(rows)])
    return A


@dataclass(frozen=True)
class _Band:
    """Some rows of a weight, transposed and in the factor's order, while their columns are rounded from the last on.

    G: of the factor. product_dtype: in which blocks of errors are multiplied by it.
    originals, targets, errors: (in, out) float32. groups: of each column, (in,) int32, and groups_of the same as
    numbers. S, Z, M: scale, zero and shift, (groups, out). round_block: what rounds few columns in one launch, where
    there is such a thing. zeros: (in, out) bool, of the weights that become zero; None: of none.
    """

    G: Tensor
    product_dtype: torch.dtype
    round_block: RoundBlock | None
    groups: Tensor
    groups_of: list[int]
    originals: Tensor
    targets: Tensor
    errors: Tensor
    S: Tensor
    Z: Tensor
    M: Tensor | None
    top: int
    zeros: Tensor | None

    @classmethod
    def of(
        cls,
        W: Tensor,
        factor: Factor,
        levels: Levels,
        rows: slice,
        product_dtype: torch.dtype,
        zeros: Tensor | None,
    ) -> "_Band":
        originals = W.T.contiguous()[factor.layout]  # a column of W is a contiguous row here
        group_size = W.shape[1] // levels.scale.shape[1]
        groups = torch.div(factor.layout, group_size, rounding_mode="floor")
        return cls(
            factor.G,
            product_dtype,
            _round_block_on(W.device) if zeros is None else None,  # it knows of none
            groups.int(),
            groups.tolist(),
            originals,
            originals.clone(),
            torch.empty_like(originals),
            levels.scale[rows].T.contiguous(),
            levels.zero[rows].T.contiguous(),
            None if levels.shift is None else levels.shift[rows].T.contiguous(),
            levels.top,
            None if zeros is None else zeros[rows].T.contiguous()[factor.layout],
        )

    def round(self, start: int, stop: int, refit: Refit | None) -> None:
        """Rounds columns start … stop − 1, whose targets hold what all columns from `stop` on put on them.

        By halves: once the latter is done, what it puts on the former is one product.
        """
        group_size = len(self.groups_of) // len(self.S)
        if refit is not None and stop - start == group_size:
            group = self.groups_of[start]
            self.S[group], self.Z[group] = refit(self.targets[start:stop].flip(0).T.contiguous(), group)
            refit = None
        if stop - start <= FEW_COLUMNS:
            self._round_singly(start, stop)
            return
        unit = FEW_COLUMNS if refit is None else group_size
        middle = start + max(1, (stop - start) // unit // 2) * unit
        self.round(middle, stop, refit)
        G, errors = self.G[middle:stop, start:middle].T, self.errors[middle:stop]
        if self.product_dtype == torch.float32 or stop - middle <= FEW_COLUMNS:
            self.targets[start:middle].addmm_(G, errors)
        else:
            self.targets[start:middle] += G.to(self.product_dtype) @ errors.to(self.product_dtype)
        self.round(start, middle, refit)

    def _round_singly(self, start: int, stop: int) -> None:
        columns = slice(start, stop)
        G, errors = self.G[columns, columns], self.errors[columns]
        parts = (self.originals[columns], self.targets[columns], errors)
        if self.round_block is not None:
            self.round_block(*parts, G, self.groups[columns], self.S, self.Z, self.M, self.top)
            return
        scales, offsets = self.S.unbind(), self.Z.unbind()
        gone = None if self.zeros is None else self.zeros[columns]
        shifts = None if self.M is None else self.M.unbind()
        each = list(zip(*(part.unbind() for part in parts), self.groups_of[columns], strict=True))
        for i in range(len(each) - 1, -1, -1):
            w, t, error, group = each[i]
            if i + 1 < len(each):
                t.addmv_(errors[i + 1 :].T, G[i + 1 :, i])
            if shifts is not None:
                t.add_(shifts[group])
            t.div_(scales[group]).round_().add_(offsets[group]).clamp_(0, self.top)  # the code
            if gone is not None:
                torch.where(gone[i], offsets[group], t, out=t)
            torch.sub(t, offsets[group], out=error).mul_(scales[group])
            torch.sub(w, error, out=error)
            if shifts is not None:
                error.add_(shifts[group])

    def codes(self, layout: Tensor) -> Tensor:
        """(out, in) uint8, columns in their own order, once all are rounded: they stand where their targets were."""
        codes = torch.empty(self.targets.shape, dtype=torch.uint8, device=layout.device)
        codes[layout] = self.targets.to(torch.uint8)
        return codes.T


@cache
def _round_block_on(device: torch.device) -> RoundBlock | None:
    """The Triton kernel, on a GPU where Triton is: torch's CUDA wheels bring it, and its CPU wheel does not."""
    if find_spec("triton") is None:
        return None
    from models.kernels import feedback_triton

    return feedback_triton.round_block if feedback_triton.runs_on(device) else None
