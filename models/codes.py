"""What a quantization method hands to a format: integer codes, scales and zero points of one linear layer.

Neutral of any file layout. The scales are already what a format can store, so that the weight that the engine measured
is the weight that a consumer computes.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codes:
    """One quantized linear layer, rows = outputs.

    codes: (out, in) uint8, 0 … 2^bits − 1.
    scale: (out, groups) float32, each value exact in float16 and, where the model is bfloat16, in bfloat16 too.
    zero: (out, groups) uint8, 1 … 2^bits − 1 (GPTQ's layout stores one less, and can't store −1); 2^(bits−1) everywhere
    when symmetric.
    group_size: input columns that share a scale; equal to `in` for one scale a row.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group_size: int
    symmetric: bool

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight that a consumer computes, (out, in): (codes − zero) · scale, multiplied in `dtype`."""
        rows, columns = self.codes.shape
        grouped = self.codes.view(rows, -1, self.group_size)  # (out, groups, group_size)
        centred = grouped.to(torch.int16) - self.zero.to(torch.int16).unsqueeze(-1)
        return (centred.to(dtype) * self.scale.to(dtype).unsqueeze(-1)).view(rows, columns)

    def cpu(self) -> "Codes":
        """The same in host memory."""
        return replace(self, codes=self.codes.cpu(), scale=self.scale.cpu(), zero=self.zero.cpu())
