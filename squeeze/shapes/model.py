"""What a job's cost depends on: the shape of a model, told from its config and the headers of its weights; no torch."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any, TypeVar

Each = TypeVar("Each")

BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")

# Causal masks and rotary frequencies that old checkpoints carry and today's model classes compute.
COMPUTED = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")

MOST = 1 << 40  # of anything that is counted: files from strangers may say what they like

# Linears that read what no other linear of their parent reads; of the rest, those with as many inputs share them.
READ_ALONE = frozenset(
    {
        "o_proj",
        "out_proj",
        "down_proj",
        "dense",
        "dense_4h_to_h",
        "c_proj",
        "fc2",
        "fc_out",
        "w2",
        "q_b_proj",
        "kv_b_proj",
    }
)
# Families whose attention and feed-forward part read one input.
PARALLEL = frozenset({"codegen", "cohere", "cohere2", "gptj", "phi"})
ROUTERS = frozenset({"gate", "shared_expert_gate"})  # send tokens to experts; stay as they are

# Of an element in the files, and in memory: nobody needs float64, and CPUs have no fast float16.
BYTES = {"F64": (8, 4), "F32": (4, 4), "F16": (2, 4), "BF16": (2, 2)}


@dataclass(frozen=True)
class Group:
    """Linears of a block that read one input, and are compressed together. rows: outputs of each.

    share: of the tokens that come to it; less than 1 in a mixture's experts.
    """

    columns: int
    rows: tuple[int, ...]
    share: float = 1.0

    @property
    def weights(self) -> int:
        return sum(self.rows) * self.columns


@dataclass(frozen=True)
class Block:
    """One decoder block. elements: of all its tensors. active: weights that a token meets on its way."""

    elements: int
    active: float
    groups: tuple[Group, ...]

    @property
    def weights(self) -> int:
        """Of the linears that are compressed."""
        return sum(group.weights for group in self.groups)


@dataclass(frozen=True)
class Shape:
    """One model. outside: elements of what is not in a block, all together.

    positions: tokens that a sequence may have; 0 where the config sets no bound. stored_bytes: of an element in the
    files. computed_bytes: of one in memory, where the job runs on a CPU.
    """

    blocks: tuple[Block, ...]
    outside: int
    hidden: int
    vocabulary: int
    positions: int
    stored_bytes: int
    computed_bytes: int

    @property
    def weights(self) -> int:
        """Of the linears that are compressed."""
        return sum(block.weights for block in self.blocks)

    @property
    def elements(self) -> int:
        return self.outside + sum(block.elements for block in self.blocks)


def shape_of(
    config: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, ...]],
    dtype: str = "BF16",
    ignored: Sequence[str] = (),
) -> Shape:
    """The shape of a model.

    tensors: shapes by name, as in the files. dtype: of the weights, as safetensors calls it. ignored: patterns
    of the linears that are not compressed.
    """
    stored_bytes, computed_bytes = BYTES.get(dtype, BYTES["BF16"])
    by_block: dict[str, dict[str, tuple[int, ...]]] = {}
    outside = 0
    for name, sides in tensors.items():
        found = BLOCK.search(name)
        if found is None:
            outside += prod(sides)
        else:
            by_block.setdefault(found[1], {})[name] = sides
    return Shape(
        blocks=tuple(_block(config, own, ignored) for _, own in sorted(by_block.items(), key=lambda one: int(one[0]))),
        outside=outside,
        hidden=number_of(config, "hidden_size", "n_embd", "d_model"),
        vocabulary=number_of(config, "vocab_size"),
        positions=number_of(config, "max_position_embeddings", "n_positions", "max_seq_len"),
        stored_bytes=stored_bytes,
        computed_bytes=computed_bytes,
    )


def of_blocks(tensors: Mapping[str, Each], kept: Collection[int]) -> dict[str, Each]:
    """What a model has that is cut to some decoder blocks, by the names that it had. kept: their numbers."""
    found = {name: BLOCK.search(name) for name in tensors}
    return {name: each for name, each in tensors.items() if (block := found[name]) is None or int(block[1]) in kept}


def linear_of(tensor: str, sides: Sequence[int]) -> str | None:
    """The name of a block's linear whose weight that tensor is; None where it is something else, or only routes."""
    name = tensor.removesuffix(".weight")
    is_linear = len(sides) == 2 and name != tensor and BLOCK.search(tensor) is not None
    return name if is_linear and name.rpartition(".")[2] not in ROUTERS else None


def number_of(config: Mapping[str, Any], *names: str) -> int:
    """The first of these members that is a positive number, and not absurdly large; 0 where none is."""
    return next((config[name] for name in names if type(config.get(name)) is int and 0 < config[name] <= MOST), 0)


def _block(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], ignored: Sequence[str]) -> Block:
    experts = number_of(config, "num_local_experts", "num_experts", "n_routed_experts")
    routed = min(1.0, number_of(config, "num_experts_per_tok") / experts) if experts else 1.0
    transposed = config.get("model_type") == "gpt2"
    active = 0.0
    groups: dict[tuple[str, int], list[int]] = {}
    for name, sides in tensors.items():
        share = routed if ".experts." in name else 1.0
        if len(sides) < 2:
            continue
        active += share * prod(sides)
        linear = linear_of(name, sides)
        if linear is None or any(fnmatchcase(linear, pattern) for pattern in ignored):
            continue
        rows, columns = reversed(sides) if transposed else sides
        parent, _, leaf = linear.rpartition(".")
        place = name if leaf in READ_ALONE else "" if config.get("model_type") in PARALLEL else parent
        groups.setdefault((place, columns), []).append(rows)
    return Block(
        elements=sum(map(prod, tensors.values())),
        active=active,
        groups=tuple(
            Group(columns, tuple(rows), routed if ".experts." in place else 1.0)
            for (place, columns), rows in groups.items()
        ),
    )
