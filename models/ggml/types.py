"""What each ggml type is: columns and bytes of a block, columns of a scale, range of codes and scales.

Source: the structs in ggml-common.h and the sizes in the `gguf` package. A block's value is
d · scale · (code − bias) − dmin · offset, where scale and offset are whole numbers for each group of a super-block
(K types), and 1 in types whose block is one group.
"""

from dataclasses import dataclass
from typing import Literal

Name = Literal["f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
FLOATS: tuple[Name, ...] = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class BlockType:
    """One quantized ggml type.

    number: in files. columns, bytes: of a block. group: columns that share a scale. bits: of a code.
    bias: the code that stands for zero. offset: values are shifted by dmin · offset.
    scales: least and greatest scale of a group; None where a block is one group. Offsets go from 0 to the greatest.
    """

    name: Name
    number: int
    columns: int
    bytes: int
    group: int
    bits: int
    bias: int
    offset: bool
    scales: tuple[int, int] | None

    @property
    def top(self) -> int:
        """The greatest code."""
        return int(2**self.bits - 1)

    @property
    def groups(self) -> int:
        """Of a block."""
        return self.columns // self.group

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.columns


TYPES: dict[Name, BlockType] = {
    each.name: each
    for each in (
        BlockType("q4_0", 2, 32, 18, 32, 4, 8, False, None),
        BlockType("q4_1", 3, 32, 20, 32, 4, 0, True, None),
        BlockType("q5_0", 6, 32, 22, 32, 5, 16, False, None),
        BlockType("q5_1", 7, 32, 24, 32, 5, 0, True, None),
        BlockType("q8_0", 8, 32, 34, 32, 8, 128, False, None),
        BlockType("q2_k", 10, 256, 84, 16, 2, 0, True, (0, 15)),
        BlockType("q3_k", 11, 256, 110, 16, 3, 4, False, (-32, 31)),
        BlockType("q4_k", 12, 256, 144, 32, 4, 0, True, (0, 63)),
        BlockType("q5_k", 13, 256, 176, 32, 5, 0, True, (0, 63)),
        BlockType("q6_k", 14, 256, 210, 16, 6, 32, False, (-128, 127)),
    )
}

FLOAT_BYTES: dict[Name, int] = {"f32": 4, "f16": 2, "bf16": 2}
FLOAT_NUMBERS: dict[Name, int] = {"f32": 0, "f16": 1, "bf16": 30}


def number_of(name: Name) -> int:
    """The type's number in files."""
    return FLOAT_NUMBERS[name] if name in FLOAT_NUMBERS else TYPES[name].number


def row_bytes(name: Name, columns: int) -> int:
    """Bytes of one row; columns must be whole blocks."""
    if name in FLOAT_BYTES:
        return columns * FLOAT_BYTES[name]
    return columns // TYPES[name].columns * TYPES[name].bytes


def fits(name: Name, columns: int) -> bool:
    """Whether rows of so many columns end with a block."""
    return name in FLOAT_BYTES or columns % TYPES[name].columns == 0
