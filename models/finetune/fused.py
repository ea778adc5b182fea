"""What LoRA adds to a linear layer, in one product: peft's layer with fewer walks over its outputs."""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn


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
        if hasattr(self.lora_A[name].weight, "ds_id"):  # DeepSpeed's: whole only while its own module is called
            return super().forward(x)  # type: ignore[no-any-return]
        A: Tensor = self.lora_A[name].weight  # (r, in)
        B: Tensor = self.lora_B[name].weight  # (out, r)
        outputs: Tensor = self.base_layer(x)
        narrow = nn.functional.linear(self._cast_input_dtype(x, A.dtype), A) * self.scaling[name]
        if not torch.is_autocast_enabled(x.device.type) and outputs.dtype != narrow.dtype:
            return (outputs + nn.functional.linear(narrow, B)).to(outputs.dtype)
        added = torch.addmm(outputs.reshape(-1, len(B)), narrow.reshape(-1, len(A)), B.t())
        return added.view(outputs.shape).to(outputs.dtype)


def fuse(model: Any) -> None:
    """Has the model's plain LoRA layers compute so: those without dropout and without a variant, such as DoRA."""
    for module in model.modules():
        if type(module) is not Linear or module.lora_variant:
            continue
        if all(isinstance(dropout, nn.Identity) for dropout in module.lora_dropout.values()):
            module.__class__ = FusedLinear
