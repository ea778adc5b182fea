"""Storage in a local directory: `file:///var/lib/squeeze/storage`.

Written on plain files rather than through obstore's LocalStore: unfinished files are locked by their writer, so that a
sweep at open is exact where several processes share the directory; files are flushed before they get their name; and a
full disk is told apart by its errno.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from urllib.parse import SplitResult, unquote
from uuid import uuid4

from squeeze.errors import ArtifactNotFound, SpecInvalid, StorageUnavailable
from storage.base import InvalidKeyError, Stored, check_key, chunks_of
from storage.files import disk_faults, sweep, write_whole


class LocalStorage:
    """Objects are the files under `root/objects`; `root/partial` holds those that are being written."""

    def __init__(self, root: Path) -> None:
        self._objects = root / "objects"
        self._partial = root / "partial"
        with disk_faults():
            self._objects.mkdir(parents=True, exist_ok=True)
            self._partial.mkdir(exist_ok=True)
            sweep(self._partial)

    def put_file(self, key: str, path: Path) -> Stored:
        return self.put_stream(key, chunks_of(path))

    def put_stream(self, key: str, chunks: Iterable[bytes], max_bytes: int | None = None) -> Stored:
        path = self._path(key)
        self._refuse_shadowing(key, path)
        return write_whole(chunks, path, self._partial, max_bytes=max_bytes)

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        path = self._path(key)
        self.size(key)
        return self._chunks(key, path, start, end)

    def fetch(self, key: str, path: Path, sha256: str | None = None) -> None:
        chunks = self.read(key)
        with disk_faults():
            path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(chunks, path, path.parent, sha256=sha256)

    def size(self, key: str) -> int:
        with self._presence(key):
            found = self._path(key).stat()
        if not S_ISREG(found.st_mode):
            raise ArtifactNotFound(f"Nothing is stored under {key}.")
        return found.st_size

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def local_path(self, key: str) -> Path | None:
        self.size(key)
        return self._path(key)

    def presign(self, key: str, *, expires_seconds: int, filename: str) -> str | None:  # noqa: ARG002
        check_key(key)
        return None

    def delete(self, key: str) -> None:
        path = self._path(key)
        with disk_faults():
            with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                path.unlink()
            self._prune(path.parent)

    def delete_prefix(self, prefix: str) -> int:
        keys = list(self.list(check_key(prefix)))
        for key in keys:
            self.delete(key)
        return len(keys)

    def list(self, prefix: str = "") -> Iterator[str]:
        top = self._path(prefix) if prefix else self._objects
        found = [Path(folder) / name for folder, _, names in os.walk(top) for name in names]
        if top.is_file():
            found = [top]
        yield from sorted(path.relative_to(self._objects).as_posix() for path in found)

    def check(self) -> None:
        probe = self._partial / f"check-{uuid4().hex}"
        try:
            probe.touch(exist_ok=False)
            probe.unlink(missing_ok=True)
        except OSError as fault:
            raise StorageUnavailable(f"The storage directory can't be written: {fault.strerror}.") from fault

    def _path(self, key: str) -> Path:
        return self._objects / check_key(key)

    def _chunks(self, key: str, path: Path, start: int, end: int | None) -> Iterator[bytes]:
        with self._presence(key):
            yield from chunks_of(path, start, end)

    @contextmanager
    def _presence(self, key: str) -> Iterator[None]:
        with disk_faults():
            try:
                yield
            except (FileNotFoundError, NotADirectoryError) as absent:
                raise ArtifactNotFound(f"Nothing is stored under {key}.") from absent

    def _refuse_shadowing(self, key: str, path: Path) -> None:
        """S3 lets `a` and `a/b` live side by side; a file system does not, so neither do we."""
        above = [parent for parent in path.parents if parent != self._objects and self._objects in parent.parents]
        if path.is_dir() or any(parent.is_file() for parent in above):
            raise InvalidKeyError(f"the storage key {key!r} lies above or under an object that is there")

    def _prune(self, folder: Path) -> None:
        while folder != self._objects:
            try:
                folder.rmdir()
            except OSError:
                return  # not empty, or gone already
            folder = folder.parent


def open_url(url: SplitResult, environ: Mapping[str, str]) -> LocalStorage:  # noqa: ARG001
    if url.netloc not in {"", "localhost"} or not url.path.startswith("/") or url.query:
        raise SpecInvalid("SQUEEZE_STORAGE_URL takes file:///absolute/directory or s3://bucket/prefix.")
    return LocalStorage(Path(unquote(url.path)))
