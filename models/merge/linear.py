"""Weighted sums of task vectors (arXiv 2212.04089); with weights that sum to 1, averages of models (2203.05482)."""

from collections.abc import Iterator

from models.merge.vectors import Part, Vectors, summed
from squeeze.steps.merging import Linear


def merge(step: Linear, vectors: Vectors) -> Iterator[Part]:  # noqa: ARG001 - the weights say it all
    """τ = Σ wᵢ·τᵢ, part by part. Source: arXiv 2212.04089 §2; the average of models is 2203.05482's uniform soup."""
    for T in vectors.walk():
        yield Part(summed(vectors.weights, T), T, T, T != 0)
