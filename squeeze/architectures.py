"""Which architectures (`model_type` of config.json) can be compressed, and which formats can hold each; no torch."""

from squeeze.steps import Format

# gptq in transformers 5.23, by trying it: the weights of experts, of Falcon's own linears and of Conv1D are not filled
# from the files and keep what they were drawn as, GPT-BigCode looks at a weight that is packed, and optimum does not
# find MPT's blocks.
HELD_BY: dict[str, tuple[Format, ...]] = {
    "bloom": ("compressed-tensors", "gptq", "bitsandbytes", "safetensors", "gguf"),
    "codegen": ("compressed-tensors", "gptq", "bitsandbytes", "safetensors"),
    "cohere": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf"),
    "cohere2": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors"),
    "deepseek_v2": ("compressed-tensors", "safetensors"),
    "deepseek_v3": ("compressed-tensors", "safetensors"),
    "falcon": ("compressed-tensors", "safetensors", "gguf"),
    "gemma": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf"),
    "gemma2": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf"),
    "gemma3_text": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf"),
    "glm": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors"),
    "glm4": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors"),
    "gpt2": ("compressed-tensors", "bitsandbytes", "safetensors", "onnx", "gguf"),
    "gpt_bigcode": ("compressed-tensors", "bitsandbytes", "safetensors"),
    "gpt_neox": ("compressed-tensors", "gptq", "bitsandbytes", "safetensors", "gguf"),
    "gptj": ("compressed-tensors", "gptq", "bitsandbytes", "safetensors"),
    "granite": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf"),
    "llama": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "onnx", "gguf"),
    "mistral": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf"),
    "mixtral": ("compressed-tensors", "safetensors", "gguf"),
    "mpt": ("compressed-tensors", "bitsandbytes", "safetensors"),
    "nemotron": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf"),
    "olmo": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf"),
    "olmo2": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf"),
    "olmo3": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf"),
    "olmoe": ("compressed-tensors", "safetensors", "gguf"),
    "opt": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "onnx"),
    "phi": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf"),
    "phi3": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf"),
    "qwen2": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "onnx", "gguf"),
    "qwen2_moe": ("compressed-tensors", "safetensors", "gguf"),
    "qwen3": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf"),
    "qwen3_moe": ("compressed-tensors", "safetensors", "gguf"),
    "smollm3": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf"),
    "stablelm": ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "gguf"),
    "starcoder2": ("compressed-tensors", "gptq", "bitsandbytes", "safetensors", "gguf"),
}

ARCHITECTURES: tuple[str, ...] = tuple(HELD_BY)
