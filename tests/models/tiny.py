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
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from models.texts.generic import standard_library

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KEY_VALUE_HEADS, VOCABULARY, POSITIONS = 128, 256, 2, 4, 2, 512, 128
END_OF_TEXT = "<|endoftext|>"

# Larger than the usual 0.02, so that the logits differ from uniform and errors show in the perplexity.
SPREAD = 0.1

USUAL: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "max_position_embeddings": POSITIONS,
}
WIDE_HEADS: dict[str, Any] = {"head_dim": HIDDEN // HEADS}
# One block looks back over a window, the other over everything.
ALTERNATING: dict[str, Any] = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
OLD_NAMES: dict[str, Any] = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
MIXTURE: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": INTERMEDIATE}
# The first block is dense, the second a mixture; attention goes through latents of fewer dimensions.
LATENT: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": INTERMEDIATE,
    "q_lora_rank": HIDDEN,
    "kv_lora_rank": HIDDEN,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "num_key_value_heads": HEADS,
}

# What each family's config says.
FIELDS: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS},
    "codegen": OLD_NAMES | {"rotary_dim": 16},
    "cohere": USUAL | {"logit_scale": 0.25},
    "cohere2": USUAL | WIDE_HEADS | ALTERNATING | {"logit_scale": 0.25},
    "deepseek_v2": USUAL | LATENT | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": USUAL | LATENT,
    "falcon": USUAL | {"num_kv_heads": 2, "new_decoder_architecture": True},
    "gemma": USUAL | WIDE_HEADS,
    "gemma2": USUAL | WIDE_HEADS | ALTERNATING | {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0},
    "gemma3_text": USUAL | WIDE_HEADS | ALTERNATING | {"query_pre_attn_scalar": 32},
    "glm": USUAL | WIDE_HEADS,
    "glm4": USUAL | WIDE_HEADS,
    "gpt2": OLD_NAMES | {"n_inner": INTERMEDIATE},
    "gpt_bigcode": OLD_NAMES | {"n_inner": INTERMEDIATE},
    "gpt_neox": {name: value for name, value in USUAL.items() if name != "num_key_value_heads"},
    "gptj": OLD_NAMES | {"n_inner": INTERMEDIATE, "rotary_dim": 16},
    "granite": USUAL
    | {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.1,
        "logits_scaling": 2.0,
    },
    "llama": USUAL,
    "mistral": USUAL,
    "mixtral": USUAL | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mpt": {"d_model": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": POSITIONS, "expansion_ratio": 2},
    "nemotron": USUAL,
    "olmo": USUAL | {"clip_qkv": 1.0},
    "olmo2": USUAL,
    "olmo3": USUAL | ALTERNATING,
    "olmoe": USUAL | MIXTURE,
    "opt": {
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "init_std": SPREAD,
    },
    "phi": USUAL,
    "phi3": USUAL,
    "qwen2": USUAL,
    "qwen2_moe": USUAL | MIXTURE | {"shared_expert_intermediate_size": INTERMEDIATE},
    "qwen3": USUAL | WIDE_HEADS,
    "qwen3_moe": USUAL | WIDE_HEADS | MIXTURE,
    "smollm3": USUAL | {"no_rope_layers": [1, 0]},
    "stablelm": USUAL | {"use_qkv_bias": True},
    "starcoder2": USUAL | {"sliding_window": 16},
}


def save(
    family: str,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    fused: bool = False,
    **changes: Any,
) -> Path:
    """Writes a random model and the tokenizer into `directory` (made if absent), and returns it.

    fused: experts as transformers keeps them, not as the Hub has them.
    """
    tokens = tokenizer()
    defaults = {
        "vocab_size": VOCABULARY,
        "initializer_range": SPREAD,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": None,
        "dtype": dtype,
    }
    config = AutoConfig.for_model(family, **(defaults | FIELDS[family] | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        stored = model.state_dict()
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if tensor.ndim == 1 and name in stored:
                    tensor.add_(torch.randn_like(tensor), alpha=SPREAD)
    directory.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(directory, save_original_format=not fused)
    tokens.save_pretrained(directory)
    return directory


FAMILIES: dict[str, Callable[..., Path]] = {family: functools.partial(save, family) for family in FIELDS}
gpt2, gpt_neox, llama = (FAMILIES[family] for family in ("gpt2", "gpt_neox", "llama"))

# One of each kind: what one of them comes through, its likes will too.
KINDS = ("bloom", "deepseek_v3", "falcon", "gemma2", "gpt2", "gpt_neox", "llama", "mixtral", "opt", "phi3")
MIXTURES = ("deepseek_v2", "deepseek_v3", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


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
