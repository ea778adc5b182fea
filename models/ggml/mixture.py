"""Which block type each tensor gets: llama.cpp's mixtures, by the names that its users know (`q4_k_m` and so on).

Source: llama-quant.cpp (`llama_tensor_get_type_impl`, `tensor_type_fallback`). Tensors that matter most (values of the
attention, the way out of the feed-forward part, the output head) get more bits, the more so in the first and last
layers.
"""

from dataclasses import dataclass

from models.ggml.types import Name, fits
from squeeze.steps.quantization import Mixture

BASE: dict[Mixture, Name] = {
    "q2_k": "q2_k",
    "q2_k_s": "q2_k",
    "q3_k_s": "q3_k",
    "q3_k_m": "q3_k",
    "q3_k_l": "q3_k",
    "q4_k_s": "q4_k",
    "q4_k_m": "q4_k",
    "q5_k_s": "q5_k",
    "q5_k_m": "q5_k",
    "q6_k": "q6_k",
}
# Of rows that super-blocks don't fill.
FALLBACKS: dict[Name, Name] = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
# `general.file_type` of the result (llama_ftype).
FILE_TYPES: dict[Mixture, int] = {
    "q2_k": 10,
    "q2_k_s": 21,
    "q3_k_s": 11,
    "q3_k_m": 12,
    "q3_k_l": 13,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
}


@dataclass(frozen=True)
class Build:
    """What of a model the rules ask for.

    architecture: llama.cpp's name. layers: decoder blocks. sharing: query heads that share a key/value head.
    experts: of a feed-forward part; 0 where it is dense. tied: the output head is the token embedding.
    """

    architecture: str
    layers: int
    sharing: int
    experts: int
    tied: bool


def block_type(mixture: Mixture, tensor: str, columns: int, build: Build) -> Name:
    """The type of a weight matrix. tensor: its name in the file, as `blk.0.attn_v.weight`; columns: its inputs."""
    name = _wanted(mixture, tensor, columns, build)
    return whole(name, columns)


def whole(name: Name, columns: int) -> Name:
    """The type itself, or what takes its place where blocks of it don't fill a row of so many columns."""
    for each in (name, FALLBACKS.get(name, name)):
        if fits(each, columns):
            return each
    return "f16"


def _wanted(mixture: Mixture, tensor: str, columns: int, build: Build) -> Name:
    base = BASE[mixture]
    if tensor == "output.weight" or (build.tied and tensor == "token_embd.weight"):
        return "q8_0" if build.architecture == "falcon" or not fits(base, columns) else "q6_k"
    layer = int(tensor.split(".")[1]) if tensor.startswith("blk.") else 0
    if any(part in tensor for part in ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")):
        return _of_values(mixture, base, layer, build)
    if "attn_k.weight" in tensor and build.experts == 8:
        return "q8_0"
    if "ffn_down" in tensor:
        return _of_way_down(mixture, base, layer, build)
    if "attn_output.weight" in tensor:
        return _of_attention_output(mixture, base, build)
    return base


def _of_values(mixture: Mixture, base: Name, layer: int, build: Build) -> Name:
    if build.experts == 8:
        return "q8_0"
    name = base
    if mixture == "q2_k":
        name = "q4_k" if build.sharing >= 4 else "q3_k"
    elif mixture == "q2_k_s" and build.sharing >= 4:
        name = "q4_k"
    elif mixture == "q3_k_m":
        name = "q5_k" if layer < 2 else "q4_k"
    elif mixture == "q3_k_l":
        name = "q5_k"
    elif mixture in ("q4_k_m", "q5_k_m") and _outer(layer, build.layers):
        name = "q6_k"
    elif mixture == "q4_k_s" and layer < 4:
        name = "q5_k"
    large = build.architecture in ("llama", "qwen2") and build.layers == 80 and build.sharing > 1
    return "q5_k" if large and name in ("q3_k", "q4_k") else name


def _of_way_down(mixture: Mixture, base: Name, layer: int, build: Build) -> Name:
    falcon, layers = build.architecture == "falcon", build.layers
    if mixture == "q2_k":
        return "q3_k"
    if mixture == "q2_k_s":
        return "q4_k" if layer < layers // 8 else base
    if mixture == "q3_k_m":
        if layer < layers // 16:
            return "q5_k"
        return "q4_k" if not falcon or _outer(layer, layers) else base
    if mixture == "q3_k_l":
        return "q4_k" if falcon else "q5_k"
    if mixture == "q4_k_m":
        if falcon:
            return "q6_k" if layer < layers // 16 else "q5_k" if _outer(layer, layers) else base
        return "q6_k" if _outer(layer, layers) else base
    if mixture == "q5_k_m":
        return "q6_k" if _outer(layer, layers) else base
    if mixture == "q4_k_s" and not falcon and layer < layers // 8:
        return "q5_k"
    return base


def _of_attention_output(mixture: Mixture, base: Name, build: Build) -> Name:
    if build.architecture == "falcon":
        return "q4_k" if mixture == "q3_k_l" else base
    if build.experts == 8:
        return "q5_k" if mixture in ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m") else base
    return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(mixture, base)  # type: ignore[return-value]


def _outer(layer: int, layers: int) -> bool:
    """The first and the last eighth, and every third in between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
