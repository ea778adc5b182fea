"""QLoRA (arXiv 2305.14314): LoRA beside weights that are rounded while they are loaded, and stay so."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from models.checkpoint import SourceModel
from models.finetune import lora
from models.finetune.lora import Merged
from models.finetune.peft_adapter import adapter_of, write
from models.formats.bitsandbytes import KERNEL_ROWS
from models.frame import Frame
from models.normal_float import BLOCK
from models.quantized import Site
from models.resources import map_large_memory
from models.train.scoring import own
from squeeze.errors import FormatUnfit
from squeeze.finetuning import QLoRA

__all__ = ["Merged", "adapter_of", "finetune", "load", "sites_of", "start_at_what_is_lost", "write"]


def sites_of(frame: Frame, step: QLoRA) -> list[Site]:
    """The layers that get an adapter, in the model's order; raises FormatUnfit where bitsandbytes can't compute one of
    the model's in nf4.
    """
    for site in [site for n in range(frame.count) for site in frame.sites(n)]:
        if step.base == "nf4" and (site.columns % BLOCK or site.rows % KERNEL_ROWS):
            raise FormatUnfit(
                f"bitsandbytes computes nf4 layers on CPUs only with inputs in {BLOCK}s and outputs in "
                f"{KERNEL_ROWS}s; {site.name} has {site.columns} and {site.rows}: take base int8",
                param="base",
            )
    return lora.sites_of(frame, step)


def load(path: Path, step: QLoRA, dtype: torch.dtype, device: torch.device) -> Any:
    """The model with its linears rounded, but for the output head; nothing of it learns.

    transformers rounds each as it reads it: in memory there are the codes and one weight in 16 or 32 bits.
    """
    settings = BitsAndBytesConfig(**step.base_settings(str(dtype).removeprefix("torch.")))
    map_large_memory()
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, quantization_config=settings, device_map={"": str(device)}, trust_remote_code=False
    )
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16 bitsandbytes 0.50 packs the codes anew at the first look at the held-out loss,
            # for a product that has no gradient: what learns in the blocks before would silently stay as it is.
            module.support_avx512bf16_for_cpu = False
    return model.eval().requires_grad_(False)


def finetune(model: Any, step: QLoRA, names: Sequence[str]) -> Any:
    """As `lora.finetune`, of a model that `load` made."""
    return lora.beside(model, step, names, True)


@torch.no_grad()
def start_at_what_is_lost(model: Any, step: QLoRA, source: SourceModel, sites: Sequence[Site]) -> None:
    """Has the product of the narrow matrices of every layer begin as the best approximation, of their rank, of what
    rounding took from its weight.

    Source: arXiv 2310.08659, algorithm 1 with T = 1, so that the base is that of anyone who rounds the weights to nf4.
    Differs: both matrices are divided by the root of the scale that their product is multiplied by. peft's own
    `replace_lora_weights_loftq` leaves the scale out, and needs a GPU.
    """
    for site in sites:
        layer = own(model).get_submodule(site.name)
        base = layer.get_base_layer()
        W = source.tensor(source.module_key(site.name, "weight")).to(base.weight.device, torch.float32)
        lost = (W.t() if site.transposed else W) - dequantize_4bit(base.weight.data, base.weight.quant_state).float()
        U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
        share = (S[: step.rank] / layer.scaling["default"]).sqrt()  # (r,)
        kept = len(share)  # fewer than the rank where the layer is narrower
        layer.lora_A["default"].weight[:kept] = share.unsqueeze(1) * Vh[:kept]  # (r, in)
        layer.lora_B["default"].weight[:, :kept] = U[:, :kept] * share  # (out, r)
