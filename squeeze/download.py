"""Downloads one artifact: resumes what an earlier try left, keeps nothing whose SHA-256 is not the announced one."""

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import httpx

from squeeze.errors import DownloadCorrupt, RateExceeded, ServiceUnavailable, StorageUnavailable
from squeeze.objects import Artifact
from squeeze.transport import Transport, pause_seconds

OnBytes = Callable[[Artifact, int], None]
STRONG_ETAG = re.compile(r'^"[\x21\x23-\x7e]*"$')
CHUNK_BYTES = 1 << 20
TRIES_WITHOUT_PROGRESS = 6


def place(directory: Path, filename: str) -> Path:
    """Where an artifact goes below `directory`; DownloadCorrupt for a name that would lead out of it."""
    parts = PurePosixPath(filename).parts
    if not parts or filename.startswith("/") or ".." in parts or any(c in filename for c in "\\\0:"):
        raise DownloadCorrupt(f"the service names an artifact {filename!r}, which is no file below a directory")
    target = directory.joinpath(*parts)
    if not target.resolve().is_relative_to(directory.resolve()):
        raise DownloadCorrupt(f"{filename!r} would leave {directory} through a link; download into an empty directory")
    return target


def download(transport: Transport, path: str, artifact: Artifact, target: Path, on_bytes: OnBytes | None) -> None:
    """Writes the artifact to `target` by way of `target.part`, which a later call goes on with."""
    if target.is_file() and target.stat().st_size == artifact.bytes and _sha256(target).hexdigest() == artifact.sha256:
        if on_bytes is not None:
            on_bytes(artifact, artifact.bytes)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part, etag = target.with_name(target.name + ".part"), target.with_name(target.name + ".part.etag")
    partial = _Partial(transport, path, artifact, part, etag, on_bytes)
    for _ in range(2):  # what an earlier try left may be spoiled: the second round starts from nothing
        found = partial.complete()
        etag.unlink(missing_ok=True)
        if found == artifact.sha256:
            part.replace(target)
            return
        part.unlink()
    raise DownloadCorrupt(
        f"{artifact.filename} arrived twice with SHA-256 {found}, not with {artifact.sha256}. A proxy in between may "
        "change it, or the service's storage is damaged; ask its operator."
    )


@dataclass(frozen=True)
class _Partial:
    """A file that is not whole yet, and the ETag under which it began."""

    transport: Transport
    path: str
    artifact: Artifact
    part: Path
    etag: Path
    on_bytes: OnBytes | None

    def complete(self) -> str:
        """Asks for what is missing, through as many requests as it takes; the SHA-256 of the whole."""
        in_vain = 0
        while True:
            before = self._size()
            try:
                return self._request()
            except (httpx.TransportError, RateExceeded, ServiceUnavailable, StorageUnavailable) as lost:
                in_vain = 0 if self._size() > before else in_vain + 1
                if in_vain >= TRIES_WITHOUT_PROGRESS:
                    if isinstance(lost, httpx.TransportError):
                        raise self.transport.unreachable(lost) from lost
                    raise
                time.sleep(pause_seconds(in_vain))

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _request(self) -> str:
        # Without the ETag under which it began, nothing tells whether a part belongs to what the service has now.
        size = self._size() if self.etag.exists() else 0
        digest = _sha256(self.part) if 0 < size <= self.artifact.bytes else hashlib.sha256()
        if size and size == self.artifact.bytes:
            return digest.hexdigest()
        headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
        if 0 < size < self.artifact.bytes:
            headers |= {"Range": f"bytes={size}-", "If-Range": self.etag.read_text()}
        with self.transport.stream(self.path, headers) as response:
            if response.status_code != 206:
                size, digest = 0, hashlib.sha256()
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {size}-"):
                raise DownloadCorrupt(
                    f"{self.artifact.filename} was asked for from byte {size} on and came as "
                    f"{response.headers.get('Content-Range', 'an unnamed range')!r}; a proxy in between breaks ranges"
                )
            return self._write(response, size, digest)

    def _write(self, response: httpx.Response, size: int, digest: "hashlib._Hash") -> str:
        with self.part.open("ab" if size else "wb") as out:
            value = response.headers.get("ETag", "")
            if STRONG_ETAG.match(value):
                self.etag.write_text(value)
            else:
                self.etag.unlink(missing_ok=True)
            for chunk in response.iter_raw():  # as they come: what a larger chunk waits for is lost with the connection
                out.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                if self.on_bytes is not None:
                    self.on_bytes(self.artifact, size)
        return digest.hexdigest()


def _sha256(path: Path) -> "hashlib._Hash":
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest
