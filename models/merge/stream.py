"""The merged model on disk, tensor by tensor, and what is counted on the way.

In memory are a tensor of the result in 16 bits, and a part of the task vectors in float32. What was written stays
between attempts, so that a job that was killed goes on with the next tensor.
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.files.checkpoint import SourceModel
from models.formats.directory import without_private, write_companions, write_json
from models.formats.shards import SHARD_BYTES, Journal, Piece, write_shards
from models.merge.entries import Source, rows_of
from models.merge.vectors import Part, Vectors
from models.progress import Notify
from models.train.merging import stored_dtype
from models.weights.finite import all_finite
from models.weights.plain import saturated
from squeeze.errors import NotFinite
from squeeze.shapes.model import COMPUTED
from squeeze.steps.merging import Merge

PART_ELEMENTS = 1 << 20  # of all task vectors together that are in memory at once


@dataclass(frozen=True)
class Counts:
    """Of some tensors, n task vectors. Numbers of elements (n,), int64: of those, that differ from the base's, that
    were trimmed or dropped of these, that are left where another one has the other sign, that were used.

    products: of every two task vectors, (n, n) float64. base: sum of the base's squares. elements: of a task vector.
    """

    changed: Tensor
    trimmed: Tensor
    conflicting: Tensor
    used: Tensor
    products: Tensor
    base: float
    elements: int

    @classmethod
    def none(cls, n: int) -> "Counts":
        zeros = torch.zeros(n, dtype=torch.int64)
        return cls(zeros, zeros, zeros, zeros, torch.zeros(n, n, dtype=torch.float64), 0.0, 0)

    @classmethod
    def of(cls, part: Part, W: Tensor) -> "Counts":
        """W: the base's part, (k,) float32."""
        T, kept = part.vectors, part.kept
        apart = (kept > 0).any(dim=0) & (kept < 0).any(dim=0)
        changed, left = T.count_nonzero(dim=1), kept != 0
        wide = T.double()
        return cls(
            changed,
            changed - left.count_nonzero(dim=1),
            (left & apart).count_nonzero(dim=1),
            part.used.count_nonzero(dim=1),
            wide @ wide.t(),
            float(W.double().square().sum()),
            T.shape[1],
        )

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(one + two for one, two in zip(vars(self).values(), vars(other).values(), strict=True)))

    def told(self) -> list[Any]:
        """As JSON has it."""
        return [value.tolist() if isinstance(value, Tensor) else value for value in vars(self).values()]

    @classmethod
    def heard(cls, told: list[Any]) -> "Counts":
        *counts, products, base, elements = told
        changed, trimmed, conflicting, used = (torch.tensor(each, dtype=torch.int64) for each in counts)
        return cls(changed, trimmed, conflicting, used, torch.tensor(products, dtype=torch.float64), base, elements)


def write_merged(
    base: SourceModel,
    entries: Sequence[Source],
    step: Merge,
    seed: int,
    directory: Path,
    mark: str,
    notify: Notify,
    snapshot_seconds: float,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[Path, Counts]:
    """(a directory that loads like the base, what was counted). Goes on where an earlier attempt stopped.

    directory: kept between attempts. mark: of all that decides the result; what another one left is deleted. Raises
    NotFinite where the base or an entry holds NaN.
    """
    note, journal_file, partial, whole = (directory / name for name in ("mark", "journal", "partial", "model"))
    if not note.is_file() or note.read_text(encoding="utf-8") != mark:
        shutil.rmtree(directory, ignore_errors=True)
        partial.mkdir(parents=True)
        note.write_text(mark, encoding="utf-8")
    counted: dict[str, Counts] = {}
    dtype = stored_dtype(base)
    journal = Journal(journal_file, lambda piece: _told(piece, counted), snapshot_seconds)
    if not whole.is_dir():
        merging = _Merging(base, entries, step, seed, dtype, counted)
        names = [name for name in base.names() if not COMPUTED.search(name)]
        if journal.told:
            notify.event(
                "info", f"going on after {len(journal.told)} of {len(names)} tensors, which are merged already"
            )
        write_shards(partial, [merging.piece(name) for name in names], notify, shard_bytes, journal)
        write_companions(base, partial)
        config = without_private(base.config)
        config.pop("torch_dtype", None)
        write_json(partial / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
        partial.rename(whole)
    total = Counts.none(len(entries))
    for told in journal.told.values():
        total = total if told is None else total + Counts.heard(told)
    return whole, total


def _told(piece: Piece, counted: dict[str, Counts]) -> list[Any] | None:
    found = counted.pop(next(iter(piece.shapes)), None)
    return None if found is None else found.told()


@dataclass(frozen=True)
class _Merging:
    base: SourceModel
    entries: Sequence[Source]
    step: Merge
    seed: int
    dtype: torch.dtype
    counted: dict[str, Counts]

    def piece(self, name: str) -> Piece:
        entry = self.base.entries[name]
        if not entry.dtype.is_floating_point:
            return Piece({name: (entry.dtype, entry.shape)}, lambda: {name: self.base.tensor(name)})
        return Piece({name: (self.dtype, entry.shape)}, lambda: {name: self._merged(name)})

    def _merged(self, name: str) -> Tensor:
        """One tensor of the result: θ₀ + λ·τ, rounded once."""
        shape = self.base.entries[name].shape
        result = torch.empty(shape, dtype=self.dtype)
        flat, done, counts = result.view(-1), 0, Counts.none(len(self.entries))
        method = import_module(f"models.{self.step.kind}.{self.step.method}")
        vectors = Vectors(
            weights=torch.tensor(self.step.weights, dtype=torch.float32),
            elements=prod(shape),
            walk=lambda: self._walk(name),
            seeds=tuple(seed_of(self.seed, name, number) for number in range(len(self.entries))),
        )
        parts = method.merge(self.step, vectors) if prod(shape) else ()
        for rows, part in zip(self._rows(name), parts, strict=bool(prod(shape))):
            W = self._base_part(name, rows).reshape(-1)
            flat[done : done + len(W)] = saturated(W + self.step.scale * part.merged, self.dtype)
            done += len(W)
            counts += Counts.of(part, W)
        self.counted[name] = counts
        return result

    def _walk(self, name: str) -> Iterator[Tensor]:
        """Task vectors of the tensor, (n, k) float32 a part; zeros of an entry that leaves the tensor as it is."""
        for rows in self._rows(name):
            W = self._base_part(name, rows)
            T = torch.zeros(len(self.entries), W.numel())
            for vector, entry in zip(T, self.entries, strict=True):
                if entry.touches(name):
                    vector.copy_(entry.vector(name, rows, W).reshape(-1))
            yield T

    def _rows(self, name: str) -> list[slice]:
        """Of each part, which holds all task vectors' elements of as many rows as fit."""
        shape = self.base.entries[name].shape
        count, whole = (shape[0] if shape else 1), any(one.touches(name) and one.whole(name) for one in self.entries)
        each = max(1, prod(shape[1:]) * len(self.entries))
        step = max(1, count if whole else PART_ELEMENTS // each)
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]

    def _base_part(self, name: str, rows: slice) -> Tensor:
        found = rows_of(self.base.entries[name], rows)
        if not all_finite(found):
            raise NotFinite(f"the base holds NaN or infinity in {name}; it is damaged at its source")
        return found.to(torch.float32)


def seed_of(seed: int, name: str, number: int) -> int:
    """Of what is drawn for a tensor of an entry: the same whatever was merged before it. At most 63 bits."""
    digest = hashlib.sha256(f"{seed} {number} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
