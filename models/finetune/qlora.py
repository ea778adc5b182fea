"""QLoRA (arXiv 2305.14314): LoRA beside weights that are rounded, by bitsandbytes while they are loaded or by GPTQ
before, and stay so.
"""

from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from models.files.checkpoint import SourceModel
from models.finetune import lora, packed
from models.finetune.lora import Merged
from models.finetune.peft_adapter import adapter_of, write
from models.formats.bitsandbytes import KERNEL_ROWS
from models.formats.fitness import refuse_torn_groups
from models.formats.packing import WORD_BITS
from models.resources import map_large_memory
from models.streaming.frame import Frame
from models.train.scoring import own
from models.weights.normal_float import BLOCK
from models.weights.quantized import QuantizedModel, Site
from squeeze.errors import FormatUnfit
from squeeze.shapes.architectures import HELD_BY
from squeeze.specs.bases import BITS, rounding
from squeeze.steps.finetuning import QLoRA

__all__ = ["Merged", "adapter_of", "finetune", "load", "sites_of", "start_at_what_is_lost", "write"]

GPTQ_UNIT = WORD_BITS // BITS  # codes of a word


def sites_of(frame: Frame, step: QLoRA) -> list[Site]:
    """The layers that get an adapter, in the model's order; raises FormatUnfit or GroupSizeIndivisible where the
    model's own can't be held as the base wants them.
    """
    sites = [site for n in range(frame.count) for site in frame.sites(n)]
    if step.base == "gptq":
        _refuse_unfit_for_gptq(frame, step, sites)
    for site in sites:
        if step.base == "nf4" and (site.columns % BLOCK or site.rows % KERNEL_ROWS):
            raise FormatUnfit(
                f"bitsandbytes computes nf4 layers on CPUs only with inputs in {BLOCK}s and outputs in "
                f"{KERNEL_ROWS}s; {site.name} has {site.columns} and {site.rows}: take base int8",
                param="base",
            )
    return lora.sites_of(frame, step)


def load(
    source: SourceModel, step: QLoRA, dtype: torch.dtype, device: torch.device, codes: QuantizedModel | None
) -> Any:
    """The model with its linears rounded, but for the output head; nothing of it learns. codes: of the linears, where
    they were found before.

    Where not, transformers rounds each as it reads it. In memory there are codes and one weight in 16 or 32 bits.
    """
    map_large_memory()
    if codes is not None:
        return packed.load(source, codes, dtype, device)
    told = step.base_settings(str(dtype).removeprefix("torch."))
    assert told is not None, "bitsandbytes is told what to round to"
    settings = BitsAndBytesConfig(**told)
    model = AutoModelForCausalLM.from_pretrained(
        source.path, dtype=dtype, quantization_config=settings, device_map={"": str(device)}, trust_remote_code=False
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


def _refuse_unfit_for_gptq(frame: Frame, step: QLoRA, sites: Sequence[Site]) -> None:
    kind = str(frame.source.config["model_type"])
    if "gptq" not in HELD_BY[kind]:
        raise FormatUnfit(f"gptq can't hold {kind} models: take base nf4 or int8", param="base")
    for site in sites:
        if site.rows % GPTQ_UNIT or site.columns % GPTQ_UNIT:
            raise FormatUnfit(
                f"gptq packs codes of {BITS} bits into words, so that a layer's inputs and outputs must be a multiple "
                f"of {GPTQ_UNIT}; {site.name} has {site.columns} and {site.rows}: take base int8",
                param="base",
            )
    beforehand = rounding(step, (site.columns for site in sites))
    assert beforehand is not None, "base gptq is rounded beforehand"
    refuse_torn_groups(sites, {site.name: beforehand.scheme() for site in sites})
