"""A merged model on disk: the tensors of the source, with what was learned added to some, in 16 bits."""

from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from models.files.checkpoint import SourceModel
from models.formats.directory import without_private, write_companions, write_json, written_whole
from models.formats.shards import Piece, write_shards
from models.progress import Notify
from models.weights.plain import saturated
from models.weights.quantized import Site
from squeeze.shapes.model import COMPUTED

Learned = tuple[Site, Literal["weight", "bias"]]


class Merged(Protocol):
    """What a method makes of a weight."""

    def weight(self, module: str, W: Tensor, *, transposed: bool) -> Tensor:
        """The weight of a linear with what was learned in it, float32, in the layout of W. W: (out, in), or (in, out)
        where transposed.
        """

    def bias(self, module: str, b: Tensor) -> Tensor:
        """The bias of a linear with what was learned in it, float32. b: (out,)."""


def stored_dtype(source: SourceModel) -> torch.dtype:
    """Of the merged weights: the source's own where that has 16 bits."""
    return source.dtype if source.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16


def write_merged(source: SourceModel, sites: list[Site], merged: Merged, out: Path, notify: Notify) -> None:
    """Writes a directory that loads like the source. Sums are made in float32 and rounded once.

    One tensor is in memory at a time, whatever the size of the model.
    """
    dtype = stored_dtype(source)
    learned: dict[str, Learned] = {source.module_key(site.name, "weight"): (site, "weight") for site in sites}
    biases = {source.file_key(f"{site.name}.bias"): site for site in sites}
    learned |= {name: (site, "bias") for name, site in biases.items() if name is not None}
    with written_whole(out) as partial:
        write_companions(source, partial)
        config = without_private(source.config)
        config.pop("torch_dtype", None)
        write_json(partial / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
        names = [name for name in source.names() if not COMPUTED.search(name)]
        write_shards(partial, [_piece(source, name, learned.get(name), merged, dtype) for name in names], notify)


def _piece(source: SourceModel, name: str, learned: Learned | None, merged: Merged, dtype: torch.dtype) -> Piece:
    entry = source.entries[name]
    kept = dtype if entry.dtype.is_floating_point else entry.dtype

    def make() -> dict[str, Tensor]:
        tensor = source.tensor(name)
        if learned is not None:
            site, part = learned
            if part == "weight":
                tensor = merged.weight(site.name, tensor, transposed=site.transposed)
            else:
                tensor = merged.bias(site.name, tensor)
        return {name: saturated(tensor, kept) if kept.is_floating_point else tensor}

    return Piece({name: (kept, entry.shape)}, make)
