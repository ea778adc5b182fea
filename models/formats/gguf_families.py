"""What llama.cpp makes of each family: its name there, how rows are ordered, what it takes for granted.

llama.cpp rotates neighbouring rows of Llama's queries and keys where transformers rotates a head's halves, and wants
the queries, keys and values of a fused layer one after the other, not head by head. Rows are therefore reordered; that
moves codes and scales, but changes none.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor

from models.files.checkpoint import SourceModel
from models.streaming.frame import weightless
from squeeze.errors import FormatUnfit

EXPERT = re.compile(r"\.layers\.(\d+)\..*\.experts\.(\d+)\.(\w+)\.weight$")

Refusal = str | None


@dataclass(frozen=True)
class Heads:
    """Attention heads: of queries, of keys and values, and the rows of one."""

    queries: int
    keys: int
    size: int


Order = Callable[[Heads], Tensor]


@dataclass(frozen=True)
class Family:
    """arch: llama.cpp's. orders: new order of the rows of modules by the end of their names.

    norm_shift: is added to norms' weights, which transformers stores less one. own_head: llama.cpp wants an output head
    in the file even where it is the embedding. misfit: what of a config llama.cpp computes otherwise.
    """

    arch: gguf.MODEL_ARCH
    orders: Mapping[str, Order]
    norm_shift: float = 0.0
    own_head: bool = False
    misfit: Callable[[Any], Refusal] = lambda _: None

    @property
    def name(self) -> str:
        """As files and llama.cpp's rules have it."""
        return gguf.MODEL_ARCH_NAMES[self.arch]

    def order(self, module: str, heads: Heads) -> Tensor | None:
        """Which row of a module comes where, (rows,) int64; None: as they are."""
        return next((make(heads) for end, make in self.orders.items() if module.endswith(end)), None)


def config_of(source: SourceModel) -> Any:
    """The model's config with every default filled in."""
    return weightless(source.path, torch.float32).config


def family_of(config: Any) -> Family:
    """Raises FormatUnfit where llama.cpp does not compute what this config says, naming what it can."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise FormatUnfit(
            f"gguf is written for {', '.join(sorted(FAMILIES))}; llama.cpp has nothing that we know to compute "
            f"{config.model_type} as transformers does",
            param="formats",
        )
    reason = family.misfit(config) or _rope_misfit(config)
    if reason:
        raise FormatUnfit(f"llama.cpp can't compute this model as transformers does: {reason}", param="formats")
    return family


def tensor_name(names: gguf.TensorNameMap, parameter: str, source: SourceModel, config: Any) -> str:
    """llama.cpp's name of a parameter; the same for all experts of a layer, whose weights it keeps in one tensor."""
    expert = EXPERT.search(parameter)
    if expert is not None:
        place = ("gate_proj", "up_proj", "down_proj")[source.row.expert.index(expert[3])]
        parameter = f"model.layers.{expert[1]}.mlp.experts.{place}.weight"
    for name in (parameter, parameter.removeprefix("transformer.")):
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is not None:
            return target
    raise FormatUnfit(
        f"llama.cpp has no place for the tensor {parameter} of a {config.model_type} model", param="formats"
    )


def heads_of(config: Any) -> Heads:
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    if config.model_type in ("bloom", "gpt2", "gpt_neox"):  # know no sharing, whatever else the config says
        keys = queries
    if config.model_type == "falcon":
        keys = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else queries
    size = getattr(config, "head_dim", None) or config.hidden_size // queries
    return Heads(queries, keys, size)


def _halves_to_pairs(count: int, size: int) -> Tensor:
    """Rows of a rotated head from (first half, second half) to pairs."""
    return torch.arange(count * size).view(count, 2, size // 2).transpose(1, 2).reshape(-1)


def _query_pairs(heads: Heads) -> Tensor:
    return _halves_to_pairs(heads.queries, heads.size)


def _key_pairs(heads: Heads) -> Tensor:
    return _halves_to_pairs(heads.keys, heads.size)


def _parts_together(heads: Heads) -> Tensor:
    """From (q, k, v) of the first head, of the second … to all q, all k, all v."""
    return torch.arange(heads.queries * 3 * heads.size).view(heads.queries, 3, heads.size).transpose(0, 1).reshape(-1)


def _shared_parts_together(heads: Heads) -> Tensor:
    """Falcon: from (its queries, k, v) of the first key/value head, of the second … to all q, all k, all v."""
    rows = (heads.queries + 2 * heads.keys) * heads.size
    groups = torch.arange(rows).view(heads.keys, heads.queries // heads.keys + 2, heads.size)
    return torch.cat([groups[:, :-2].reshape(-1), groups[:, -2].reshape(-1), groups[:, -1].reshape(-1)])


def _rope_misfit(config: Any) -> Refusal:
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    known = ("default", "linear", "yarn", "llama3", *(("longrope",) if config.model_type == "phi3" else ()))
    return None if kind in known else f"its rotary positions are scaled by {kind!r}"


def rope_of(config: Any) -> dict[str, Any]:
    """Parameters of the rotary positions, of full attention where layers differ; empty where there are none."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return dict(parameters.get("full_attention", parameters))


def _refuse_gpt2(config: Any) -> Refusal:
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        return "its attention is scaled by layer"
    return None if config.activation_function in ("gelu_new", "gelu_pytorch_tanh", "gelu") else "its activation"


def _refuse_neox(config: Any) -> Refusal:
    return None if config.hidden_act in ("gelu", "gelu_new", "gelu_fast") else f"its activation is {config.hidden_act}"


def _refuse_gated(config: Any) -> Refusal:
    return None if config.hidden_act in ("silu", "swish") else f"its activation is {config.hidden_act}"


def _refuse_plain(*activations: str) -> Callable[[Any], Refusal]:
    def misfit(config: Any) -> Refusal:
        if getattr(config, "qk_layernorm", False):
            return "it normalizes queries and keys"
        return None if config.hidden_act in activations else f"its activation is {config.hidden_act}"

    return misfit


def _refuse_mixture(normalized: bool) -> Callable[[Any], Refusal]:
    """normalized: whether the chosen experts' shares are made to sum to one."""

    def misfit(config: Any) -> Refusal:
        if config.norm_topk_prob != normalized:
            return f"norm_topk_prob is {config.norm_topk_prob}"
        if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
            return "some of its layers have no experts"
        return _refuse_gated(config)

    return misfit


def _refuse_olmoe(config: Any) -> Refusal:
    if config.num_key_value_heads != config.num_attention_heads:
        return "it normalizes keys that several queries share"
    return _refuse_mixture(normalized=False)(config)


def _refuse_smollm3(config: Any) -> Refusal:
    if list(config.no_rope_layers) != [int((n + 1) % 4 != 0) for n in range(config.num_hidden_layers)]:
        return "other layers than every fourth go without rotary positions"
    return "it has attention biases" if config.attention_bias else _refuse_gated(config)


def _refuse_stablelm(config: Any) -> Refusal:
    if config.qk_layernorm:
        return "it normalizes queries and keys"
    return _refuse_gated(config)


def _refuse_olmo3(config: Any) -> Refusal:
    full = [n for n, kind in enumerate(config.layer_types) if kind == "full_attention"]
    if full != list(range(3, config.num_hidden_layers, 4)):
        return "its layers do not alternate as llama.cpp supposes (one in 4 with full attention)"
    return _refuse_olmo2(config)


def _refuse_falcon(config: Any) -> Refusal:
    if config.alibi or not (config.parallel_attn or config.new_decoder_architecture):
        return "it has positions or blocks of Falcon's first models (alibi, no parallel attention)"
    return "its layers have biases" if config.bias else None


def _refuse_gemma(period: int, largest: int) -> Callable[[Any], Refusal]:
    """period: every so manieth layer attends to everything. largest: layers of the model that scales by other heads."""

    def misfit(config: Any) -> Refusal:
        divisor = config.hidden_size // config.num_attention_heads
        scalar = divisor if config.num_hidden_layers == largest else config.head_dim
        if config.query_pre_attn_scalar != scalar:
            return f"its attention is scaled by {config.query_pre_attn_scalar}, not by {scalar}"
        full = [n for n, kind in enumerate(config.layer_types) if kind == "full_attention"]
        if full != list(range(period - 1, config.num_hidden_layers, period)):
            return f"its layers do not alternate as llama.cpp supposes (one in {period} with full attention)"
        if config.hidden_activation not in ("gelu_pytorch_tanh", "gelu_new"):
            return f"its activation is {config.hidden_activation}"
        return None

    return misfit


def _refuse_olmo2(config: Any) -> Refusal:
    return "it has attention biases" if config.attention_bias else _refuse_gated(config)


def _refuse_phi3(config: Any) -> Refusal:
    window = config.sliding_window
    if window and window < config.max_position_embeddings and config.max_position_embeddings <= 4096:
        return "it has a sliding window, which llama.cpp leaves out"
    return _refuse_gated(config)


LLAMA: dict[str, Order] = {"self_attn.q_proj": _query_pairs, "self_attn.k_proj": _key_pairs}
FAMILIES: dict[str, Family] = {
    "llama": Family(gguf.MODEL_ARCH.LLAMA, LLAMA, misfit=_refuse_gated),
    "mistral": Family(gguf.MODEL_ARCH.LLAMA, LLAMA, misfit=_refuse_gated),
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2, {}, misfit=_refuse_gated),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3, {}, misfit=_refuse_gated),
    "gpt2": Family(gguf.MODEL_ARCH.GPT2, {}, misfit=_refuse_gpt2),
    "gpt_neox": Family(
        gguf.MODEL_ARCH.GPTNEOX, {"attention.query_key_value": _parts_together}, own_head=True, misfit=_refuse_neox
    ),
    "bloom": Family(gguf.MODEL_ARCH.BLOOM, {"self_attention.query_key_value": _parts_together}),
    "falcon": Family(
        gguf.MODEL_ARCH.FALCON, {"self_attention.query_key_value": _shared_parts_together}, misfit=_refuse_falcon
    ),
    "gemma2": Family(gguf.MODEL_ARCH.GEMMA2, {}, norm_shift=1.0, misfit=_refuse_gemma(2, 46)),
    "gemma3_text": Family(gguf.MODEL_ARCH.GEMMA3, {}, norm_shift=1.0, misfit=_refuse_gemma(6, 62)),
    "phi3": Family(gguf.MODEL_ARCH.PHI3, {}, misfit=_refuse_phi3),
    "olmo": Family(gguf.MODEL_ARCH.OLMO, LLAMA, misfit=_refuse_gated),
    "olmo2": Family(gguf.MODEL_ARCH.OLMO2, {}, own_head=True, misfit=_refuse_olmo2),
    "olmo3": Family(gguf.MODEL_ARCH.OLMO2, {}, own_head=True, misfit=_refuse_olmo3),
    "granite": Family(gguf.MODEL_ARCH.GRANITE, LLAMA, misfit=_refuse_gated),
    "gemma": Family(gguf.MODEL_ARCH.GEMMA, {}, norm_shift=1.0),
    "starcoder2": Family(gguf.MODEL_ARCH.STARCODER2, {}, misfit=_refuse_plain("gelu_pytorch_tanh", "gelu_new", "gelu")),
    "phi": Family(gguf.MODEL_ARCH.PHI2, {}, own_head=True, misfit=_refuse_plain("gelu_new", "gelu_pytorch_tanh")),
    "stablelm": Family(gguf.MODEL_ARCH.STABLELM, {}, own_head=True, misfit=_refuse_stablelm),
    "nemotron": Family(gguf.MODEL_ARCH.NEMOTRON, {}, norm_shift=1.0, own_head=True, misfit=_refuse_plain("relu2")),
    "cohere": Family(gguf.MODEL_ARCH.COMMAND_R, {}, misfit=_refuse_plain("silu")),
    "smollm3": Family(gguf.MODEL_ARCH.SMOLLM3, LLAMA, misfit=_refuse_smollm3),
    "mixtral": Family(gguf.MODEL_ARCH.LLAMA, LLAMA, misfit=_refuse_gated),
    "qwen3_moe": Family(gguf.MODEL_ARCH.QWEN3MOE, {}, own_head=True, misfit=_refuse_mixture(normalized=True)),
    "qwen2_moe": Family(gguf.MODEL_ARCH.QWEN2MOE, {}, own_head=True, misfit=_refuse_mixture(normalized=False)),
    "olmoe": Family(gguf.MODEL_ARCH.OLMOE, {}, own_head=True, misfit=_refuse_olmoe),
}
