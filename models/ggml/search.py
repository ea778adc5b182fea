"""Least-squares steps and shifts of groups of weights, by trial: the range is stretched and shrunken, and each trial's
codes get the step and the shift that fit them best.

Groups lie in columns, X (group, n), so that sums run over contiguous rows and n groups are searched at once.
"""

import torch
from torch import Tensor

SMALLEST = 1e-30


def fit_symmetric(X: Tensor, weight: Tensor, least: int, greatest: int, trials: Tensor) -> tuple[Tensor, Tensor]:
    """The step s of each group with the least Σ weight·(x − s·q)², q = round(x / s) within least … greatest.

    X, weight: (group, n); least < 0 is as far from zero as greatest or farther by one. trials: codes by which the range
    is stretched. Returns s (n,), of either sign: the weight that is farthest from zero takes the longer side; and the
    curvature Σ weight·q² (n,).
    """
    extreme = X.gather(0, X.abs().argmax(dim=0, keepdim=True))[0]  # (n,)
    toward = torch.where(extreme.abs() > SMALLEST, least / extreme, torch.zeros_like(extreme))
    best = torch.full_like(extreme, -1.0)
    step, curvature = torch.zeros_like(extreme), torch.zeros_like(extreme)
    WX = X * weight
    for trial in trials.tolist():
        q = (X * (toward * (1 + trial / -least))).round_().clamp_(least, greatest)
        along = (q * WX).sum(dim=0)
        energy = q.square_().mul_(weight).sum(dim=0)
        gain = along.square() / energy.clamp_min(SMALLEST)
        better = gain > best
        best = torch.where(better, gain, best)
        step = torch.where(better, along / energy.clamp_min(SMALLEST), step)
        curvature = torch.where(better, energy, curvature)
    return step, curvature


def fit_shifted(X: Tensor, weight: Tensor, top: int, trials: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The step s ≥ 0 and the shift m ≥ 0 of each group with the least Σ weight·(x − s·q + m)², q within 0 … top.

    X, weight: (group, n). trials: codes by which the range is stretched. Returns s, m and Σ weight·q², (n,).
    """
    low, high = X.amin(dim=0).clamp_max(0), X.amax(dim=0)
    span = high - low
    inverse = torch.where(span > SMALLEST, top / span, torch.zeros_like(span))
    WX = X * weight
    total = weight.sum(dim=0)
    sum_x = WX.sum(dim=0)
    best = torch.full_like(span, -torch.inf)
    step, shift, curvature = torch.zeros_like(span), -low, torch.zeros_like(span)
    for trial in trials.tolist():
        stretched = inverse * (1 + trial / top)
        q = (X * stretched).sub_(low * stretched).round_().clamp_(0, top)
        s, m, gain, energy = _line(q, weight, WX, total, sum_x)
        better = (gain > best) & (span > SMALLEST)  # a group of like weights is its shift
        best = torch.where(better, gain, best)
        step, shift = torch.where(better, s, step), torch.where(better, m, shift)
        curvature = torch.where(better, energy, curvature)
    return step, shift, curvature


def _line(q: Tensor, weight: Tensor, WX: Tensor, total: Tensor, sum_x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The least-squares line x ≈ s·q − m with m ≥ 0: s, m, by how much it lowers Σ weight·x², and Σ weight·q²."""
    sum_qx = (q * WX).sum(dim=0)
    wq = q * weight
    sum_q = wq.sum(dim=0)
    sum_qq = (wq * q).sum(dim=0)
    determinant = total * sum_qq - sum_q.square()
    singular = determinant <= SMALLEST + 1e-6 * total * sum_qq
    safe = torch.where(singular, torch.ones_like(determinant), determinant)
    s = (total * sum_qx - sum_q * sum_x) / safe
    m = (sum_q * sum_qx - sum_qq * sum_x) / safe
    through_zero = singular | (m < 0) | (s < 0)
    s = torch.where(through_zero, (sum_qx / sum_qq.clamp_min(SMALLEST)).clamp_min(0), s)
    m = torch.where(through_zero, torch.zeros_like(m), m)
    return s, m, s * sum_qx - m * sum_x, sum_qq
