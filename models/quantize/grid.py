"""Scales and zero points: the grid that codes are rounded to. Shared by every integer method."""

from collections.abc import Callable

import torch
from torch import Tensor

from models.weights.codes import storable

# Shrinkages of the range that are tried; clipping the outermost weights often costs less than the coarser grid that
# they force on all others, the more so the fewer the bits. The diagonal of the Hessian, which weighs the trials, does
# not see that a clipped weight errs to one side, so the search stops well before its own optimum: on the bundled model
# at 2 bits GPTQ's divergence was 0.044 with a floor of 0.55, 0.028 with 0.65, and 0.022 with 0.75 and with 0.8.
SHRINK_STEPS = 16
SHRINK_LEAST = {2: 0.75, 3: 0.8, 4: 0.85, 8: 0.95}
MOST_SIGNED_BITS = 4  # of grids whose scales may be negative
FITTED_WEIGHTS = 1 << 18  # at once on a CPU: few enough for the second-level cache, enough for a call to pay


def fit(W: Tensor, bits: int, symmetric: bool, dtype: torch.dtype, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scale and zero point of each group with the least weighted rounding error among shrunken ranges.

    W: (out, groups, group_size) float32. importance: (groups, group_size), how much the square of each column's error
    matters, for example the diagonal of the Hessian; None: all alike.
    Returns scale (out, groups) float32, storable, and zero (out, groups) float32, whole numbers.
    """
    importance = None if importance is None else importance.contiguous()
    fitted = [_fit(band, bits, symmetric, dtype, importance) for band in bands(W)]
    scale, zero = (torch.cat(parts) for parts in zip(*fitted, strict=True))
    return scale, zero


def bands(W: Tensor) -> tuple[Tensor, ...]:
    """Rows that a search over scales works on together. W: (out, ...)."""
    rows = max(1, FITTED_WEIGHTS // W[0].numel()) if W.device.type == "cpu" else len(W)
    return torch.split(W, rows)


def _fit(W: Tensor, bits: int, symmetric: bool, dtype: torch.dtype, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    def error(residual: Tensor) -> Tensor:
        squares = residual.square_()
        return (squares if importance is None else squares.mul_(importance)).sum(dim=-1)

    shrinks = torch.linspace(1.0, SHRINK_LEAST[bits], SHRINK_STEPS).tolist()
    return least(W, bits, symmetric, dtype, shrinks, error)


def least(
    W: Tensor, bits: int, symmetric: bool, dtype: torch.dtype, shrinks: list[float], error: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Of each group's range shrunken so or so, scale and zero point with the least error, both (out, groups) float32.

    W: (out, groups, group_size) float32. error: (out, groups), of what rounding takes away, as W is; it may overwrite
    that.
    """
    top = 2.0**bits - 1
    low, high = ends(W, bits, symmetric)  # (out, groups)
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    trial = torch.empty_like(W)  # one for all trials: they are most of the memory, and of the traffic
    for shrink in shrinks:
        scale = storable((high - low) * (shrink / top), dtype)
        zero = 2.0 ** (bits - 1) if symmetric else torch.round(-low * shrink / scale).clamp(1, top)
        found = error(residual(W, scale, zero, bits, trial))
        better = found < best_error
        best_error = torch.where(better, found, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def residual(W: Tensor, scale: Tensor, zero: Tensor | float, bits: int, out: Tensor) -> Tensor:
    """What rounding takes away from W, in `out`. W, out: (…, n); scale: (…); zero: (…) or the same for all."""
    top = 2.0**bits - 1
    torch.div(W, scale.unsqueeze(-1), out=out).round_()
    if isinstance(zero, float):
        out.clamp_(-zero, top - zero)
    else:  # three walks with numbers are a third of one with tensors as bounds
        zero = zero.unsqueeze(-1)
        out.add_(zero).clamp_(0, top).sub_(zero)
    return torch.addcmul(W, out, scale.unsqueeze(-1), value=-1, out=out)


def ends(W: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """What the first and the last code of each group's grid stand for at most. W: (…, n). Returns (…) twice.

    A symmetric grid reaches as far down as up, and its first code lies half a step further out than its last: the end
    with the largest weight gets it. Where that weight is positive the grid runs downwards, with a negative scale: for
    every consumer a factor like any other, and 10 to 25 % less divergence at 4 to 2 bits. At 8 bits nothing is won.
    """
    low, high = W.amin(dim=-1).clamp_max(0), W.amax(dim=-1).clamp_min(0)
    if not symmetric:
        return low, high
    most = torch.maximum(high, -low)
    if bits <= MOST_SIGNED_BITS:
        most = torch.where(high > -low, -most, most)
    return -most, most


def round_to(W: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes of the nearest grid points. W: (…, n); scale, zero: (…). Returns float32 whole numbers 0 … 2^bits − 1."""
    return torch.round(W / scale.unsqueeze(-1)).add_(zero.unsqueeze(-1)).clamp_(0, 2**bits - 1)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(codes − zero) · scale. codes: (…, n); scale, zero: (…)."""
    return (codes - zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1))
