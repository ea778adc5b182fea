"""What a storage backend promises: bytes under keys, complete or absent, with their size and SHA-256."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from squeeze.errors import BodyTooLarge

CHUNK_BYTES = 1 << 20
_KEY_BYTES_MAX = 900  # S3 allows 1,024, some of which the prefix of the bucket takes
_SEGMENT_BYTES_MAX = 255  # what file systems allow for one name


@dataclass(frozen=True)
class Stored:
    """What has been written under a key."""

    size_bytes: int
    sha256: str


class InvalidKeyError(ValueError):
    """A key that no backend takes: our own mistake, never the user's, hence outside the tree of wire errors."""


class Storage(Protocol):
    """Bytes under keys.

    Keys are relative paths (`jobs/job-…/1/report.json`), see `check_key`. An object is there whole or not at all.
    Errors: `ArtifactNotFound`, `StorageUnavailable`, `DiskFull`, `BodyTooLarge` of `squeeze.errors`, `InvalidKeyError`.
    """

    def put_file(self, key: str, path: Path) -> Stored:
        """Copy a file in, streamed, replacing what stood under the key."""

    def put_stream(self, key: str, chunks: Iterable[bytes], max_bytes: int | None = None) -> Stored:
        """Write chunks as they come. Past `max_bytes`: `BodyTooLarge`, and what stood under the key is untouched."""

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes [start, end), cut to the object's size as slices are, in chunks of about 1 MiB.

        Raises `ArtifactNotFound` now, not at the first chunk.
        """

    def fetch(self, key: str, path: Path, sha256: str | None = None) -> None:
        """Copy an object into a file: whole and, when a digest is given, checked; or no file at all."""

    def size(self, key: str) -> int: ...

    def exists(self, key: str) -> bool: ...

    def local_path(self, key: str) -> Path | None:
        """The object as a file to be read in place, where the backend has one."""

    def presign(self, key: str, *, expires_seconds: int, filename: str) -> str | None:
        """A URL that downloads the object as `filename` without credentials for a while, where the backend has such."""

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is fine."""

    def delete_prefix(self, prefix: str) -> int:
        """Remove the object `prefix` and all that lie under it; how many there were."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """The keys at and under `prefix` (whole segments: `a` does not cover `ab`), sorted; all for the empty one."""

    def check(self) -> None:
        """Raise `StorageUnavailable`, within seconds, when objects can't be written or read."""


def check_key(key: str) -> str:
    """The key itself: plain segments joined by "/", none of them empty, "." or ".."; else `InvalidKeyError`."""
    segments = key.split("/")
    if not key or any(segment in {"", ".", ".."} for segment in segments):
        raise InvalidKeyError(f"the storage key {key!r} is not a relative path of plain segments")
    if "\\" in key or not key.isprintable():
        raise InvalidKeyError(f"the storage key {key!r} holds a backslash or a character that can't be printed")
    if len(key.encode()) > _KEY_BYTES_MAX or any(len(segment.encode()) > _SEGMENT_BYTES_MAX for segment in segments):
        raise InvalidKeyError(
            f"the storage key {key[:60]!r}… exceeds {_KEY_BYTES_MAX} bytes, or a segment exceeds {_SEGMENT_BYTES_MAX}"
        )
    return key


class Meter:
    """Chunks on their way through: counted, hashed and stopped at a limit.

    `fault` keeps what the source raised, because what carries the chunks may wrap or swallow it.
    """

    def __init__(self, chunks: Iterable[bytes], max_bytes: int | None = None) -> None:
        self._chunks = iter(chunks)
        self._max_bytes = max_bytes
        self._digest = sha256()
        self.size_bytes = 0
        self.fault: BaseException | None = None

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            chunk = next(self._chunks)
        except StopIteration:
            raise
        except BaseException as fault:
            self.fault = fault
            raise
        self.size_bytes += len(chunk)
        if self._max_bytes is not None and self.size_bytes > self._max_bytes:
            self.fault = BodyTooLarge(f"The body is larger than the {self._max_bytes:,} bytes that are allowed.")
            raise self.fault
        self._digest.update(chunk)
        return chunk

    def stored(self) -> Stored:
        return Stored(self.size_bytes, self._digest.hexdigest())


def chunks_of(path: Path, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """The bytes [start, end) of a file, in chunks."""
    with path.open("rb") as file:
        file.seek(start)
        left = None if end is None else max(0, end - start)
        while chunk := file.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left)):
            yield chunk
            if left is not None:
                left -= len(chunk)
