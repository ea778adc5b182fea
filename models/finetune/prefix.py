"""Prefix tuning (arXiv 2101.00190): keys and values of virtual tokens that every block's attention looks back at."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PrefixTuningConfig

from models.finetune import peft_adapter
from models.finetune.peft_adapter import adapter_of, write
from models.streaming.frame import Frame
from models.weights.quantized import Site
from squeeze.errors import ArchitectureUnsupported
from squeeze.steps.finetuning import Prefix

__all__ = ["adapter_of", "finetune", "sites_of", "write"]


def sites_of(frame: Frame, step: Prefix) -> list[Site]:  # noqa: ARG001 - whatever it says
    """No linear layer learns anything. Raises ArchitectureUnsupported where keys and values differ in shape."""
    config = frame.model.config
    if getattr(config, "kv_lora_rank", None):
        raise _unfit(config.model_type, "makes keys and values of several widths from one compressed vector")
    return []


def finetune(model: Any, step: Prefix, names: Sequence[str]) -> Any:  # noqa: ARG001 - there are none
    """The model with keys and values of virtual tokens in every block, in float32, which alone learn.

    Differs from the paper: they learn as they are, not through a network that makes them (peft's `prefix_projection`).
    """
    layers, heads, width = _cached(model)
    config = PrefixTuningConfig(
        num_virtual_tokens=step.virtual_tokens,
        num_layers=layers,
        num_attention_heads=heads,
        token_dim=heads * width,
        num_transformer_submodules=1,
        task_type="CAUSAL_LM",
    )
    learner = peft_adapter.wrapped(model, config)
    if config.num_attention_heads != heads:  # peft takes the config's word, here and when it loads
        raise _unfit(
            model.config.model_type, f"keeps {heads} heads of keys, not the {config.num_attention_heads} it says"
        )
    return learner


@torch.no_grad()
def _cached(model: Any) -> tuple[int, int, int]:
    """(blocks, heads, width) of the keys and values that the model keeps, seen on one token."""
    token = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    cache = model(input_ids=token, use_cache=True).past_key_values
    shapes = {tuple(one.shape) for layer in cache.layers for one in (layer.keys, layer.values)}  # (1, heads, 1, width)
    if len(shapes) != 1:
        raise _unfit(model.config.model_type, f"keeps keys and values of {len(shapes)} shapes")
    _, heads, _, width = shapes.pop()
    return len(cache.layers), heads, width


def _unfit(model_type: str, why: str) -> ArchitectureUnsupported:
    return ArchitectureUnsupported(
        f"{model_type} {why}, for which peft has no prefix; take `prompt`, `lora` or `ia3`", param="method"
    )
