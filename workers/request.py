"""What a worker hands to the child that runs a job; crosses between them as one line of JSON."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from jobs.places import attempt_prefix
from squeeze.specs.job_spec import JobSpec


@dataclass(frozen=True)
class StoredFile:
    """A file in the object storage."""

    filename: str
    key: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Request:
    """One attempt of a job.

    scratch: the job's own directory, kept between attempts. revision: the commit that an earlier attempt resolved the
    model's id to. source: the files of the earlier job that is compressed again. named: of those that further fields of
    the steps name, by the field. data: uploaded files by their id.
    device: of the job's process. others: of the further processes that share its calibration text.
    """

    job_id: str
    attempt: int
    spec: dict[str, Any]
    scratch: str
    cache: str
    storage_url: str
    device: str
    others: tuple[str, ...] = ()
    model_roots: tuple[str, ...] = ()
    consumers: dict[str, str] = field(default_factory=dict)
    activation_bytes: int | None = None
    revision: str | None = None
    source: tuple[StoredFile, ...] = ()
    named: dict[str, tuple[StoredFile, ...]] = field(default_factory=dict)
    data: dict[str, StoredFile] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        """Where in the storage this attempt, and no other, writes."""
        return attempt_prefix(self.job_id, self.attempt)

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def parsed(self) -> JobSpec:
        return JobSpec.model_validate(self.spec)

    @property
    def scratch_path(self) -> Path:
        return Path(self.scratch)

    @property
    def storage_directory(self) -> Path | None:
        """Where a local storage lies, to ask how much room it has."""
        parts = urlsplit(self.storage_url)
        return Path(unquote(parts.path)) if parts.scheme == "file" else None

    def message(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, message: dict[str, Any]) -> Self:
        return cls(
            **{
                **message,
                "others": tuple(message["others"]),
                "model_roots": tuple(message["model_roots"]),
                "source": tuple(StoredFile(**file) for file in message["source"]),
                "named": {
                    param: tuple(StoredFile(**file) for file in files) for param, files in message["named"].items()
                },
                "data": {name: StoredFile(**file) for name, file in message["data"].items()},
            }
        )
