"""Which architectures (`model_type` of config.json) can be compressed, and which formats can hold each; no torch."""

from squeeze.errors import ArchitectureUnsupported
from squeeze.names import Format

# gptq in transformers 5.23, by trying it: the weights of experts, of Falcon's own linears and of Conv1D are not filled
# from the files and keep what they were drawn as, GPT-BigCode looks at a weight that is packed, and optimum does not
# find MPT's blocks. awq there: the same, and BLOOM, GPT-NeoX, GPT-J and StarCoder2 get activation functions with a
# scale that the files would have to hold. bitsandbytes replaces neither fused experts nor Falcon's linears. onnx:
# torch's exporter fails on MPT, and can't follow a router, which chooses as it runs.
HELD_BY: dict[str, tuple[Format, ...]] = {
    "bloom": ("compressed-tensors", "gptq", "bitsandbytes", "safetensors", "gguf", "onnx"),
    "codegen": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "onnx"),
    "cohere": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf", "onnx"),
    "cohere2": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "onnx"),
    "deepseek_v2": ("compressed-tensors", "safetensors"),
    "deepseek_v3": ("compressed-tensors", "safetensors"),
    "falcon": ("compressed-tensors", "safetensors", "gguf", "onnx"),
    "gemma": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf", "onnx"),
    "gemma2": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf", "onnx"),
    "gemma3_text": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf", "onnx"),
    "glm": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "onnx"),
    "glm4": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "onnx"),
    "gpt2": ("compressed-tensors", "bitsandbytes", "safetensors", "onnx", "gguf"),
    "gpt_bigcode": ("compressed-tensors", "bitsandbytes", "safetensors", "onnx"),
    "gpt_neox": ("compressed-tensors", "gptq", "bitsandbytes", "safetensors", "gguf", "onnx"),
    "gptj": ("compressed-tensors", "gptq", "bitsandbytes", "safetensors", "onnx"),
    "granite": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf", "onnx"),
    "llama": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "onnx", "gguf"),
    "mistral": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf", "onnx"),
    "mixtral": ("compressed-tensors", "safetensors", "gguf"),
    "mpt": ("compressed-tensors", "bitsandbytes", "safetensors"),
    "nemotron": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf", "onnx"),
    "olmo": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf", "onnx"),
    "olmo2": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf", "onnx"),
    "olmo3": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf", "onnx"),
    "olmoe": ("compressed-tensors", "safetensors", "gguf"),
    "opt": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "onnx"),
    "phi": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf", "onnx"),
    "phi3": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf", "onnx"),
    "qwen2": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "onnx", "gguf"),
    "qwen2_moe": ("compressed-tensors", "safetensors", "gguf"),
    "qwen3": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf", "onnx"),
    "qwen3_moe": ("compressed-tensors", "safetensors", "gguf"),
    "smollm3": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf", "onnx"),
    "stablelm": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf", "onnx"),
    "starcoder2": ("compressed-tensors", "gptq", "bitsandbytes", "safetensors", "gguf", "onnx"),
}

ARCHITECTURES: tuple[str, ...] = tuple(HELD_BY)

# Rotations can be folded into their weights: norms by the root mean square, each right before what reads it.
ROTATABLE: tuple[str, ...] = (
    "gemma",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmoe",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)


# transformers 5.23 has a model for sequence classification with `score` as its head.
CLASSIFIABLE: tuple[str, ...] = tuple(
    name for name in ARCHITECTURES if name not in ("codegen", "cohere", "cohere2", "granite", "olmoe")
)


def refuse_classifier(architectures: object) -> None:
    """Raises ArchitectureUnsupported where a config's `architectures` name a classifier, which has no output head."""
    named = architectures if isinstance(architectures, list) else []
    if any(isinstance(name, str) and name.endswith("ForSequenceClassification") for name in named):
        raise ArchitectureUnsupported(
            f"the model is a classifier ({named[0]}): it has a head for labels in place of the one for tokens, which "
            "every step works with. Name the model that it was made from",
            param="model",
        )


def refuse_unclassifiable(kind: object, param: str | None = None) -> None:
    """Raises ArchitectureUnsupported where transformers has no classifier of a family."""
    if kind not in CLASSIFIABLE:
        raise ArchitectureUnsupported(
            f"transformers has no {kind} model for sequence classification, which could be loaded with a "
            f"classification head. It has of {', '.join(CLASSIFIABLE)}",
            param=param,
        )


def refuse_unrotatable(kind: object, param: str) -> None:
    """Raises ArchitectureUnsupported where rotations can't be folded into the weights of a family."""
    if kind not in ROTATABLE:
        raise ArchitectureUnsupported(
            f"rotations can't be folded into {kind} models: that takes norms without a mean, each right before the "
            f"linears that read it. They can into {', '.join(ROTATABLE)}; leave `rotation` out",
            param=param,
        )
