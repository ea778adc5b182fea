"""DARE (arXiv 2311.03099): drop elements of the task vectors at random, rescale the others, add them up."""

from collections.abc import Iterator

import torch

from models.merge.vectors import Part, Vectors, summed
from squeeze.steps.merging import DARE


def merge(step: DARE, vectors: Vectors) -> Iterator[Part]:
    """Σ wᵢ·(mᵢ ⊙ τᵢ)/(1 − p), part by part.

    Source: arXiv 2311.03099 §3, with task arithmetic. mᵢ: 0 with the probability p. Differs: drawn from a
    generator of its own for each tensor and task vector, on the CPU, so that a job that goes on draws the same.
    """
    draws = [torch.Generator().manual_seed(seed) for seed in vectors.seeds]
    for T in vectors.walk():
        stays = torch.stack([torch.rand(T.shape[1], generator=each) >= step.drop for each in draws])
        kept = T * stays / (1 - step.drop)
        yield Part(summed(vectors.weights, kept), T, kept, kept != 0)
