"""Which architectures (`model_type` of config.json) can be compressed, and which formats can hold each; no torch."""

from squeeze.steps import Format

HELD_BY: dict[str, tuple[Format, ...]] = {
    "llama": ("compressed-tensors", "gptq"),
    "mistral": ("compressed-tensors", "gptq"),
    "qwen2": ("compressed-tensors", "gptq"),
    "qwen3": ("compressed-tensors", "gptq"),
    "opt": ("compressed-tensors", "gptq"),
    "gpt2": ("compressed-tensors",),  # transformers 5.23 can't load its Conv1D layers from gptq
    "gpt_neox": ("compressed-tensors", "gptq"),
}

ARCHITECTURES: tuple[str, ...] = tuple(HELD_BY)
