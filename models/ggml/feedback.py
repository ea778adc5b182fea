"""Codes for a given grid of ggml blocks, column by column, each error paid for by the columns still to come (GPTQ)."""

import torch
from torch import Tensor

from models.ggml.layout import Grid
from models.ggml.types import BlockType

BLOCK_COLUMNS = 128  # rounded before the columns after them are updated at once


def round_with_feedback(W: Tensor, grid: Grid, kind: BlockType, U: Tensor, order: Tensor) -> Tensor:
    """Codes, (rows, columns) uint8.

    W: (rows, columns) float32. U: (columns, columns), upper triangular with H⁻¹ = Uᵀ U in the order of columns `order`.
    Source: arXiv 2210.17323 §3, with static groups: the grid was fitted before any column moved, so that columns may be
    rounded in any order.
    """
    rows, columns = W.shape
    steps = grid.step().T.contiguous()  # (groups, rows)
    shift = grid.shift()
    shifts = torch.zeros_like(steps) if shift is None else shift.T.contiguous()
    Wt = W.T[order].contiguous()  # (columns, rows): a column of W is a contiguous row here
    Qt = torch.empty(columns, rows, dtype=torch.uint8, device=W.device)
    groups = torch.div(order, kind.group, rounding_mode="floor").tolist()
    for start in range(0, columns, BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, columns)
        Wb, Ub = Wt[start:end], U[start:end, start:end]
        errors = torch.empty_like(Wb)
        for i in range(end - start):
            w, s, m = Wb[i], steps[groups[start + i]], shifts[groups[start + i]]
            q = ((w + m) / s).round_().add_(kind.bias).clamp_(0, kind.top)
            Qt[start + i] = q.to(torch.uint8)
            errors[i] = w.sub(q.sub_(kind.bias).mul_(s).sub_(m)).div_(Ub[i, i])
            if i + 1 < end - start:
                Wb[i + 1 :].addr_(Ub[i, i + 1 :], errors[i], alpha=-1)
        if end < columns:
            Wt[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=W.device)
    codes[:, order] = Qt.T
    return codes
