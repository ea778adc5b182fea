"""The files of a Hub dataset onto this disk: as many as hold the text that is wanted, long ones only in part."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from models.texts.documents import documents_of
from squeeze.errors import DataUnusable, DiskFull
from workers.datasets import Dataset
from workers.download import Snapshot
from workers.hub import RepoFile

HEAD_BYTES_LEAST = 64 << 20  # of a file of lines that is longer only its beginning is fetched
HEAD_BYTES_PER_CHARACTER = 16  # of the text that is wanted: records hold more than text
_PIECE_BYTES = 1 << 16  # what is lost at the end of a packed file of which only the beginning is here
_PACKED = {".gz": "gzip", ".zst": "zstd"}

Advance = Callable[[int, int], None]


def fetch(
    dataset: Dataset,
    cache: Path,
    into: Path,
    wanted_characters: int,
    column: str | None,
    advance: Advance,
    head_bytes_least: int = HEAD_BYTES_LEAST,
) -> Path:
    """A directory with as many of the split's shards as hold `wanted_characters` of text, or all of them.

    Of long files of lines only the beginning is fetched, and packed ones are unpacked as far as that. advance: is given
    the bytes that have come and those expected. Raises DataUnusable where a shard has no text, DiskFull with figures.
    """
    head_bytes = max(head_bytes_least, HEAD_BYTES_PER_CHARACTER * wanted_characters)
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    done = characters = 0
    for number, shard in enumerate(dataset.repo.files):
        file = _beginning(shard, head_bytes)
        snapshot = Snapshot(cache, replace(dataset.repo, files=(file,)))
        _demand(snapshot.missing_bytes([file.name]), cache, f"{dataset.repo.id}/{shard.name}")
        snapshot.fetch([file.name], _meter(done, file.size_bytes, advance))
        done += file.size_bytes
        place(snapshot.path / file.name, into / f"{number:05d}", shard.name, head_bytes, cut=file is not shard)
        characters += _count(into / f"{number:05d}", wanted_characters - characters, column, dataset, shard.name)
        if characters >= wanted_characters:
            break
    return into


def place(held: Path, target: Path, name: str, most_bytes: int, *, cut: bool) -> None:
    """A shard as a file that can be read: itself, or what it unpacks to, as whole lines up to `most_bytes`.

    name: tells how it is packed. cut: there is more of it on the Hub.
    """
    packing = _PACKED.get(Path(name).suffix.lower())
    if packing is None and not cut:
        target.symlink_to(held.resolve())
        return
    size_bytes = lines_bytes = 0
    with target.open("wb") as out:
        for piece in _unpacked(held, packing, name, cut):
            out.write(piece[: most_bytes - size_bytes])
            newline = piece.rfind(b"\n", 0, most_bytes - size_bytes)
            lines_bytes = size_bytes + newline + 1 if newline >= 0 else lines_bytes
            size_bytes += len(piece)
            if size_bytes >= most_bytes:
                cut = True
                break
        if cut and lines_bytes:
            out.truncate(lines_bytes)


def _beginning(shard: RepoFile, head_bytes: int) -> RepoFile:
    """What is fetched of a shard: a long file of lines ends early."""
    if shard.name.lower().endswith(".parquet") or shard.size_bytes <= head_bytes:
        return shard
    first = f".first-{head_bytes}"
    return RepoFile(shard.name + first, head_bytes, shard.digest + first, beginning_of=shard.name)


def _unpacked(held: Path, packing: str | None, name: str, cut: bool) -> Iterator[bytes]:
    import pyarrow  # only where a file is packed: it costs 60 MB

    try:
        with pyarrow.input_stream(str(held), compression=packing) as stream:
            while piece := stream.read(_PIECE_BYTES):
                yield piece
    except (pyarrow.ArrowException, OSError) as error:
        if not cut:  # what is cut ends in the middle of something
            raise DataUnusable(f"{name} can't be unpacked: it is damaged on the Hub") from error


def _count(file: Path, enough: int, column: str | None, dataset: Dataset, name: str) -> int:
    """Characters of text in a file, counted no further than `enough`."""
    characters = 0
    try:
        for text in documents_of(file, "data.source", column):
            characters += len(text)
            if characters >= enough:
                break
    except DataUnusable as error:
        raise DataUnusable(f"{dataset.origin}, {name}: {error.message}", param=error.param) from error
    return characters


def _demand(missing_bytes: int, cache: Path, name: str) -> None:
    free = shutil.disk_usage(cache).free
    if missing_bytes > free:
        raise DiskFull(
            f"the worker's disk has {free / 2**30:.2f} GiB free and {name} takes {missing_bytes / 2**30:.2f} GiB. Free "
            "some space, or name a dataset with smaller files."
        )


def _meter(before: int, size_bytes: int, advance: Advance) -> Callable[[int], None]:
    came = 0

    def tell(some: int) -> None:
        nonlocal came
        came += some
        advance(before + came, before + size_bytes)

    return tell
