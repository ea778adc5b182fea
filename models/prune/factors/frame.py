"""A model whose linears were factored, block by block: multiplied by one factor after the other, or multiplied out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from models.streaming.frame import Frame
from models.weights.factored import Factored
from models.weights.quantized import QuantizedModel


class Narrowing(nn.Module):
    """The factor that inputs meet first, (rank, in). Linears that share it multiply by it once."""

    def __init__(self, rank: int, columns: int) -> None:
        super().__init__()
        self.right = nn.Parameter(torch.empty(rank, columns, device="meta"), requires_grad=False)
        self.last: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.last is None or self.last[0] is not x:
            self.last = x, nn.functional.linear(x, self.right)
        return self.last[1]


class FactoredLinear(nn.Module):
    """Takes the place of a linear: (out, rank) times (rank, in)."""

    def __init__(self, rows: int, narrowing: Narrowing, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(rows, len(narrowing.right), device="meta"), requires_grad=False)
        self.bias, self.narrowing = bias, narrowing

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.narrowing(x), self.left, self.bias)


class FactoredFrame(Frame):
    """As the frame of the model that was factored, with what became of its linears in their place.

    merged: they are plain linears, multiplied out.
    """

    def __init__(self, frame: Frame, made: QuantizedModel, *, merged: bool) -> None:
        super().__init__(frame.source, frame.dtype, frame.device)
        self._made, self._merged = made, merged
        shared: dict[str | None, Narrowing] = {}
        for name, site in () if merged else made.sites.items():
            scheme, bias = made.schemes[name], cast(nn.Parameter | None, self.module(site).bias)
            narrowing = shared.setdefault(scheme.basis, Narrowing(scheme.rank, site.columns))
            self.put(site, FactoredLinear(site.rows, narrowing, bias))

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
                module = own[name]
                if isinstance(module, FactoredLinear):
                    module.left = self._loaded(codes.left)
                    module.narrowing.right = self._loaded(codes.right)
                else:
                    weight = codes.merged()
                    module._parameters["weight"] = self._loaded(weight.T.contiguous() if site.transposed else weight)
            narrowings = [module for module in own.values() if isinstance(module, Narrowing)]
            handle = block.register_forward_pre_hook(lambda *_: _forget(narrowings))
            try:
                yield block
            finally:
                handle.remove()
                _forget(narrowings)

    def _loaded(self, tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.to(self.device, self.dtype), requires_grad=False)


def _forget(narrowings: Sequence[Narrowing]) -> None:
    """A block may be given the very tensor that it was given before."""
    for one in narrowings:
        one.last = None
