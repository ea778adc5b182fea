"""How many numbers of a model learn in a step that trains, from the headers of its weights alone; no torch."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from squeeze.shapes import BLOCK, linear_of, number_of
from squeeze.training import IA3, Adapters, Finetune, LastLayers, LoRA, Prefix, Prompt

EMBEDDING = re.compile(r"(?:^|\.)(?:embed_|wte|wpe|word_embeddings)")
KEYS_AND_VALUES = ("k_proj", "v_proj", "kv_b_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv")
LAST_OF_FEED_FORWARD = ("down_proj", "dense_4h_to_h", "fc_out", "fc2", "mlp.c_proj")
ADAM_BYTES = 8  # two moments in float32


@dataclass(frozen=True)
class Learned:
    """What learns, in float32. parameters: their number. apart: they stand beside the weights, which stay as they are.

    linears: those whose inputs are needed for the gradient, as (rows, columns). rank: of what stands beside them.
    blocks: decoder blocks that gradients go through. optimizer_bytes: of the state of each parameter.
    """

    parameters: int
    apart: bool
    linears: tuple[tuple[int, int], ...] = ()
    rank: int = 0
    blocks: int = 0
    optimizer_bytes: int = ADAM_BYTES

    @property
    def bytes(self) -> int:
        """Of gradients and the optimizer's state, and of the parameters where they stand apart."""
        return self.parameters * (4 * self.apart + 4 + self.optimizer_bytes)


def learned(step: Finetune, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> Learned:
    """tensors: shapes by name, as in the files."""
    blocks = {int(found[1]) for name in tensors if (found := BLOCK.search(name))}
    if isinstance(step, LoRA):
        wanted = step.target_modules or ("*",)
        chosen = [
            sides
            for name, sides in _linears(config, tensors)
            if ".experts." not in name and any(fnmatchcase(name, pattern) for pattern in wanted)
        ]
        count = sum(step.rank * (rows + columns) + rows * step.dora for rows, columns in chosen)
        return Learned(count, True, tuple(chosen), step.rank, len(blocks))
    if isinstance(step, Adapters):
        return Learned(_beside(step, config, tensors, len(blocks)), True, blocks=len(blocks))
    first = max(blocks, default=-1) + 1 - step.layers if isinstance(step, LastLayers) else 0

    def learns(name: str) -> bool:
        found = BLOCK.search(name)
        if found is not None:
            return int(found[1]) >= first
        return not isinstance(step, LastLayers) or not EMBEDDING.search(name)

    return Learned(
        sum(prod(sides) for name, sides in tensors.items() if learns(name)),
        False,
        tuple(sides for name, sides in _linears(config, tensors) if learns(name)),
        blocks=min(len(blocks), step.layers) if isinstance(step, LastLayers) else len(blocks),
    )


def _beside(step: Adapters, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], blocks: int) -> int:
    """Factors of (IA)³, or virtual tokens."""
    hidden = number_of(config, "hidden_size", "n_embd", "d_model")
    if isinstance(step, Prompt):
        return step.virtual_tokens * hidden
    if isinstance(step, Prefix):
        heads = number_of(config, "num_attention_heads", "n_head", "num_heads") or 1
        kept = number_of(config, "num_key_value_heads") or heads
        return step.virtual_tokens * 2 * blocks * kept * (number_of(config, "head_dim") or hidden // heads)
    count = 0
    for name, (rows, columns) in _linears(config, tensors):
        if isinstance(step, IA3) and step.target_modules:
            wanted = any(fnmatchcase(name, pattern) for pattern in step.target_modules)
        else:
            wanted = name.endswith((*KEYS_AND_VALUES, *LAST_OF_FEED_FORWARD)) and ".experts." not in name
        count += wanted * (columns if name.endswith(LAST_OF_FEED_FORWARD) else rows)
    return count


def _linears(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, (rows, columns)) of every linear of the blocks."""
    for tensor, sides in tensors.items():
        name = linear_of(tensor, sides)
        if name is not None:
            rows, columns = reversed(sides) if config.get("model_type") == "gpt2" else sides
            yield name, (rows, columns)
