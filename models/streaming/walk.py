"""Texts on their way through a whole model, one decoder block in memory at a time, watched where somebody wants to see.

Where they are is kept on disk from time to time, with what was seen so far, so that another attempt goes on from there,
to the same bits.
"""

import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.progress import Notify
from models.resources import available_host_bytes, return_free_memory
from models.streaming.calls import Calls, run
from models.streaming.frame import Frame
from models.streaming.snapshots import SNAPSHOT_SHARE
from models.streaming.streams import Room, Stream

SUMS = "sums.safetensors"


class Watcher(Protocol):
    """sums: what it has seen so far, which is kept between attempts and given back."""

    sums: dict[str, Tensor]

    def watching(self, index: int, block: nn.Module) -> AbstractContextManager[object]:
        """Entered before a block runs on all of a text, left afterwards."""

    def seen(self, index: int, before: Tensor, after: Tensor) -> None:
        """What a block was given, and what it handed on, (B, T, C) each."""


@torch.no_grad()
def walk(
    frame: Frame,
    texts: Mapping[str, Tensor],
    directory: Path,
    mark: str,
    notify: Notify,
    snapshot_seconds: float,
    *,
    watchers: Mapping[str, Watcher],
    memory_bytes: int | None = None,
) -> dict[str, Stream]:
    """Sends texts through all blocks. Returns the last hidden states of those that nobody watches; of the others what
    was seen is in their watchers' sums.

    texts: token ids (n, T) int64, by names. directory: of this walk alone; what another `mark` left in it is deleted.
    watchers: by the names of their texts. memory_bytes: what hidden states may take on the host; the rest goes to disk.
    None: half of what is free.
    """
    kept = Kept(directory, mark)
    room = Room(available_host_bytes() // 2 if memory_bytes is None else memory_bytes, directory / "activations")
    calls = Calls(frame, list(texts.values()))
    done = kept.last()
    if done is None:
        done, streams = 0, {name: Stream(room, calls.enter(ids)) for name, ids in texts.items()}
    else:
        streams = kept.streams(done, room, texts)
        for name, watcher in watchers.items():
            watcher.sums.update(kept.sums(done, name))
        notify.event("info", f"going on after block {done} of {frame.count}, which an earlier attempt finished")
    saved_at, cost, begun = time.monotonic(), 0.0, done
    for index in range(begun, frame.count):
        with frame.block(index) as block:
            for name, stream in streams.items():
                _through(calls, index, block, stream, watchers.get(name))
        return_free_memory()
        done = index + 1
        notify.advance(done, frame.count, "blocks")
        now = time.monotonic()
        if done < frame.count and now - saved_at >= min(snapshot_seconds, cost / SNAPSHOT_SHARE):
            kept.save(done, streams, _sums(watchers))
            saved_at, cost = time.monotonic(), time.monotonic() - now
    for name in watchers:
        streams[name].clear()
    if begun < frame.count:
        kept.save(frame.count, streams, _sums(watchers))
    return {name: stream for name, stream in streams.items() if name not in watchers}


def _sums(watchers: Mapping[str, Watcher]) -> dict[str, dict[str, Tensor]]:
    return {name: watcher.sums for name, watcher in watchers.items()}


def _through(calls: Calls, index: int, block: nn.Module, stream: Stream, watcher: Watcher | None) -> None:
    with nullcontext() if watcher is None else watcher.watching(index, block):
        for number in range(len(stream)):
            batch = calls.batch(index, stream[number])
            # A block may work in place on what it is given.
            before = batch[0].clone() if watcher is not None else batch[0]
            after = run(block, batch)
            if watcher is not None:
                watcher.seen(index, before, after)
            stream.replace(number, after.cpu())


class Kept:
    """The directory of one walk; what another `mark` left in it is deleted."""

    def __init__(self, directory: Path, mark: str) -> None:
        self._directory, note = directory, directory / "mark"
        if directory.exists() and (not note.is_file() or note.read_text() != mark):
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
        note.write_text(mark)

    def last(self) -> int | None:
        """The number of blocks that are behind by the latest snapshot; None where there is none."""
        return max((int(path.name.split("-")[1]) for path in self._directory.glob("snapshot-*[0-9]")), default=None)

    def streams(self, done: int, room: Room, names: Iterable[str]) -> dict[str, Stream]:
        return {name: Stream.saved(room, self._snapshot(done) / name) for name in names}

    def sums(self, done: int, name: str) -> dict[str, Tensor]:
        held: dict[str, Tensor] = load_file(self._snapshot(done) / f"{name}.{SUMS}")
        return held

    def save(self, done: int, streams: Mapping[str, Stream], sums: Mapping[str, dict[str, Tensor]]) -> None:
        """After `done` blocks. The new snapshot is complete before the old one goes."""
        part, target = self._directory / "snapshot.part", self._snapshot(done)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for name, stream in streams.items():
            stream.save(part / name)
        for name, held in sums.items():
            save_file(held, part / f"{name}.{SUMS}")
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        for old in self._directory.glob("snapshot-*[0-9]"):
            if old != target:
                shutil.rmtree(old)

    def _snapshot(self, done: int) -> Path:
        return self._directory / f"snapshot-{done:05d}"
