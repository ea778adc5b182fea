"""MagMax (arXiv 2407.06322): each element from the task vector in which it is largest."""

from collections.abc import Iterator

import torch

from models.merge.vectors import Part, Vectors
from squeeze.merging import MagMax


def merge(step: MagMax, vectors: Vectors) -> Iterator[Part]:  # noqa: ARG001 - the weights say it all
    """τⱼ = wᵢ·τᵢⱼ of the i with the largest |wᵢ·τᵢⱼ|, the first of several, part by part.

    Source: arXiv 2407.06322 §4. Differs: task vectors may be weighted before they are compared; weights
    of 1, the default, give the paper's.
    """
    for T in vectors.walk():
        weighted = vectors.weights.unsqueeze(1) * T
        winner = weighted.abs().argmax(dim=0, keepdim=True)  # (1, k)
        used = torch.zeros_like(T, dtype=torch.bool).scatter_(0, winner, value=True) & (T != 0)
        yield Part(weighted.gather(0, winner).squeeze(0), T, T, used)
