"""Large files from the Hub into its cache's layout, resumed where an earlier process was killed, checked by digest.

The Hub's own client throws a partial file away when its process dies; here it stays beside its place and the next
attempt asks for the rest.
"""

import fcntl
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Self

from huggingface_hub import constants
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import get_session, hf_raise_for_status

from squeeze.errors import HubUnavailable
from workers.hub import TIMEOUT_SECONDS, Repo, RepoFile, broken, plain_words

_CHUNK_BYTES = 1 << 18  # what is lost when the process is killed, so not too large
_WINDOW_BYTES = 4 << 30  # some of the Hub's mirrors refuse to send more than 50 GB in one answer
_PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0)  # between tries that brought nothing
_PARALLEL = 4
_CONTENT_RANGE = re.compile(r"bytes (\d+)-")
_SHA256, _GIT_BLOB = 64, 40  # lengths of the digests, in hexadecimal digits

Tell = Callable[[int], None]


class _Abandoned(Exception):
    """Another file's error ended this one's download."""


class _RangeIgnored(Exception):
    """The server sends the file from its start, or has no such range."""


class Snapshot:
    """A commit's directory in the cache: links to blobs named by digest, as the Hub's client lays them out."""

    def __init__(self, cache: Path, repo: Repo) -> None:
        folder = f"{repo.kind}s--" + repo.id.replace("/", "--")
        self._repo = repo
        self._files = {file.name: file for file in repo.files}
        self._blobs = cache / folder / "blobs"
        self._locks = cache / ".locks" / folder
        self.path = cache / folder / "snapshots" / repo.commit
        for directory in (self._blobs, self._locks, self.path):
            directory.mkdir(parents=True, exist_ok=True)

    def missing_bytes(self, names: Sequence[str]) -> int:
        """What is still to be fetched of these files."""
        return sum(self._files[name].size_bytes - self._held_bytes(self._files[name]) for name in names)

    def size_bytes(self, names: Sequence[str]) -> int:
        return sum(self._files[name].size_bytes for name in names)

    def fetch(self, names: Sequence[str], tell: Tell) -> None:
        """Files into the directory, several at once. tell: is given the bytes that came since it was last called."""
        stop = threading.Event()
        with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="pull") as pool:
            futures = [pool.submit(self._fetch, self._files[name], tell, stop) for name in names]
            wait(futures, return_when=FIRST_EXCEPTION)
            stop.set()  # after an error the others need not go on; where there was none they have ended
        for future in futures:
            if (error := future.exception()) is not None and not isinstance(error, _Abandoned):
                raise error

    def _held_bytes(self, file: RepoFile) -> int:
        for path in (self._blobs / file.digest, self._part(file)):
            if path.is_file():
                return path.stat().st_size
        return 0

    def _part(self, file: RepoFile) -> Path:
        return self._blobs / f"{file.digest}.incomplete"

    def _fetch(self, file: RepoFile, tell: Tell, stop: threading.Event) -> None:
        blob, link = self._blobs / file.digest, self.path / file.name
        # Two jobs may pull the same model: the second one waits, then finds it there.
        with (self._locks / f"{file.digest}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if blob.is_file():
                tell(file.size_bytes)
            else:
                self._download(file, tell, stop)
                self._part(file).replace(blob)
            if not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(os.path.relpath(blob, link.parent))

    def _download(self, file: RepoFile, tell: Tell, stop: threading.Event) -> None:
        for _ in range(2):  # a part that was damaged on disk shows at its end; then once more from nothing
            with _Part(self._part(file), file, tell) as part:
                self._complete(part, file, stop)
                if part.is_right():
                    return
                part.restart()
        raise broken(
            self._repo.kind,
            f"{self._repo.id}/{file.name} as it arrives is not what {constants.ENDPOINT} says it is (its digest "
            "differs, twice): the file is damaged there or on the way.",
        )

    def _complete(self, part: "_Part", file: RepoFile, stop: threading.Event) -> None:
        """Appends what is missing, over as many connections as it takes as long as each brings something."""
        in_vain = 0
        while part.have < file.size_bytes:
            before = part.have
            try:
                with plain_words(self._repo.id, self._repo.commit, self._repo.kind):
                    for chunk in self._window(file, part.have):
                        if stop.is_set():
                            raise _Abandoned
                        part.append(chunk)
            except _RangeIgnored:
                if before == 0:
                    raise HubUnavailable(f"{constants.ENDPOINT} does not send {self._repo.id}/{file.name}") from None
                part.restart()
            except HubUnavailable:
                in_vain = 0 if part.have > before else in_vain + 1
                if in_vain == len(_PAUSES_SECONDS):
                    raise
                stop.wait(_PAUSES_SECONDS[in_vain])

    def _window(self, file: RepoFile, start: int) -> Iterator[bytes]:
        end = min(start + _WINDOW_BYTES, file.size_bytes)
        headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        with get_session().stream(
            "GET",
            self._repo.url(file.beginning_of or file.name),
            headers=headers,
            timeout=TIMEOUT_SECONDS,
            follow_redirects=True,
        ) as response:
            if response.status_code == 416:
                raise _RangeIgnored
            hf_raise_for_status(response)
            came = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
            if int(came[1]) != start if response.status_code == 206 and came else start > 0:
                raise _RangeIgnored
            yield from response.iter_raw(_CHUNK_BYTES)


class _Part:
    """A file on its way, with its hash so far. `tell` hears of every byte that is there, and of those lost."""

    def __init__(self, path: Path, file: RepoFile, tell: Tell) -> None:
        self._file = file
        self._tell = tell
        self._out = path.open("ab+")
        self.have = 0
        self._hash = self._fresh_hash()
        self._out.seek(0)
        while chunk := self._out.read(_CHUNK_BYTES):
            self._count(chunk)
        if self.have > file.size_bytes:
            self.restart()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._out.flush()
        os.fsync(self._out.fileno())
        self._out.close()

    def append(self, chunk: bytes) -> None:
        if self.have + len(chunk) > self._file.size_bytes:
            raise HubUnavailable(f"{constants.ENDPOINT} sends more of {self._file.name} than it says there is")
        self._out.write(chunk)
        self._count(chunk)

    def restart(self) -> None:
        self._out.truncate(0)
        self._tell(-self.have)
        self.have = 0
        self._hash = self._fresh_hash()

    def is_right(self) -> bool:
        if len(self._file.digest) not in (_SHA256, _GIT_BLOB):  # a mirror's own kind of tag tells nothing
            return True
        return self._hash.hexdigest() == self._file.digest

    def _count(self, chunk: bytes) -> None:
        self.have += len(chunk)
        self._hash.update(chunk)
        self._tell(len(chunk))

    def _fresh_hash(self) -> "hashlib._Hash":
        if len(self._file.digest) != _GIT_BLOB:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self._file.size_bytes, usedforsecurity=False)  # as git names blobs
