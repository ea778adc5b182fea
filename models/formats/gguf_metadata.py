"""The settings of a model as llama.cpp reads them: sizes, heads, norms, rotary positions, from the model's config."""

import math
from typing import Any

import gguf
import torch
from gguf import GGUFWriter
from torch import Tensor

from models.formats.gguf_families import Family, heads_of, rope_of


def write_settings(writer: GGUFWriter, config: Any, family: Family) -> None:
    """Adds every key that llama.cpp asks for. config: as transformers completes it."""
    heads = heads_of(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(_feed_forward(config))
    writer.add_head_count(heads.queries)
    writer.add_head_count_kv(heads.keys)
    writer.add_key_length(heads.size)
    writer.add_value_length(heads.size)
    writer.add_vocab_size(config.vocab_size)
    _write_norms(writer, config)
    _write_positions(writer, config, heads.size)
    _write_particulars(writer, config)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if family.arch == gguf.MODEL_ARCH.FALCON:
        writer.add_tensor_data_layout("jploski")


def extra_tensors(config: Any) -> dict[str, Tensor]:
    """Tensors that no checkpoint has: what some models scale their rotary frequencies by, float32."""
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    size = _rotated(config, heads_of(config).size)
    if kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope, size)}
    if kind == "longrope":
        return {
            f"rope_factors_{name}.weight": torch.tensor(rope[f"{name}_factor"], dtype=torch.float32)
            for name in ("long", "short")
        }
    return {}


def _context(config: Any) -> int:
    """Positions for which llama.cpp computes what transformers does: it has no sliding window for these families."""
    positions = config.seq_length if config.model_type == "bloom" and hasattr(config, "seq_length") else None
    positions = positions or getattr(config, "max_position_embeddings", None) or 2048
    window = getattr(config, "sliding_window", None)
    if config.model_type in ("mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "qwen2_moe", "starcoder2") and window:
        sliding = getattr(config, "use_sliding_window", True)
        positions = min(positions, window) if sliding else positions
    return int(positions)


def _feed_forward(config: Any) -> int:
    if config.model_type == "bloom":
        return int(4 * config.hidden_size)
    own = {"falcon": "ffn_hidden_size", "gpt2": "n_inner"}.get(config.model_type, "intermediate_size")
    return int(getattr(config, own) or 4 * config.hidden_size)


def _write_norms(writer: GGUFWriter, config: Any) -> None:
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        return
    for name in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"):
        if hasattr(config, name):
            writer.add_layer_norm_eps(getattr(config, name))
            return
    writer.add_layer_norm_eps(1e-5)  # OLMo's, which no config names


def _rotated(config: Any, head_size: int) -> int:
    """Rows of a head that are rotated."""
    share = rope_of(config).get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return int(head_size * share)


def _write_positions(writer: GGUFWriter, config: Any, head_size: int) -> None:
    rope = rope_of(config)
    if "rope_theta" not in rope:
        return
    writer.add_rope_dimension_count(_rotated(config, head_size))
    writer.add_rope_freq_base(rope["rope_theta"])
    local = (config.rope_parameters or {}).get("sliding_attention")
    if local:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )
        for key, add in (
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(key) is not None:
                add(rope[key])
    if kind == "longrope":
        before = rope["original_max_position_embeddings"]
        stretch = config.max_position_embeddings / before
        grown = math.sqrt(1 + math.log(stretch) / math.log(before)) if stretch > 1 else 1.0
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(before)
        writer.add_rope_scaling_attn_factors(rope.get("attention_factor") or grown)


def _llama3_factors(rope: dict[str, Any], size: int) -> Tensor:
    """By what each frequency is divided (Llama 3.1): long waves by the factor, short ones by 1, a ramp between."""
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    waves = 2 * math.pi / frequencies
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    before = rope["original_max_position_embeddings"]
    smooth: Tensor = ((before / waves - low) / (high - low)).clamp(0, 1)
    return torch.reciprocal((1 - smooth) / factor + smooth)


def _write_experts(writer: GGUFWriter, config: Any) -> None:
    writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _write_particulars(writer: GGUFWriter, config: Any) -> None:
    kind = config.model_type
    if kind in ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe"):
        _write_experts(writer, config)
    if kind == "stablelm":
        writer.add_parallel_residual(config.use_parallel_residual)
    if kind == "cohere":
        writer.add_logit_scale(config.logit_scale)
    if kind == "gpt_neox":
        writer.add_parallel_residual(config.use_parallel_residual)
    if kind == "phi3":
        writer.add_sliding_window(0)  # says that there is none
        if "original_max_position_embeddings" not in rope_of(config):
            writer.add_rope_scaling_orig_ctx_len(config.max_position_embeddings)
    if kind in ("gemma2", "gemma3_text", "olmo3"):
        writer.add_sliding_window(config.sliding_window)
    if kind == "gemma2" and config.attn_logit_softcapping:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if kind in ("gemma2", "gemma3_text") and config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if kind in ("olmo", "olmoe") and config.clip_qkv:
        writer.add_clamp_kqv(config.clip_qkv)
    if kind == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
