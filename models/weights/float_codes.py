"""Stored weights whose codes are small floating-point numbers: E4M3 with a scale a row, E2M1 in blocks.

Sources: Micikevicius et al., arXiv 2209.05433 §3 (E4M3: no infinities, largest 448); OCP Microscaling Formats v1.0 §5.3
(E2M1 and, of blocks of 32, the scale E8M0, a power of two); NVIDIA's NVFP4 (E2M1 in blocks of 16, an E4M3 scale a
block under one float32 scale).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from squeeze.steps.schemes import Scheme

LARGEST_E4M3 = 448.0
LARGEST_E2M1 = 6.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the low three bits of a code; the fourth is the sign
E8M0_BIAS = 127
MICROSCALING_BLOCK = 32  # what has a power of two as its scale; NVFP4's blocks are of 16


@dataclass(frozen=True)
class Float8Codes:
    """E4M3: codes · scale.

    codes: (out, in) float8_e4m3fn. scale: (out, 1) float32, exact in the model's dtype; the same in every row where the
    scheme's group is the whole tensor.
    """

    codes: Tensor
    scale: Tensor
    scheme: Scheme

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.codes.to(dtype).mul_(self.scale.to(dtype))

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale}

    def rows(self, start: int, stop: int) -> "Float8Codes":
        return replace(self, codes=self.codes[start:stop], scale=self.scale[start:stop])

    def divided(self, by: Tensor, dtype: torch.dtype) -> "Float8Codes":
        """Raises ValueError where one scale serves all rows."""
        if self.scheme.group_size == "tensor":
            raise ValueError("one scale for all rows can't take over a scale of each")
        return replace(self, scale=exact_in(self.scale / by.unsqueeze(-1), dtype))


@dataclass(frozen=True)
class Float4Codes:
    """E2M1 in blocks: E2M1[code] · scale.

    codes: (out, in) uint8, 0 … 15. exponents: (out, blocks) uint8 of blocks of 32, the scale is 2^(exponent − 127); of
    blocks of 16 float8_e4m3fn, and the scale is that divided by `divisor`, (1,) float32.
    """

    codes: Tensor
    scale: Tensor
    divisor: Tensor
    scheme: Scheme

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """By way of bfloat16, in which compressed-tensors unpacks, whatever the model's own type."""
        rows, columns = self.codes.shape
        values = e2m1(self.codes).view(rows, self.scale.shape[1], -1)
        return (values * self.real_scale.unsqueeze(-1)).view(rows, columns).to(torch.bfloat16).to(dtype)

    @property
    def real_scale(self) -> Tensor:
        """(out, blocks) float32: what a block's values are multiplied by."""
        if self.scheme.group_size == MICROSCALING_BLOCK:
            return power_of_two(self.scale)
        return self.scale.float() / self.divisor

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale, "divisor": self.divisor}

    def rows(self, start: int, stop: int) -> "Float4Codes":
        part = slice(start, stop)
        return replace(self, codes=self.codes[part], scale=self.scale[part], divisor=self.divisor.clone())

    def divided(self, by: Tensor, dtype: torch.dtype) -> "Float4Codes":  # noqa: ARG002 - as every kind has it
        """Raises ValueError: what these scales can be is too coarse to take over another."""
        raise ValueError("scales of four-bit floats can't take over a scale of each row")


def exact_in(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales rounded to a model's dtype, in which compressed-tensors keeps them, and at least the smallest normal one.

    scale: float32. Returns float32.
    """
    kept = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
    return scale.to(kept).float().clamp_min(torch.finfo(kept).tiny)


def to_e4m3(values: Tensor) -> Tensor:
    """The nearest E4M3 numbers, saturating. values: float32. Returns float8_e4m3fn."""
    return values.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)


def to_e2m1(values: Tensor) -> Tensor:
    """Codes of the nearest E2M1 numbers, saturating, ties to the even code. values: float32. Returns uint8."""
    magnitude = values.abs()
    code = torch.zeros_like(values, dtype=torch.uint8)
    for lower in range(len(E2M1) - 1):
        middle = (E2M1[lower] + E2M1[lower + 1]) / 2
        code += magnitude > middle if lower % 2 == 0 else magnitude >= middle
    return code | ((values < 0) & (code > 0)).to(torch.uint8) << 3  # no negative zero


def e2m1(codes: Tensor) -> Tensor:
    """The numbers that codes stand for, float32. codes: uint8, 0 … 15."""
    table = torch.tensor((*E2M1, *(-value for value in E2M1)), device=codes.device)
    return table[codes.int()]


def power_of_two(exponents: Tensor) -> Tensor:
    """E8M0 (uint8) as float32; the exponent 0 is 2^−127, below the smallest normal number."""
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - E8M0_BIAS)
