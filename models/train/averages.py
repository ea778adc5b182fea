"""A moving average of what learns, which is what is evaluated and kept."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Averages:
    """Of parameters, by name. decay: what the average so far counts after a step; None: there is no average."""

    def __init__(self, learning: Mapping[str, Tensor], decay: float | None) -> None:
        self._learning, self._decay = learning, decay
        self.tensors = copied(learning) if decay is not None else {}

    def add(self, number: int) -> None:
        """After a step, the first being 1."""
        for name, average in self.tensors.items():
            average.lerp_(self._learning[name].detach(), share(self._decay or 0.0, number))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the parameters are the averages."""
        learned = copied(self._learning) if self.tensors else {}
        put(self._learning, self.tensors)
        try:
            yield
        finally:
            put(self._learning, learned)


def share(decay: float, number: int) -> float:
    """What the weights after a step count in the average, the first step being 1: less and less until it is 1 − decay,
    so that a short training is not averaged with where it began (as TensorFlow's ExponentialMovingAverage with
    `num_updates`).
    """
    return 1 - min(decay, (1 + number) / (10 + number))


def copied(learning: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in learning.items()}


@torch.no_grad()
def put(learning: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Sets parameters to what there is for them."""
    for name, weight in weights.items():
        learning[name].copy_(weight)
