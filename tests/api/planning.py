"""Models of which a Hub has little more than the headers, for plans."""

import json

CONFIG = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 640, "max_position_embeddings": 512}


def headed(sides: dict[str, tuple[int, ...]]) -> bytes:
    """A header without tensors."""
    packed = json.dumps({name: {"dtype": "BF16", "shape": shape} for name, shape in sides.items()}).encode()
    return len(packed).to_bytes(8, "little") + packed


def safetensors(sides: dict[str, tuple[int, ...]]) -> bytes:
    header, at = {}, 0
    for name, shape in sides.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    packed = json.dumps(header).encode()
    return len(packed).to_bytes(8, "little") + packed + bytes(at)


def llama_shapes(blocks: int = 2) -> dict[str, tuple[int, ...]]:
    sides: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (1000, 256), "model.norm.weight": (256,)}
    for block in range(blocks):
        prefix = f"model.layers.{block}"
        sides[f"{prefix}.self_attn.q_proj.weight"] = (256, 256)
        sides[f"{prefix}.mlp.down_proj.weight"] = (256, 640)
        sides[f"{prefix}.input_layernorm.weight"] = (256,)
    return sides


LLAMA = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": safetensors(llama_shapes())}
SHARDED = {
    "config.json": LLAMA["config.json"],
    "a.safetensors": safetensors(dict(list(llama_shapes().items())[:3])),
    "b.safetensors": safetensors(dict(list(llama_shapes().items())[3:])),
    "model.safetensors.index.json": json.dumps({"weight_map": {"x": "b.safetensors", "y": "a.safetensors"}}).encode(),
}
KNOWN = json.dumps({**CONFIG, "vocab_size": 1000}).encode()
CONV = {"transformer.h.0.mlp.c_proj.weight": (96, 64), "wte.weight": (100, 64)}  # (in, out): 96 inputs
MODELS = {
    "org/llama": LLAMA,
    "org/sharded": SHARDED,
    "org/deep": {"config.json": KNOWN, "model.safetensors": safetensors(llama_shapes(4))},
    "org/shallow": {"config.json": KNOWN, "model.safetensors": safetensors(llama_shapes(2))},
    "org/gated": LLAMA,
    "org/unknown": {**LLAMA, "config.json": b'{"model_type": "mamba"}'},
    "org/classifier": {
        **LLAMA,
        "config.json": json.dumps({**CONFIG, "architectures": ["LlamaForSequenceClassification"]}).encode(),
    },
    "org/custom": {**LLAMA, "config.json": b'{"model_type": "own", "auto_map": {}}'},
    "org/quantized": {**LLAMA, "config.json": json.dumps({**CONFIG, "quantization_config": {"bits": 4}}).encode()},
    "org/gpt2": {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": safetensors(CONV)},
    "org/empty": {"config.json": LLAMA["config.json"]},
    "org/bare": {"README.md": b"x"},
    "org/broken": {**LLAMA, "model.safetensors": b"\xff" * 100},
    "org/nojson": {**LLAMA, "config.json": b"<html>"},
    "org/endless": {**LLAMA, "model.safetensors": headed({"model.layers.0.x.weight": (10**200, 4)})},
    "org/absurd": {**LLAMA, "config.json": json.dumps({**CONFIG, "hidden_size": 10**400}).encode()},
    "org/pickled": {"config.json": LLAMA["config.json"], "pytorch_model.bin": b"x" * 1000},
    "org/vast": {**LLAMA, "config.json": b" " * (2 << 20)},
}
