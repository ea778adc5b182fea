"""A model whose linears keep their weights as packed codes, for adapters to stand beside."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.files.checkpoint import SourceModel
from models.formats.packing import pack, unpack
from models.streaming.frame import Frame
from models.weights.codes import Codes
from models.weights.quantized import QuantizedModel

BAND_WEIGHTS = 1 << 22  # that are restored together: what stands between codes and weights takes nine bytes each


def load(source: SourceModel, codes: QuantizedModel, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with the linears that have codes packed; the rest in `dtype`. Nothing of it learns."""
    frame = Frame(source, dtype, device)
    for site in codes.sites.values():
        linear, own = frame.module(site), cast(Codes, codes.codes(site.name))
        own = Codes(**{part: one.to(device) for part, one in own.tensors().items()}, scheme=own.scheme)
        frame.put(site, PackedLinear(own, cast(nn.Parameter | None, linear.bias), dtype))
    return frame.loaded()


class PackedLinear(nn.Linear):
    """Stands where a linear stood, and multiplies by the weight that its codes name, which is made again for every
    product, forwards and backwards. Nothing of it learns. For peft it is a linear like any other.

    words: (out, in·bits/32) int32, as GPTQ's files have them but along the outputs. scale: (out, groups) float16.
    """

    words: Tensor
    scale: Tensor

    def __init__(self, codes: Codes, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        """codes: on a grid that is symmetric. dtype: of the product."""
        nn.Module.__init__(self)  # that of a linear would make a weight
        assert codes.symmetric, "no zero points are kept"
        self.out_features, self.in_features = codes.codes.shape
        self.scheme, self.dtype = codes.scheme, dtype
        self.register_parameter("bias", bias)
        self.register_buffer("words", pack(codes.codes, codes.bits))
        self.register_buffer("scale", codes.scale.to(torch.float16))  # exact

    @property
    def weight(self) -> Tensor:  # type: ignore[override] # of which nothing is kept
        """(out, in) in the type of the product, as a consumer computes it."""
        W = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=self.words.device)
        rows = max(1, BAND_WEIGHTS // self.in_features)
        for start in range(0, self.out_features, rows):
            part = slice(start, start + rows)
            codes, scale = unpack(self.words[part], self.scheme.bits, self.in_features), self.scale[part].float()
            middle = torch.full_like(scale, 2 ** (self.scheme.bits - 1), dtype=torch.uint8)
            W[part] = Codes(codes, scale, middle, self.scheme).dequantize(self.dtype)
        return W

    def forward(self, input: Tensor) -> Tensor:
        """input: (…, in). Returns (…, out) in the type of the product."""
        y: Tensor = _Product.apply(input.to(self.dtype), self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(self.dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ, of which nothing is kept for the backward pass: W is made again, and x has no gradient to give."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: PackedLinear) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.linear.weight, None
