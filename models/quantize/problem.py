"""What a method is given for the linears that read one input, and what it answers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.streaming.statistics import Statistics
from models.weights.codes import Encoded
from squeeze.steps.schemes import Scheme

MANY_ZEROS = 0.05  # of a weight: then they are taken for pruned, and stay


def pruned(W: Tensor) -> Tensor | None:
    """True for the zeros of a weight, (out, in) bool, where there are so many that somebody wanted them."""
    zeros = W == 0
    return zeros if int(zeros.sum()) >= MANY_ZEROS * W.numel() else None


@dataclass(frozen=True)
class Problem:
    """Linears that read the same input and are stored alike, joined: their rows one under the other.

    W: (out, in) float32, the method's own. statistics: of the calibration inputs; None where the method looks at no
    data. dtype: of the model, which bounds what scales can be stored. names: of the linears, with the rows of each.
    ties: (in,) int64, of each input column the output of the producer that it comes from, where several columns come
    from one (grouped-query attention repeats its values); they have to share a scale. None: each its own.
    gradients: of each linear (n, out) float32, random sums of the gradients at its outputs, whose second moment is
    theirs; None where the method asks for none.
    """

    W: Tensor
    statistics: Statistics | None
    scheme: Scheme
    dtype: torch.dtype
    names: tuple[str, ...] = ()
    heights: tuple[int, ...] = ()
    ties: Tensor | None = None
    gradients: tuple[Tensor, ...] | None = None

    def each(self, joined: Tensor) -> tuple[Tensor, ...]:
        """The rows of each linear, of a tensor with those of all."""
        return torch.split(joined, list(self.heights) or [len(joined)])

    @property
    def group_size(self) -> int:
        """Input columns of one scale."""
        return self.scheme.columns(self.W.shape[1])


@dataclass(frozen=True)
class Solution:
    """encoded: of all rows. damping: share of the mean diagonal that was added in the end. escalations: times that it
    had to be raised. instead: what did the work where it was not the step's own method, with the reason.
    """

    encoded: Encoded
    damping: float | None = None
    escalations: int = 0
    instead: str | None = None
