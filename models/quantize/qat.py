"""Quantization-aware training (QAT): the whole model learns while its weights are rounded whenever they are used.

Learning starts from the codes of GPTQ or of rounding to nearest, and ends as codes of the same scheme. With `weights`
both the weights and their groups' scales learn: forwards a weight is the nearest point of its grid, backwards the
rounding is passed through, and the scale's gradient is that of the rounding error (LSQ, arXiv 1902.08153 §2.1; weights
and steps for language models as in LLM-QAT, arXiv 2305.17888 §2.2, which fixes the scales). With `scales` the codes
stay and the scales alone learn, for a quarter of the memory (EfficientQAT, arXiv 2407.11062 §3.3). We differ so: scales
learn as factors of what they were and weights in units of them, so that one learning rate fits every layer; scales are
rounded to what formats store in training too; nothing but codes is kept between the passes, since the rounded weights
are made again. Zero points stay as they began.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.quantize import gptq, rtn
from models.quantize.problem import Problem, Solution
from models.weights.codes import Codes, storable
from squeeze.steps.quantization import GPTQ, QAT, RTN

WEIGHT_RATE = 2.0  # by so much a weight moves, where the end of its group's grid moves by 1


def quantize(problem: Problem, step: QAT) -> Solution:
    """Codes of linears with one input, as those that the training starts from; of a start that learns block by block
    what that starts from itself. The pipeline has the start's own step make them; bits `auto` asks here.
    """
    begun = step.begun
    if isinstance(begun, GPTQ):
        return gptq.quantize(problem, begun)
    return rtn.quantize(problem, RTN(method="rtn"))


class Learner(nn.Module):
    """Stands where a linear stood, and multiplies by rounded weights that can learn.

    shift: (out, groups) float32, by how many points' distance the end of a grid moved since the start. places: (out,
    groups, group_size) float32, weights in units of their scale, over WEIGHT_RATE; None where codes stay.
    """

    codes: Tensor  # (out, groups, group_size) uint8, as long as they stay; else empty
    start: Tensor  # (out, groups) float32, the scales at the start
    zero: Tensor  # (out, groups) float32

    def __init__(
        self, codes: Codes, bias: nn.Parameter | None, dtype: torch.dtype, stored: torch.dtype, *, weights: bool
    ) -> None:
        """codes: to start from. dtype: of the product. stored: of the model, which bounds what scales can be stored.
        weights: whether they learn too, from the very points that the codes name.
        """
        super().__init__()
        self.scheme, self.dtype, self.stored, self.bias = codes.scheme, dtype, stored, bias
        grouped = codes.codes.view(len(codes.codes), -1, codes.group_size)
        self.register_buffer("start", codes.scale)
        self.register_buffer("zero", codes.zero.float())
        self.register_buffer("codes", grouped.new_empty(0) if weights else grouped)
        self.reach = 2.0 ** (self.scheme.bits - 1)  # points from the middle of a grid to its end
        self.shift = nn.Parameter(torch.zeros_like(codes.scale))
        self.places = nn.Parameter((grouped - self.zero.unsqueeze(-1)) / WEIGHT_RATE) if weights else None

    @property
    def weight(self) -> Tensor:
        """(out, in) in the type of the product, as a consumer computes it."""
        centred, scale = self._rounded()
        return (centred * scale.unsqueeze(-1)).to(self.dtype).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, in). Returns (…, out) in the type of the product."""
        y: Tensor = _Product.apply(x.to(self.dtype), self.shift, self.places, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(self.dtype)

    def learned(self) -> Codes:
        """What became of the codes, on the CPU."""
        centred, scale = self._rounded()
        codes = (centred + self.zero.unsqueeze(-1)).to(torch.uint8).flatten(1)
        return Codes(codes.cpu(), scale.cpu(), self.zero.to(torch.uint8).cpu(), self.scheme)

    def gradients(self, G: Tensor) -> tuple[Tensor, Tensor | None]:
        """(by `shift`, by `places`) of a loss with the gradient G by the weight, (out, in).

        A weight is its code times its scale. Rounding passes gradients on as if it were not there, but where the code
        is at an end of the grid and the weight beyond it.
        """
        centred, scale = self._rounded()
        G = G.float().view_as(centred)
        by_shift = (G * centred).sum(dim=-1).mul_(self.start / self.reach)
        if self.places is None:
            return by_shift, None
        inside = torch.round(self.places * WEIGHT_RATE).eq_(centred)
        return by_shift, (G * inside).mul_(scale.unsqueeze(-1) * WEIGHT_RATE)

    @torch.no_grad()
    def _rounded(self) -> tuple[Tensor, Tensor]:
        """Codes less their zero points, and scales, float32."""
        scale = storable(self.start * (1 + self.shift / self.reach).clamp_min(0), self.stored)
        zero = self.zero.unsqueeze(-1)
        if self.places is None:
            return self.codes - zero, scale
        return torch.clamp(torch.round(self.places * WEIGHT_RATE), -zero, 2**self.scheme.bits - 1 - zero), scale


class _Product(torch.autograd.Function):
    """x Wᵀ with the weight of a Learner, which is made again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, places: Tensor | None, learner: Learner) -> Tensor:  # noqa: ARG004 - so that they get gradients
        ctx.learner = learner
        ctx.save_for_backward(x)
        return F.linear(x, learner.weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        learner, (g,), (x,) = ctx.learner, gradients, ctx.saved_tensors
        by_x = g @ learner.weight if ctx.needs_input_grad[0] else None
        return by_x, *learner.gradients(g.flatten(0, -2).mT @ x.flatten(0, -2)), None
