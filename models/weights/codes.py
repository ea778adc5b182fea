"""What a quantization method hands to a format: the stored weights of one linear layer, neutral of any file layout.

The scales are already what a format can store, so that the weight that the engine measured is the weight that a
consumer computes. One class a kind of element; `Scheme` tells them apart, `restored` brings them back from a file.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from models.ggml.blocks import Blocks
from models.weights.factored import Factored
from models.weights.float_codes import Float4Codes, Float8Codes
from models.weights.normal_float import NormalFloat
from models.weights.plain import Plain
from squeeze.steps.schemes import Scheme


class Encoded(Protocol):
    """The stored weights of one linear, rows = outputs."""

    @property
    def scheme(self) -> Scheme:
        """How they are stored."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight that a consumer computes, (out, in), in `dtype`."""

    def tensors(self) -> dict[str, Tensor]:
        """Its parts by name, as `restored` takes them."""

    def rows(self, start: int, stop: int) -> Self:
        """The same for some of the outputs."""

    def divided(self, by: Tensor, dtype: torch.dtype) -> Self:
        """The same with every output row divided by its entry in `by`, (out,) float32; dtype: of the model."""


@dataclass(frozen=True)
class Codes:
    """Integers: (codes − zero) · scale.

    codes: (out, in) uint8, 0 … 2^bits − 1.
    scale: (out, groups) float32, each value exact in float16 and, where the model is bfloat16, in bfloat16 too.
    zero: (out, groups) uint8, 1 … 2^bits − 1 (GPTQ's layout stores one less, and can't store −1); 2^(bits−1) everywhere
    when symmetric.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    scheme: Scheme

    @property
    def bits(self) -> int:
        return self.scheme.bits

    @property
    def group_size(self) -> int:
        """Input columns that share a scale; equal to `in` for one scale a row."""
        return self.scheme.columns(self.codes.shape[1])

    @property
    def symmetric(self) -> bool:
        return self.scheme.symmetric

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        rows, columns = self.codes.shape
        grouped = self.codes.view(rows, -1, self.group_size)  # (out, groups, group_size)
        centred = grouped.to(torch.int16) - self.zero.to(torch.int16).unsqueeze(-1)
        return (centred * self.scale.unsqueeze(-1)).to(dtype).view(rows, columns)  # rounded once

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale, "zero": self.zero}

    def rows(self, start: int, stop: int) -> "Codes":
        part = slice(start, stop)
        return replace(self, codes=self.codes[part], scale=self.scale[part], zero=self.zero[part])

    def divided(self, by: Tensor, dtype: torch.dtype) -> "Codes":
        return replace(self, scale=storable(self.scale / by.unsqueeze(-1), dtype))


KINDS: dict[str, Callable[..., Encoded]] = {
    "int": Codes,
    "float8": Float8Codes,
    "float4": Float4Codes,
    "nf4": NormalFloat,
    "float16": Plain,
    "bfloat16": Plain,
    "dense": Plain,
    "factored": Factored,
    "ggml": Blocks,
}
SMALLEST_SCALE = 2.0**-24  # float16's smallest positive number


def restored(tensors: dict[str, Tensor], scheme: Scheme) -> Encoded:
    """The inverse of `Encoded.tensors`."""
    return KINDS[scheme.element](**tensors, scheme=scheme)


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales rounded to what a format keeps: float16, and bfloat16 as well where the model is bfloat16. float32.

    None becomes zero; signs stay.
    """
    rounded = scale.to(torch.bfloat16).to(torch.float16) if dtype == torch.bfloat16 else scale.to(torch.float16)
    return rounded.float().abs().clamp_min(SMALLEST_SCALE).copysign(scale)
