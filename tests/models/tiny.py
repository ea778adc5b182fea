"""Tiny random models of every family, saved as the Hub has them: config, safetensors, a real BPE tokenizer.

`FAMILIES[name](directory, dtype=…, **changes)` writes one and returns its directory; `changes` are fields of its
config. The dimensions are multiples of 128, the head count differs from the key/value head count, and biases and norms
are random too, so that a forgotten bias or a swapped axis shows in the logits.
"""

import functools
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from models.text import standard_library

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KEY_VALUE_HEADS, VOCABULARY, POSITIONS = 128, 256, 2, 4, 2, 512, 128
END_OF_TEXT = "<|endoftext|>"

# Larger than the usual 0.02, so that the logits differ from uniform and errors show in the perplexity.
SPREAD = 0.1

GROUPED_QUERY: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "max_position_embeddings": POSITIONS,
}


def llama(directory: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    return save(LlamaForCausalLM, LlamaConfig, GROUPED_QUERY | changes, directory, dtype, seed)


def mistral(directory: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    return save(MistralForCausalLM, MistralConfig, GROUPED_QUERY | changes, directory, dtype, seed)


def qwen2(directory: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    return save(Qwen2ForCausalLM, Qwen2Config, GROUPED_QUERY | changes, directory, dtype, seed)


def qwen3(directory: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    fields = GROUPED_QUERY | {"head_dim": HIDDEN // HEADS} | changes
    return save(Qwen3ForCausalLM, Qwen3Config, fields, directory, dtype, seed)


def opt(directory: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    fields = {
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "init_std": SPREAD,
    }
    return save(OPTForCausalLM, OPTConfig, fields | changes, directory, dtype, seed)


def gpt2(directory: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    fields = {
        "n_embd": HIDDEN,
        "n_inner": INTERMEDIATE,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": POSITIONS,
    }
    return save(GPT2LMHeadModel, GPT2Config, fields | changes, directory, dtype, seed)


def gpt_neox(directory: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    fields = {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
    }
    return save(GPTNeoXForCausalLM, GPTNeoXConfig, fields | changes, directory, dtype, seed)


FAMILIES: dict[str, Callable[..., Path]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "opt": opt,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
}


def save(
    model_class: type[PreTrainedModel],
    config_class: type[PreTrainedConfig],
    fields: dict[str, Any],
    directory: Path,
    dtype: torch.dtype,
    seed: int,
) -> Path:
    """Writes a random model and the tokenizer into `directory` (made if absent), and returns it."""
    tokens = tokenizer()
    defaults = {
        "vocab_size": VOCABULARY,
        "initializer_range": SPREAD,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": None,
        "dtype": dtype,
    }
    config = config_class(**(defaults | fields))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=SPREAD)
    directory.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(directory)
    tokens.save_pretrained(directory)
    return directory


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly VOCABULARY tokens, trained on a little of the standard library."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator((text for _, text in islice(standard_library("train"), 8)), trainer)
    assert bare.get_vocab_size() == VOCABULARY
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=POSITIONS
    )
