"""A model whose linears were factored, block by block: multiplied by one factor after the other, or multiplied out."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from models.factored import Factored
from models.frame import Frame
from models.quantized import QuantizedModel


class FactoredLinear(nn.Module):
    """Takes the place of a linear: (out, rank) times (rank, in)."""

    def __init__(self, rows: int, rank: int, columns: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(rows, rank, device="meta"), requires_grad=False)
        self.right = nn.Parameter(torch.empty(rank, columns, device="meta"), requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.right), self.left, self.bias)


class FactoredFrame(Frame):
    """As the frame of the model that was factored, with what became of its linears in their place.

    merged: they are plain linears, multiplied out.
    """

    def __init__(self, frame: Frame, made: QuantizedModel, *, merged: bool) -> None:
        super().__init__(frame.source, frame.dtype, frame.device)
        self._made, self._merged = made, merged
        for name, site in () if merged else made.sites.items():
            bias = cast(nn.Parameter | None, self.module(site).bias)
            self.put(site, FactoredLinear(site.rows, made.schemes[name].rank, site.columns, bias))

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        with super().block(index) as block:
            places = {self.blocks_path + f".{index}.{path}": module for path, module in block.named_modules()}
            own = {self.source.row.file_name(name): module for name, module in places.items()}
            for name, site in self._made.sites.items():
                if name not in own:
                    continue
                codes = self._made.codes(name)
                assert isinstance(codes, Factored), "all linears of such a step are factored"
                if self._merged:
                    weight = codes.dequantize(self.dtype)
                    tensors = {"weight": weight.T.contiguous() if site.transposed else weight}
                else:
                    tensors = {part: tensor.to(self.dtype) for part, tensor in codes.tensors().items()}
                for leaf, tensor in tensors.items():
                    own[name]._parameters[leaf] = nn.Parameter(tensor.to(self.device), requires_grad=False)
            yield block
