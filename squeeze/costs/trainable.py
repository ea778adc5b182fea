"""How many numbers of a model learn in a step that trains, from the headers of its weights alone; no torch."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from squeeze.shapes.model import BLOCK, linear_of, number_of
from squeeze.specs.bases import rounding
from squeeze.steps.finetuning import IA3, Adapters, Head, LastLayers, LowRank, Prefix, Prompt, QLoRA
from squeeze.steps.movement import Movement
from squeeze.steps.training import Train

OUTPUT_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.")
EMBEDDING = re.compile(r"(?:^|\.)(?:embed_|wte|wpe|word_embeddings)")
KEYS_AND_VALUES = ("k_proj", "v_proj", "kv_b_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv")
LAST_OF_FEED_FORWARD = ("down_proj", "dense_4h_to_h", "fc_out", "fc2", "mlp.c_proj")
FEWEST_LABELS = 2
ADAM_BYTES = 8  # two moments in float32
CODED_BYTES = 2 + 8 / 256  # the same in 8 bits, with a scale for 256 of them each (bitsandbytes)
NF4_BYTES = (4 + 32 / 64) / 8  # of a weight, with a scale for 64 of them
NF4_NESTED_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # whose scales are in 8 bits, with a scale for 256 of these


@dataclass(frozen=True)
class Learned:
    """What learns, in float32. parameters: their number. apart: they stand beside the weights, which stay as they are.

    linears: those whose inputs are needed for the gradient, as (rows, columns). rank: of what stands beside them.
    blocks: decoder blocks that gradients go through. gradient_bytes, state_bytes: of gradients, and of the
    optimizer. rounded: weights that are held as they are rounded; rounded_bytes: what these then take. left_out:
    weights that are not loaded. scores: that learn beside weights which do. factored: factors may learn in the place
    of linears, which are fewer. zeroed: weights of matrices with zeros that stay; a byte each says where they are.
    """

    parameters: int
    apart: bool
    linears: tuple[tuple[int, int], ...] = ()
    rank: int = 0
    blocks: int = 0
    gradient_bytes: int = 0
    state_bytes: int = 0
    rounded: int = 0
    rounded_bytes: int = 0
    left_out: int = 0
    scores: int = 0
    factored: bool = False
    zeroed: int = 0

    @property
    def bytes(self) -> int:
        """Of gradients, the optimizer's state and places of zeros, and of the parameters that stand apart from the
        weights.
        """
        apart = 4 * (self.parameters * self.apart + self.scores)
        return apart + self.gradient_bytes + self.state_bytes + self.zeroed

    def of_zeroed(self) -> "Learned":
        """Of a model all of whose linears an earlier step pruned."""
        return replace(self, zeroed=sum(map(prod, self.linears)))


def learned(
    step: Train, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], labels: int = FEWEST_LABELS
) -> Learned:
    """tensors: shapes by name, as in the files; of a distillation the student's. labels: of a classifier; their number
    is the data's, which plans don't look at, and hardly counts beside the model.
    """
    blocks = {int(found[1]) for name in tensors if (found := BLOCK.search(name))}
    if isinstance(step, LowRank):
        wanted = step.target_modules or ("*",)
        chosen = [
            sides
            for name, sides in _linears(config, tensors)
            if ".experts." not in name and any(fnmatchcase(name, pattern) for pattern in wanted)
        ]
        count = sum(step.rank * (rows + columns) + rows * step.dora for rows, columns in chosen)
        rounded, rounded_bytes = _rounded(step, config, tensors) if isinstance(step, QLoRA) else (0, 0)
        return Learned(
            count,
            True,
            tuple(chosen),
            step.rank,
            len(blocks),
            *_update_bytes(step, _evenly(count, len(blocks))),
            rounded,
            rounded_bytes,
        )
    if isinstance(step, Adapters):
        count = _beside(step, config, tensors, len(blocks))
        update = _update_bytes(step, _evenly(count, len(blocks)))
        return Learned(count, True, (), 0, len(blocks), *update)
    last = step.layers if isinstance(step, LastLayers | Head) else None  # blocks
    first = 0 if last is None else max(blocks, default=-1) + 1 - last
    dropped = {name: each for name, each in tensors.items() if isinstance(step, Head) and OUTPUT_HEAD.search(name)}

    def learns(name: str) -> bool:
        found = BLOCK.search(name)
        if found is not None:
            return int(found[1]) >= first
        if last == 0:
            return False
        return name not in dropped and not (last is not None and EMBEDDING.search(name))

    sides = {name: each for name, each in tensors.items() if learns(name)}
    if isinstance(step, Head):
        sides["score.weight"] = (labels, number_of(config, "word_embed_proj_dim", "hidden_size", "n_embd", "d_model"))
    scored = {f"scores.{name}": each for name, each in _scored(step, config, tensors)}
    return Learned(
        sum(map(prod, sides.values())),
        False,
        tuple(each for name, each in _linears(config, tensors) if learns(name)),
        0,
        len(blocks) if last is None else min(len(blocks), last),
        *_update_bytes(step, sides | scored),
        left_out=sum(map(prod, dropped.values())),
        scores=sum(map(prod, scored.values())),
    )


def _scored(
    step: Train, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Linears whose weights have a score each."""
    if not isinstance(step, Movement):
        return
    for name, sides in _linears(config, tensors):
        if not any(fnmatchcase(name, pattern) for pattern in step.ignore):
            yield name, sides


def _update_bytes(step: Train, sides: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """(of gradients, float32, of the optimizer's state). sides: of what learns, by name."""
    count = sum(map(prod, sides.values()))
    if step.optimizer in ("adamw8bit", "paged_adamw8bit"):
        return 4 * count, int(CODED_BYTES * count)
    if step.optimizer == "badam":  # of the largest block, or what stands outside of them
        by_block: dict[str | None, int] = {}
        for name, each in sides.items():
            found = BLOCK.search(name)
            block = found and found[1]
            by_block[block] = by_block.get(block, 0) + prod(each)
        largest = max(by_block.values(), default=0)
        return 4 * largest, ADAM_BYTES * largest
    if step.optimizer == "galore":
        rank = step.projection_rank
        return 4 * count, sum(
            4 * rank * (2 * max(each) + min(each))
            if BLOCK.search(name) and len(each) == 2 and min(each) > rank
            else ADAM_BYTES * prod(each)
            for name, each in sides.items()
        )
    return 4 * count, ADAM_BYTES * count


def _evenly(count: int, blocks: int) -> dict[str, tuple[int, ...]]:
    """What stands beside the weights, by block."""
    return {f"layers.{n}.": (count // blocks,) for n in range(blocks)} if blocks else {"": (count,)}


def _rounded(step: QLoRA, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """(weights that are rounded, bytes that they then take)."""
    shapes = [sides for name, sides in _linears(config, tensors) if ".experts." not in name]
    count = sum(map(prod, shapes))
    if (beforehand := rounding(step, (columns for _, columns in shapes))) is not None:
        scheme = beforehand.scheme()
        return count, int(sum(prod(sides) * scheme.bits_per_weight(sides[1]) for sides in shapes) / 8)
    if step.base == "int8":
        return count, count + sum(4 * rows for rows, _ in shapes)
    return count, int(count * (NF4_NESTED_BYTES if step.double_quantization else NF4_BYTES))


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
