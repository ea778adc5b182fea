"""Weights that are zero where the model computes with them, and learn: what the loop asks of who zeroes them."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Masks(Protocol):
    """final: the steps after which as many weights are zero as in what is written; earlier ones tell nothing of it."""

    final: int

    def share(self, done: int) -> float | None:
        """Of zeros after so many steps; None where nothing zeroes any."""

    def in_place(self, done: int) -> AbstractContextManager[None]:
        """Within, the weights are as the model computes with them after so many steps."""

    def straight_through(self) -> None:
        """After a backward pass within `in_place`, outside of it: makes gradients of what learns of those that are
        there, which are of what the model computed with.
        """

    def settle(self) -> None:
        """Zeroes for good."""


class Unmasked:
    """The model computes with the weights as they are."""

    final = 1

    def share(self, done: int) -> None:  # noqa: ARG002 - whenever
        return None

    def in_place(self, done: int) -> AbstractContextManager[None]:  # noqa: ARG002 - whenever
        return nullcontext()

    def straight_through(self) -> None:
        return

    def settle(self) -> None:
        return


UNMASKED = Unmasked()
