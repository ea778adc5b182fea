"""Which weights become zero, from a score for each: the lowest of a layer, of each row, or of every few neighbours."""

import torch
from torch import Tensor

from models.weights.plain import CHUNK

Group = tuple[int, int]  # zeros among so many neighbours


def lowest_of_layer(scores: Tensor, share: float, group: Group | None) -> Tensor:
    """True for the weights that go, (out, in). scores: (out, in) float32, none negative; the lowest of all go."""
    if group is not None:
        return _of_neighbours(scores, group)
    return lowest(scores.view(1, -1), count_of(scores.numel(), share)).view(scores.shape)


def lowest_of_rows(scores: Tensor, share: float, group: Group | None) -> Tensor:
    """As `lowest_of_layer`, as many in each row; where that is no whole number, one more in the rows where that one's
    score is the lowest, so that there are as many in all.
    """
    if group is not None:
        return _of_neighbours(scores, group)
    each, more = divmod(count_of(scores.numel(), share), len(scores))
    mask = lowest(scores, each)
    if more:
        further = scores.kthvalue(each + 1, dim=1).values
        rows = lowest(further.view(1, -1), more)[0]
        mask[rows] = lowest(scores[rows], each + 1)
    return mask


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


def count_of(weights: int, share: float) -> int:
    """How many of so many go."""
    return round(weights * share)


def _of_neighbours(scores: Tensor, group: Group) -> Tensor:
    zeros, neighbours = group
    return lowest(scores.view(-1, neighbours), zeros).view(scores.shape)
