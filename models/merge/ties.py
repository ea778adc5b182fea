"""TIES (arXiv 2306.01708): trim, elect a sign, average those that agree with it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from models.merge.vectors import Part, Vectors, summed
from squeeze.steps.merging import TIES

HALF = 1 << 16


def merge(step: TIES, vectors: Vectors) -> Iterator[Part]:
    """The disjoint mean of trimmed task vectors, part by part.

    Source: arXiv 2306.01708 §4, algorithm 1. Trim: of each τᵢ the `density` share of largest magnitude stays, with
    those that are as large as its smallest. Elect: γ = sgn(Σ wᵢ·τ̂ᵢ). Merge: the mean of the τ̂ᵢ whose sign is γ, in
    which each counts by its weight. Differs: trimmed over each tensor and not over all of them in a row, so that
    tensors stream; and where what is left cancels to exactly 0, the authors' code takes the sign that most elements of
    the whole model have, here nothing is added.
    """
    w = vectors.weights.unsqueeze(1)
    smallest = thresholds(vectors, max(1, round(step.density * vectors.elements))).unsqueeze(1)  # (n, 1)
    for T in vectors.walk():
        kept = torch.where(T.abs() >= smallest, T, 0.0)
        elected = torch.sign(summed(vectors.weights, kept))  # (k,)
        used = (torch.sign(kept) == elected) & (kept != 0)
        total = (w * used).sum(dim=0)
        merged = torch.where(total > 0, (w * kept * used).sum(dim=0) / total, 0.0)
        yield Part(merged, T, kept, used)


def thresholds(vectors: Vectors, count: int) -> Tensor:
    """The `count`-th largest magnitude of each task vector, exactly, (n,) float32. 1 ≤ count ≤ elements.

    The bits of floating-point numbers that aren't negative are in their order: one walk counts how often each upper
    half occurs, a second one the lower halves beside the upper half that is looked for. A sort, or `kthvalue`, would
    hold all of a tensor.
    """
    n = len(vectors.weights)
    wanted = torch.full((n,), count, dtype=torch.int64)
    upper, wanted = _place(_counted(vectors, [None] * n), wanted)
    lower, _ = _place(_counted(vectors, upper.tolist()), wanted)
    return (upper * HALF + lower).to(torch.int32).view(torch.float32)


def _counted(vectors: Vectors, uppers: list[int | None]) -> Tensor:
    """How often each half occurs, (n, 65536): the upper ones, or the lower ones beside a given upper one."""
    counts = torch.zeros(len(uppers), HALF, dtype=torch.int64)
    for T in vectors.walk():
        for n, (bits, upper) in enumerate(zip(T.abs().view(torch.int32), uppers, strict=True)):
            halves = bits >> 16
            counts[n] += torch.bincount(halves if upper is None else bits[halves == upper] & (HALF - 1), minlength=HALF)
    return counts


def _place(counts: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(the half in which the wanted-th largest lies, which one of those in it that is), (n,) each."""
    above = counts.flip(1).cumsum(1).flip(1)  # (n, 65536): as large or larger
    place = (above >= wanted.unsqueeze(1)).sum(dim=1) - 1
    larger = above.gather(1, place.unsqueeze(1)) - counts.gather(1, place.unsqueeze(1))
    return place, wanted - larger.squeeze(1)
