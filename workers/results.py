"""Puts what a job made into the object storage, under a prefix that no other attempt writes to."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from squeeze.errors import StorageUnavailable, UploadFailed
from squeeze.objects import Stage
from storage import Storage, Stored
from workers.channel import Teller

REPORT = "report.json"

_PAUSES_SECONDS = (1.0, 4.0)
_CONTENT_TYPES = {
    ".json": "application/json",
    ".md": "text/markdown; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}


def upload(
    storage: Storage, prefix: str, directories: Mapping[Any, Path], report: Path, teller: Teller
) -> list[dict[str, Any]]:
    """Every file of every format's directory and the report; what was stored, as `jobs.lifecycle.NewArtifact`s."""
    teller.stage(Stage.uploading)
    files = [(REPORT, REPORT, report)]
    for name, directory in sorted(directories.items()):
        files += [
            (f"{name}/{file.relative_to(directory).as_posix()}", str(name), file)
            for file in sorted(directory.rglob("*"))
            if file.is_file()
        ]
    total, done = sum(file.stat().st_size for _, _, file in files), 0
    artifacts = []
    for filename, kind, file in files:
        key = f"{prefix}/{filename}"
        stored = _put(storage, key, file)
        done += stored.size_bytes
        teller.advance(done, total, "bytes")
        artifacts.append(
            {
                "filename": filename,
                "bytes": stored.size_bytes,
                "sha256": stored.sha256,
                "format": "report" if kind == REPORT else kind,
                "storage_key": key,
                "content_type": _CONTENT_TYPES.get(file.suffix, "application/octet-stream"),
            }
        )
    return artifacts


def _put(storage: Storage, key: str, file: Path) -> Stored:
    for pause in _PAUSES_SECONDS:
        try:
            return storage.put_file(key, file)
        except StorageUnavailable:
            time.sleep(pause)
    try:
        return storage.put_file(key, file)
    except StorageUnavailable as error:
        raise UploadFailed(
            f"the result could not be stored: {error.message} The job is tried again and goes on from here."
        ) from error
