"""MagMax (arXiv 2407.06322): each element from the task vector in which it is largest."""

from collections.abc import Iterator

import torch

from models.merge.vectors import Part, Vectors
from squeeze.steps.merging import MagMax


def merge(step: MagMax, vectors: Vectors) -> Iterator[Part]:  # noqa: ARG001 - the weights say it all
    """τⱼ = wᵢ·τᵢⱼ of the i with the largest |wᵢ·τᵢⱼ|, the first of several, part by part.

    Source: arXiv 2407.06322 §4. Differs: task vectors may be weighted before they are compared; weights
    of 1, the default, give the paper's.
    """
    for T in vectors.walk():
        weighted = vectors.weights.unsqueeze(1) * T
        merged, winner = weighted[0], torch.zeros(T.shape[1], dtype=torch.int8)  # at most 32 of them
        for i in range(1, len(T)):  # argmax along the outer dimension takes ten times as long
            larger = weighted[i].abs() > merged.abs()
            merged, winner = torch.where(larger, weighted[i], merged), winner.masked_fill(larger, i)
        used = torch.stack([winner == i for i in range(len(T))]) & (T != 0)
        yield Part(merged, T, T, used)
