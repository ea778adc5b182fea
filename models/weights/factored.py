"""The weight of a linear as a product of two thinner matrices."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.weights.plain import CHUNK, saturated
from squeeze.steps.schemes import Scheme


@dataclass(frozen=True)
class Factored:
    """left @ right. left: (out, rank), right: (rank, in), both of the model's type.

    What consumers of a plain model read is the product, multiplied in float32 and rounded to that type once; those that
    multiply by one factor after the other round less.
    """

    left: Tensor
    right: Tensor
    scheme: Scheme

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.merged().to(dtype)

    def merged(self) -> Tensor:
        """The weight of a plain linear, (out, in) in the type of the factors."""
        weight = torch.empty(len(self.left), self.right.shape[1], dtype=self.left.dtype, device=self.left.device)
        right = self.right.float()
        rows = max(1, CHUNK // self.right.shape[1])
        for some, place in zip(torch.split(self.left, rows), torch.split(weight, rows), strict=True):
            place.copy_(saturated(some.float() @ right, weight.dtype))
        return weight

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}

    def rows(self, start: int, stop: int) -> "Factored":
        """The second factor is a copy: files don't hold one tensor under two names."""
        return replace(self, left=self.left[start:stop], right=self.right.clone())

    def divided(self, by: Tensor, dtype: torch.dtype) -> "Factored":  # noqa: ARG002 - it has a type of its own
        return replace(self, left=saturated(self.left.float() / by.unsqueeze(-1), self.left.dtype))
