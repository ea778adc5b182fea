"""The weights of one linear as ggml blocks: what a method hands to a format that llama.cpp reads."""

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from models.ggml.encoder import decode_bytes, encode
from models.ggml.layout import Grid, pack, unpack
from models.ggml.types import TYPES, Name
from squeeze.steps.schemes import Scheme


@dataclass(frozen=True)
class Blocks:
    """blocks: (out, bytes) uint8, as they stand in the file. scheme: names the block type."""

    blocks: Tensor
    scheme: Scheme

    @property
    def name(self) -> Name:
        return cast(Name, self.scheme.ggml)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """(out, in), computed in float32 as llama.cpp does."""
        return decode_bytes(self.blocks, self.name).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"blocks": self.blocks}

    def rows(self, start: int, stop: int) -> "Blocks":
        return replace(self, blocks=self.blocks[start:stop])

    def divided(self, by: Tensor, dtype: torch.dtype) -> "Blocks":  # noqa: ARG002 - factors are float16 whatever the model
        """The same with every output row divided by its entry in `by`, (out,) float32: its factors are."""
        kind = TYPES[self.name]
        codes, grid = unpack(self.blocks, kind)

        def over(factor: Tensor) -> Tensor:
            return (factor / by.unsqueeze(-1)).to(torch.float16).float()

        moved = Grid(over(grid.d), None if grid.dmin is None else over(grid.dmin), grid.scales, grid.offsets)
        return replace(self, blocks=pack(codes, moved, kind))


def scheme_of(name: Name) -> Scheme:
    """The scheme of a block type."""
    kind = TYPES[name]
    return Scheme("ggml", kind.bits, kind.group, symmetric=not kind.offset, ggml=name)


def to_blocks(W: Tensor, name: Name, importance: Tensor | None) -> Blocks:
    """Encodes one linear. W: (out, in) float32; importance: (in,), for example the mean square of each input."""
    return Blocks(encode(W, name, importance), scheme_of(name))
