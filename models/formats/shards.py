"""Writes safetensors files tensor by tensor: the header first, from shapes that are known beforehand, then the bytes.

Peak memory is what one piece makes, whatever the size of the model.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from models.checkpoint import INDEX
from models.progress import Notify
from models.safetensors_file import DTYPE_NAMES
from squeeze.errors import CompressionBug

SHARD_BYTES = 4_000_000_000
ALIGNMENT = 8  # of the first tensor; the reference implementation's own

Shape = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together, when their turn comes.

    shapes: dtype and shape of each by its name. make: returns exactly those.
    """

    shapes: Mapping[str, Shape]
    make: Callable[[], Mapping[str, Tensor]]

    @property
    def size_bytes(self) -> int:
        return sum(_size_bytes(shape) for shape in self.shapes.values())


def write_shards(out: Path, pieces: Sequence[Piece], notify: Notify, shard_bytes: int = SHARD_BYTES) -> int:
    """Writes all pieces into `out`, as `model.safetensors` or as shards with their index. Returns the tensors' bytes.

    shard_bytes: no shard is larger, unless a single piece is.
    """
    shards = list(_cut(pieces, shard_bytes))
    total_bytes = sum(piece.size_bytes for piece in pieces)
    places: dict[str, str] = {}
    done_bytes = 0
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for piece in write_pieces(out / name, shard):
            places.update(dict.fromkeys(piece.shapes, name))
            done_bytes += piece.size_bytes
            notify.advance(done_bytes, total_bytes, "bytes")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(places.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total_bytes


def write_pieces(path: Path, pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Writes them into one file, and gives each back once it is written."""
    with path.open("wb") as file:
        offsets = _write_header(file, pieces)
        for piece in pieces:
            _write_piece(file, piece, offsets)
            yield piece


def _cut(pieces: Sequence[Piece], shard_bytes: int) -> Iterator[list[Piece]]:
    shard: list[Piece] = []
    size_bytes = 0
    for piece in pieces:
        if shard and size_bytes + piece.size_bytes > shard_bytes:
            yield shard
            shard, size_bytes = [], 0
        shard.append(piece)
        size_bytes += piece.size_bytes
    if shard:
        yield shard


def _write_header(file: BinaryIO, shard: Sequence[Piece]) -> dict[str, int]:
    """Writes length and header. Returns where in the file each tensor goes.

    Wider types come first, so that every tensor is aligned to its own type and can be used where it is mapped.
    """
    shapes = [(name, shape) for piece in shard for name, shape in piece.shapes.items()]
    shapes.sort(key=lambda item: -item[1][0].itemsize)  # stable: otherwise the model's order
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    position = 0
    for name, (dtype, shape) in shapes:
        if name in starts:
            raise CompressionBug(f"tensor {name} would be written twice")
        end = position + _size_bytes((dtype, shape))
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        starts[name] = position
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % ALIGNMENT)
    file.write(len(raw).to_bytes(8, "little") + raw)
    base = 8 + len(raw)
    file.truncate(base + position)
    return {name: base + start for name, start in starts.items()}


def _write_piece(file: BinaryIO, piece: Piece, offsets: Mapping[str, int]) -> None:
    made = piece.make()
    if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in made.items()} != dict(piece.shapes):
        raise CompressionBug(f"tensors {', '.join(piece.shapes)} did not come out as they were announced")
    for name, tensor in made.items():
        if tensor.numel():
            file.seek(offsets[name])
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _size_bytes(shape: Shape) -> int:
    return math.prod(shape[1]) * shape[0].itemsize
