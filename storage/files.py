"""Files that appear under their name only when they are whole, and faults of the disk in our own words."""

import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from squeeze.errors import DiskFull, StorageUnavailable
from storage.base import Meter, Stored

_RENAMES_MAX = 100


def write_whole(
    chunks: Iterable[bytes], path: Path, partial: Path, *, max_bytes: int | None = None, sha256: str | None = None
) -> Stored:
    """Write the chunks to a new file in `partial` (same file system), flush it to the disk, then give it its name.

    The unfinished file is locked for as long as its writer lives, which is how `sweep` tells leftovers from work.
    Past `max_bytes`, or when the digest is not the expected one, nothing gets the name.
    """
    meter = Meter(chunks, max_bytes)
    with disk_faults():
        descriptor, unfinished = _locked_file(partial)
    try:
        for chunk in meter:
            with disk_faults():
                _write_all(descriptor, chunk)
        stored = meter.stored()
        if sha256 is not None and stored.sha256 != sha256:
            raise StorageUnavailable(
                f"The object meant for {path.name} is damaged: its SHA-256 is {stored.sha256}, recorded was {sha256}. "
                "Upload the file again, or run the job that made it again."
            )
        with disk_faults():
            os.fsync(descriptor)
            _rename(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    return stored


def sweep(partial: Path) -> int:
    """Remove the unfinished files whose writers are gone; how many there were."""
    removed = 0
    for unfinished in partial.iterdir():
        with suppress(FileNotFoundError), unfinished.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # its writer lives
            unfinished.unlink()
            removed += 1
    return removed


@contextmanager
def disk_faults() -> Iterator[None]:
    """Turn what the operating system says of a disk into `DiskFull` or `StorageUnavailable`."""
    try:
        yield
    except OSError as fault:
        if fault.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskFull(
                f"No space is left on the disk of {fault.filename or 'the storage directory'}. "
                "Free some (delete old jobs, or move SQUEEZE_DATA or SQUEEZE_STORAGE_URL), then retry the job."
            ) from fault
        raise StorageUnavailable(f"The storage directory can't be used: {fault.strerror or fault}.") from fault


def _locked_file(partial: Path) -> tuple[int, Path]:
    while True:
        unfinished = partial / f".{uuid4().hex}"
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, unfinished
        os.close(descriptor)  # a sweep came between the two calls: take another name


def _write_all(descriptor: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(descriptor, view) :]


def _rename(unfinished: Path, path: Path) -> None:
    for attempt in range(_RENAMES_MAX):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.replace(path)
            break
        except (FileNotFoundError, FileExistsError):
            # Deletions prune empty folders, perhaps the one that was just made; anything else stays and is told.
            if attempt + 1 == _RENAMES_MAX:
                raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
