"""Which weights become zero, from a score for each: the lowest of a layer, of each row, or of every few neighbours."""

import torch
from torch import Tensor

from models.plain import CHUNK
from squeeze.sparsifying import Sparsify


def lowest_of_layer(scores: Tensor, step: Sparsify) -> Tensor:
    """True for the weights that go, (out, in). scores: (out, in) float32, none negative; the lowest of all go."""
    if step.group is not None:
        return _of_neighbours(scores, step.group)
    return lowest(scores.view(1, -1), count_of(scores.numel(), step)).view(scores.shape)


def lowest_of_rows(scores: Tensor, step: Sparsify) -> Tensor:
    """As `lowest_of_layer`, as many in each row."""
    if step.group is not None:
        return _of_neighbours(scores, step.group)
    return lowest(scores, count_of(scores.shape[1], step))


def lowest(scores: Tensor, count: int) -> Tensor:
    """True for exactly `count` in each row of scores, (n, m) float32; of equal ones the first.

    Weights in 16 bits have many equals, of which a threshold alone would take too many or too few.
    """
    if count == 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    rows = max(1, CHUNK // scores.shape[1])
    for part, goes in zip(torch.split(scores, rows), torch.split(mask, rows), strict=True):
        last = part.kthvalue(count, dim=1, keepdim=True).values
        torch.lt(part, last, out=goes)
        equal = part == last
        missing = count - goes.sum(dim=1, keepdim=True)
        goes.logical_or_(equal & (equal.cumsum(dim=1, dtype=torch.int32) <= missing))
    return mask


def count_of(weights: int, step: Sparsify) -> int:
    """How many of so many go."""
    return round(weights * step.sparsity)


def _of_neighbours(scores: Tensor, group: tuple[int, int]) -> Tensor:
    zeros, neighbours = group
    return lowest(scores.view(-1, neighbours), zeros).view(scores.shape)
