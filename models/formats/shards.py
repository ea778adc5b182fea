"""Writes safetensors files tensor by tensor: the header first, from shapes that are known beforehand, then the bytes.

Peak memory is what one piece makes, whatever the size of the model.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from models.files.checkpoint import INDEX
from models.files.safetensors_file import DTYPE_NAMES
from models.progress import Notify
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


class Journal:
    """Which pieces stand in their files, so that what is written anew after a kill goes on with the next one.

    A line is written for a piece once its bytes are on the disk: every so many seconds, and at the end of a file. tell:
    what is kept of a piece beside, JSON-able. told: that, by the first name of each piece that is there.
    """

    def __init__(self, path: Path, tell: Callable[[Piece], Any], seconds: float) -> None:
        self._path, self._tell, self._seconds = path, tell, seconds
        self.told: dict[str, Any] = dict(_lines(path)) if path.is_file() else {}
        self._pending: list[Piece] = []
        self._settled_at = time.monotonic()

    def has(self, piece: Piece) -> bool:
        return _first(piece) in self.told

    def note(self, piece: Piece, file: BinaryIO) -> None:
        """That a piece was written into an open file."""
        self._pending.append(piece)
        if time.monotonic() - self._settled_at >= self._seconds:
            self.settle(file)

    def settle(self, file: BinaryIO) -> None:
        """What was noted of an open file is there for good."""
        if self._pending:
            _to_disk(file)
            with self._path.open("ab") as lines:
                for piece in self._pending:
                    self.told[_first(piece)] = told = self._tell(piece)
                    lines.write(json.dumps([_first(piece), told]).encode() + b"\n")
                _to_disk(lines)
        self._pending.clear()
        self._settled_at = time.monotonic()


def write_shards(
    out: Path,
    pieces: Sequence[Piece],
    notify: Notify,
    shard_bytes: int = SHARD_BYTES,
    journal: Journal | None = None,
) -> int:
    """Writes all pieces into `out`, as `model.safetensors` or as shards with their index. Returns the tensors' bytes.

    shard_bytes: no shard is larger, unless a single piece is. journal: of an earlier attempt at the same pieces, whose
    files stand in `out`.
    """
    shards = list(_cut(pieces, shard_bytes))
    total_bytes = sum(piece.size_bytes for piece in pieces)
    places: dict[str, str] = {}
    done_bytes = 0
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for piece in write_pieces(out / name, shard, journal):
            places.update(dict.fromkeys(piece.shapes, name))
            done_bytes += piece.size_bytes
            notify.advance(done_bytes, total_bytes, "bytes")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(places.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total_bytes


def write_pieces(path: Path, pieces: Sequence[Piece], journal: Journal | None = None) -> Iterator[Piece]:
    """Writes them into one file, and gives each back once it is written. journal: of those that stand there already."""
    with path.open("r+b" if journal is not None and path.exists() else "wb") as file:
        offsets = _write_header(file, pieces)
        for piece in pieces:
            if journal is None:
                _write_piece(file, piece, offsets)
            elif not journal.has(piece):
                _write_piece(file, piece, offsets)
                journal.note(piece, file)
            yield piece
        if journal is not None:
            journal.settle(file)


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


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Those of a journal. The last one, where it was cut off, is taken away, so that another one can follow."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    for line in whole.splitlines():
        name, told = json.loads(line)
        yield name, told


def _first(piece: Piece) -> str:
    return next(iter(piece.shapes))


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _size_bytes(shape: Shape) -> int:
    return math.prod(shape[1]) * shape[0].itemsize
