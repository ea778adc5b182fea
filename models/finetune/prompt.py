"""Prompt tuning (arXiv 2104.08691): embeddings of virtual tokens that stand before every input."""

from collections.abc import Sequence
from typing import Any

from peft import PromptTuningConfig

from models.finetune import peft_adapter
from models.finetune.peft_adapter import adapter_of, write
from models.streaming.frame import Frame
from models.weights.quantized import Site
from squeeze.steps.finetuning import Prompt

__all__ = ["adapter_of", "finetune", "sites_of", "write"]


def sites_of(frame: Frame, step: Prompt) -> list[Site]:  # noqa: ARG001 - whatever it says
    """No linear layer learns anything."""
    return []


def finetune(model: Any, step: Prompt, names: Sequence[str]) -> Any:  # noqa: ARG001 - there are none
    """The model with embeddings of virtual tokens, in float32, which alone learn."""
    config = PromptTuningConfig(
        num_virtual_tokens=step.virtual_tokens,
        prompt_tuning_init="SAMPLE_VOCAB" if step.init == "vocabulary" else "RANDOM",
        token_dim=model.get_input_embeddings().embedding_dim,
        # Of prefixes alone; peft asks the config for them by names that not every config has.
        num_layers=1,
        num_attention_heads=1,
        task_type="CAUSAL_LM",
    )
    return peft_adapter.wrapped(model, config)
