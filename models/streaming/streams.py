"""Hidden states between two blocks: in memory as far as a limit allows, the rest in files of the work directory."""

import json
import os
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from models.resources import return_free_memory

INDEX = "batches.json"


class Room:
    """What the streams of one job may keep in memory together, and where the rest goes.

    directory: for this attempt's files alone; what lies in it is deleted first.
    """

    def __init__(self, limit_bytes: int, directory: Path) -> None:
        self.limit_bytes, self.directory = limit_bytes, directory
        self.held_bytes = 0
        self.spills = False
        self._numbers = count()
        if directory.is_dir():
            for file in directory.glob("*.bin"):
                file.unlink()

    def keep(self, batch: Tensor) -> "Tensor | _File":
        """The batch itself where there is room for it, or the file that it went to."""
        if self.held_bytes + batch.nbytes <= self.limit_bytes:
            self.held_bytes += batch.nbytes
            return batch
        self.spills = True
        self.directory.mkdir(parents=True, exist_ok=True)
        return _File.written(self.directory / f"{next(self._numbers):08d}.bin", batch)

    def drop(self, kept: "Tensor | _File") -> None:
        if isinstance(kept, _File):
            kept.path.unlink(missing_ok=True)
        else:
            self.held_bytes -= kept.nbytes


class _File:
    """One batch on disk; never changed, so that another directory may link to it."""

    def __init__(self, path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.path, self.dtype, self.shape = path, dtype, shape

    @classmethod
    def written(cls, path: Path, batch: Tensor) -> "_File":
        with path.open("wb") as file:
            file.write(batch.contiguous().view(-1).view(torch.uint8).numpy().data)
        return cls(path, batch.dtype, tuple(batch.shape))

    def read(self) -> Tensor:
        # Read, not mapped: the pages of a mapping would count as this process's memory.
        data = bytearray(self.path.read_bytes())
        return torch.frombuffer(data, dtype=torch.uint8).view(self.dtype).view(self.shape)


class Stream:
    """Batches of hidden states (B, T, C) on the host, in order."""

    def __init__(self, room: Room, batches: Iterable[Tensor] = ()) -> None:
        self._room = room
        self._kept: list[Tensor | _File] = [room.keep(batch) for batch in batches]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Tensor:
        kept = self._kept[index]
        return kept.read() if isinstance(kept, _File) else kept

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [tuple(kept.shape) for kept in self._kept]

    def replace(self, index: int, batch: Tensor) -> None:
        """Another batch in the place of one, whose room it takes, and whose memory where it fits.

        What stays as long as a block then never lies between what comes and goes: the heap keeps no holes.
        """
        kept = self._kept[index]
        if isinstance(kept, Tensor) and (kept.shape, kept.dtype) == (batch.shape, batch.dtype):
            kept.copy_(batch)
            return
        self._room.drop(kept)
        self._kept[index] = self._room.keep(batch)

    def append(self, batch: Tensor) -> None:
        self._kept.append(self._room.keep(batch))

    def clear(self) -> None:
        """Gives memory and files back."""
        for kept in self._kept:
            self._room.drop(kept)
        self._kept.clear()
        return_free_memory()

    def save(self, directory: Path) -> None:
        """Writes all batches into a new directory, as links to the files where they are in some."""
        directory.mkdir()
        index = []
        for number, kept in enumerate(self._kept):
            path = directory / f"{number:08d}.bin"
            if isinstance(kept, _File):
                os.link(kept.path, path)
            else:
                _File.written(path, kept)
            index.append([str(kept.dtype).removeprefix("torch."), list(kept.shape)])
        (directory / INDEX).write_text(json.dumps(index), encoding="utf-8")

    @classmethod
    def saved(cls, room: Room, directory: Path) -> "Stream":
        """What `save` wrote."""
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        files = (
            _File(directory / f"{number:08d}.bin", getattr(torch, dtype), tuple(shape))
            for number, (dtype, shape) in enumerate(index)
        )
        return cls(room, (file.read() for file in files))
