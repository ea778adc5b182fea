"""Weights as they are: in a 16-bit type, or in the model's own."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from squeeze.steps.schemes import Scheme

CHUNK = 1 << 22  # weights worked on at once, which bounds what lies beside the result
TYPES: dict[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Plain:
    """weight: (out, in), of a floating-point type."""

    weight: Tensor
    scheme: Scheme

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def rows(self, start: int, stop: int) -> "Plain":
        return replace(self, weight=self.weight[start:stop])

    def divided(self, by: Tensor, dtype: torch.dtype) -> "Plain":  # noqa: ARG002 - it has a type of its own
        return replace(self, weight=saturated(self.weight.float() / by.unsqueeze(-1), self.weight.dtype))


def saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to the nearest value of `dtype`; what lies beyond its range becomes its largest, of the same sign."""
    if values.dtype == dtype:
        return values
    result = torch.empty(values.shape, dtype=dtype, device=values.device)
    for part, place in zip(torch.split(values.reshape(-1), CHUNK), torch.split(result.view(-1), CHUNK), strict=True):
        place.copy_(within(part, dtype))
    return result


def within(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values, those beyond the range of `dtype` at its ends, in float32 at least: bfloat16 has no 65,504."""
    limit = torch.finfo(dtype)
    return values.to(torch.promote_types(values.dtype, torch.float32)).clamp(limit.min, limit.max)
