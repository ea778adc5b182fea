"""Checkpoints of a job's training in the object storage, from where the job goes on when its machine is lost.

The worker's process copies them, beside the child that trains and never waits for it, and after that one's end as long
as the job may be tried again. Under `jobs/ID/checkpoints/PLACE/ATTEMPT-NAME/` lie the files of one checkpoint and,
written last, a manifest with their sizes and digests: what has none was not finished, and is never read.
"""

import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import structlog

from jobs.places import checkpoints_prefix
from squeeze.errors import ArtifactNotFound, SqueezeError
from storage import CHUNK_BYTES, Storage

MANIFEST = "manifest.json"

_PLACE = re.compile(r"[a-z0-9-]+(/[a-z0-9-]+)*")
_VERSION = re.compile(r"\d{6}-(checkpoint-\d{8})")
_FILE = re.compile(r"[a-z0-9-]+(\.[a-z0-9-]+)*")

log = structlog.get_logger(__name__)


class Safekeeping:
    """One attempt's newest checkpoint on its way into the storage. Used from one thread; the copy is made in another.

    work: the job's, that the checkpoints lie in. every_seconds: between two copies; None: none is ever made.
    """

    def __init__(self, storage: Storage, job_id: str, attempt: int, work: Path, every_seconds: float | None) -> None:
        self._storage, self._job_id, self._attempt, self._work = storage, job_id, attempt, work
        self._every_seconds = every_seconds
        self._due_at = time.monotonic() + (every_seconds or 0.0)
        self._newest: _Held | None = None
        self._copying: threading.Thread | None = None
        self._abandoned = threading.Event()
        self._log = log.bind(job_id=job_id, attempt=attempt)

    @property
    def busy(self) -> bool:
        """Whether a copy is being made, or a checkpoint is there that none was made of."""
        return self._newest is not None or (self._copying is not None and self._copying.is_alive())

    def hold(self, directory: Path) -> None:
        """The child has saved a checkpoint. Its files are opened now, since its next one removes them."""
        if self._every_seconds is None:
            return
        try:
            held = _Held.of(directory, self._work)
        except FileNotFoundError:  # the next one is there already, and will be told
            return
        if self._newest is not None:
            self._newest.close()
        self._newest = held

    def act(self, *, now: bool = False) -> None:
        """Begins a copy where none is being made and one is due. now: it is, if there is anything to copy."""
        if self._copying is not None and not self._copying.is_alive():
            self._copying = None
        if self._newest is None or self._copying is not None:
            return
        if self._every_seconds is None or not (now or time.monotonic() >= self._due_at):
            return
        held, self._newest = self._newest, None
        self._due_at = time.monotonic() + self._every_seconds
        self._copying = threading.Thread(target=self._copy, args=(held,), name="checkpoint")
        self._copying.start()

    def end(self) -> None:
        """Nothing more is copied; half a copy goes."""
        self._abandoned.set()
        if self._copying is not None:
            self._copying.join()
        if self._newest is not None:
            self._newest.close()
            self._newest = None

    def _copy(self, held: "_Held") -> None:
        above = f"{checkpoints_prefix(self._job_id)}/{held.place}"
        version, began = f"{self._attempt:06d}-{held.name}", time.monotonic()
        try:
            files, total = {}, 0
            for name, file in held.files.items():
                size = file.seek(0, 2)
                file.seek(0)
                stored = self._storage.put_stream(f"{above}/{version}/{name}", self._chunks(file), max_bytes=size)
                files[name] = {"bytes": stored.size_bytes, "sha256": stored.sha256}
                total += stored.size_bytes
            told = json.dumps({"files": files}).encode()
            self._storage.put_stream(f"{above}/{version}/{MANIFEST}", [told])
            for old in sorted({key.removeprefix(f"{above}/").partition("/")[0] for key in self._storage.list(above)}):
                if _VERSION.fullmatch(old) and old < version:
                    _remove(self._storage, f"{above}/{old}")
            seconds = round(time.monotonic() - began, 3)
            self._log.info("checkpoint stored", checkpoint=held.name, bytes=total, seconds=seconds)
        except _Abandoned:
            _remove(self._storage, f"{above}/{version}")
        except SqueezeError as error:
            self._log.warning("a checkpoint was not stored; the training goes on without", error=error.message)
        finally:
            held.close()

    def _chunks(self, file: BinaryIO) -> Iterator[bytes]:
        while chunk := file.read(CHUNK_BYTES):
            if self._abandoned.is_set():
                raise _Abandoned
            yield chunk


def bring(storage: Storage, job_id: str, work: Path) -> list[tuple[Path, Path]]:
    """Fetches the newest whole checkpoint of each of the job's trainings: (where in `work` it belongs, where it lies).

    One that the work directory has, or a later one, is not fetched. What is damaged is left, and told in the log.
    """
    prefix = checkpoints_prefix(job_id)
    found: dict[str, list[str]] = {}
    for key in storage.list(prefix):
        folder, _, name = key.removeprefix(f"{prefix}/").rpartition("/")
        place, _, version = folder.rpartition("/")
        if name == MANIFEST and _PLACE.fullmatch(place) and _VERSION.fullmatch(version):
            found.setdefault(place, []).append(version)
    brought = []
    for place, versions in found.items():
        for version in sorted(versions, reverse=True):
            name = version.partition("-")[2]
            if any(path.name >= name for path in (work / place).glob("checkpoint-*[0-9]")):
                break
            into = work / "brought" / place / name
            if _fetched(storage, f"{prefix}/{place}/{version}", into):
                brought.append((work / place / name, into))
                break
    return brought


def forget(storage: Storage, job_id: str) -> None:
    """Nothing is to go on from what the job's trainings left in the storage."""
    _remove(storage, checkpoints_prefix(job_id))


class _Abandoned(Exception):
    """The copy is not wanted any more."""


@dataclass(frozen=True)
class _Held:
    """A checkpoint's files, open. place: of its training in the work directory. name: its own."""

    place: str
    name: str
    files: dict[str, BinaryIO]

    @classmethod
    def of(cls, directory: Path, work: Path) -> Self:
        """Raises FileNotFoundError where it is gone."""
        place = directory.parent.relative_to(work).as_posix()
        held = cls(place, directory.name, {})
        try:
            for path in sorted(directory.iterdir()):
                held.files[path.name] = path.open("rb")
            if not held.files:
                raise FileNotFoundError(directory)
        except FileNotFoundError:
            held.close()
            raise
        return held

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def _fetched(storage: Storage, prefix: str, into: Path) -> bool:
    """Whether it is there now, whole."""
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    try:
        manifest = json.loads(b"".join(storage.read(f"{prefix}/{MANIFEST}")))
        for name, told in manifest["files"].items():
            if not _FILE.fullmatch(name):
                raise _Damaged(f"a file named {name!r}")
            storage.fetch(f"{prefix}/{name}", into / name)
            with (into / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != told["sha256"]:
                    raise _Damaged(f"{name} has another SHA-256 than was written")
    except (_Damaged, ArtifactNotFound, ValueError, KeyError) as error:
        log.warning("a stored checkpoint can't be used", checkpoint=prefix, error=str(error))
        shutil.rmtree(into)
        return False
    return True


class _Damaged(Exception):
    """What is stored is not what was stored."""


def _remove(storage: Storage, prefix: str) -> None:
    try:
        storage.delete_prefix(prefix)
    except SqueezeError as error:
        log.warning("checkpoints stay in the storage", prefix=prefix, error=error.message)
