"""Shapes and specs as the tests of this room make them."""

from typing import Any

from squeeze.shapes.model import Shape, shape_of
from squeeze.specs.job_spec import JobSpec

WIDTH = 256


def tensors(
    blocks: int, width: int = WIDTH, *, inner: int = 0, heads: int = 0, vocabulary: int = 4096
) -> dict[str, tuple[int, ...]]:
    """Shapes of a Llama's tensors. inner: width of the feed-forward part, heads: of keys and values."""
    inner, heads = inner or 3 * width, heads or width // 2
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    for block in range(blocks):
        prefix = f"model.layers.{block}"
        found |= {
            f"{prefix}.self_attn.q_proj.weight": (width, width),
            f"{prefix}.self_attn.k_proj.weight": (heads, width),
            f"{prefix}.self_attn.v_proj.weight": (heads, width),
            f"{prefix}.self_attn.o_proj.weight": (width, width),
            f"{prefix}.mlp.gate_proj.weight": (inner, width),
            f"{prefix}.mlp.up_proj.weight": (inner, width),
            f"{prefix}.mlp.down_proj.weight": (width, inner),
            f"{prefix}.input_layernorm.weight": (width,),
            f"{prefix}.post_attention_layernorm.weight": (width,),
        }
    return found


def config(width: int = WIDTH, **more: Any) -> dict[str, Any]:
    return {"model_type": "llama", "hidden_size": width, "vocab_size": 4096, "max_position_embeddings": 512} | more


def llama(blocks: int = 4, width: int = WIDTH, **sides: int) -> Shape:
    vocabulary = sides.get("vocabulary", 4096)
    return shape_of(config(width, vocab_size=vocabulary), tensors(blocks, width, **sides))


def spec(method: str = "gptq", step: dict[str, Any] | None = None, **fields: Any) -> JobSpec:
    """As the benchmarks have it: 16 sequences of 256 tokens, 8 windows."""
    given = {"data": {"samples": 16, "sequence_length": 256}, "evaluation": {"samples": 8}} | fields
    return JobSpec.model_validate(
        {"model": "org/name", "steps": [{"kind": "quantize", "method": method, **(step or {})}], **given}
    )


def training(step: dict[str, Any] | None = None, **fields: Any) -> JobSpec:
    """Of sequences of 256 tokens, 8 to a batch, 4 of them held out."""
    given = {"data": {"source": "file-abcdefgh", "sequence_length": 256}, "evaluation": {"samples": 4}} | fields
    steps = [{"kind": "finetune", "method": "lora", **(step or {})}]
    return JobSpec.model_validate({"model": "org/name", "steps": steps, **given})


def distilling(step: dict[str, Any] | None = None, **fields: Any) -> JobSpec:
    """As `training`, of a student with half of four blocks."""
    asked = {"kind": "distill", "method": "logits", "student": {"layers": 2}} | (step or {})
    return training(asked, **fields)
