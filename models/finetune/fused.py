"""What LoRA adds to a linear layer, in one product: peft's layer with fewer walks over its outputs."""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F


class FusedLinear(Linear):  # type: ignore[misc]  # peft has no types
    """peft's layer, whose forward it computes otherwise: W·x + B·(s·(A·x)) by one addition of a product.

    peft multiplies the product (tokens, out) by the scale s and adds it: four more walks over the layer's outputs in a
    step, with those of the backward pass. The scale is applied to what is between the two matrices, (tokens, rank).
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: (..., in). Returns (..., out) in the type of the layer's own outputs."""
        (name,) = self.active_adapters if len(self.active_adapters) == 1 else ("",)
        if args or kwargs or self.disable_adapters or self.merged or name not in self.lora_A:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        A: Tensor = self.lora_A[name].weight  # (r, in)
        B: Tensor = self.lora_B[name].weight  # (out, r)
        if hasattr(A, "ds_id"):  # DeepSpeed's: whole only while its own module is called
            return super().forward(x)  # type: ignore[no-any-return]
        scale, base, autocast = self.scaling[name], self.base_layer, torch.is_autocast_enabled(x.device.type)
        if type(base) is nn.Linear and not autocast and x.dtype == A.dtype == base.weight.dtype:
            flat: Tensor = _LowRank.apply(  # type: ignore[no-untyped-call]
                x.reshape(-1, x.shape[-1]), base.weight, base.bias, A, B, scale
            )
            return flat.view(*x.shape[:-1], len(B))
        outputs: Tensor = base(x)
        narrow = F.linear(self._cast_input_dtype(x, A.dtype), A) * scale
        if not autocast and outputs.dtype != narrow.dtype:
            return (outputs + F.linear(narrow, B)).to(outputs.dtype)
        added = torch.addmm(outputs.reshape(-1, len(B)), narrow.reshape(-1, len(A)), B.t())
        return added.view(outputs.shape).to(outputs.dtype)


class _LowRank(torch.autograd.Function):
    """x Wᵀ + b + s·x Aᵀ Bᵀ of weights that stay, with products of the narrow matrices written as a CPU is fast at.

    With rank 8 MKL takes two to five times as long for (tokens, in)ᵀ·(tokens, r) as for the same transposed, which
    autograd would not choose; and what goes back to x is added up within the product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """x: (tokens, in). W: (out, in). A: (r, in). B: (out, r). Returns (tokens, out)."""
        narrow = (A @ x.t()).mul_(scale)  # (r, tokens)
        ctx.save_for_backward(x, W, A, B, narrow)
        ctx.scale = scale
        return F.linear(x, W, b).addmm_(narrow.t(), B.t())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, narrow = ctx.saved_tensors
        (gradient,) = gradients  # (tokens, out)
        back = (B.t() @ gradient.t()).mul_(ctx.scale)  # (r, tokens)
        to_x = (gradient @ W).addmm_(back.t(), A) if ctx.needs_input_grad[0] else None
        return to_x, None, None, back @ x, (narrow @ gradient).t(), None


def fuse(model: Any) -> None:
    """Has the model's plain LoRA layers compute so: those without dropout and without a variant, such as DoRA."""
    for module in model.modules():
        if type(module) is not Linear or module.lora_variant:
            continue
        if all(isinstance(dropout, nn.Identity) for dropout in module.lora_dropout.values()):
            module.__class__ = FusedLinear
