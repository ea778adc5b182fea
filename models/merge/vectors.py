"""What a method of merging is given, and what it makes of it: the task vectors of one tensor, part by part.

A task vector is what finetuning added to a tensor: τ = θ − θ₀ (arXiv 2212.04089 §2). Only as many elements as fit in a
part are in memory, whatever the size of the tensor; a method that has to look at all of them first goes through the
parts more than once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Vectors:
    """Of one tensor, n of them.

    weights: (n,) float32. elements: of the tensor. walk: goes through all parts, (n, k) float32 each in memory of its
    own, the same ones in the same order each time. seeds: of what is drawn, one for each.
    """

    weights: Tensor
    elements: int
    walk: Callable[[], Iterator[Tensor]]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """What a method makes of a part.

    merged: (k,) float32, not scaled yet. vectors: (n, k), as they came. kept: (n, k), what is left of them once they
    were trimmed or dropped. used: (n, k) bool, the elements that `merged` was made of.
    """

    merged: Tensor
    vectors: Tensor
    kept: Tensor
    used: Tensor


def summed(weights: Tensor, vectors: Tensor) -> Tensor:
    """Σ wᵢ·τᵢ, (k,). weights: (n,). vectors: (n, k)."""
    return (weights.unsqueeze(1) * vectors).sum(dim=0)
