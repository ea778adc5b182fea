"""How a job comes into being: one row for each Idempotency-Key, whoever is first, with its sources checked."""

from collections.abc import Iterator
from typing import Any

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from jobs.moves import add_event
from jobs.queue import queue_of
from jobs.records import FileRecord, JobRecord, LabelRecord, StepRecord, UseRecord, new_id, now
from squeeze.errors import IdempotencyMismatch, SpecInvalid
from squeeze.names import OWN_ID
from squeeze.objects import Status
from squeeze.specs.job_spec import JobSpec


def submit(
    session: Session, *, project: str, spec: JobSpec, idempotency_key: str | None, body_hash: str
) -> tuple[JobRecord, bool]:
    """A new queued job and True, or the job that this Idempotency-Key made before and False.

    Raises IdempotencyMismatch when the key came with another body, SpecInvalid when a file or job that the spec
    names is not there. The caller enqueues the job after its commit.
    """
    _refuse_unstorable(spec, idempotency_key)
    while True:
        record = _insert(session, project, spec, idempotency_key, body_hash)
        if record is not None:
            break
        earlier = session.scalar(
            select(JobRecord).where(JobRecord.project == project, JobRecord.idempotency_key == idempotency_key)
        )
        if earlier is not None:
            if earlier.body_hash != body_hash:
                raise IdempotencyMismatch(
                    f"This Idempotency-Key made {earlier.id} from another body; send a new key with a new request.",
                    param="Idempotency-Key",
                )
            return earlier, False
        # The earlier job was deleted between our two statements: the key is free again.
    sources = dict(_sources(spec.model_dump(mode="json", exclude={"metadata"})))
    _refuse_absent(session, project, sources)
    for number, step in enumerate(spec.steps):
        session.add(StepRecord(job_id=record.id, number=number, kind=step.kind, method=step.method))
    session.add_all(LabelRecord(job_id=record.id, key=key, value=value) for key, value in spec.metadata.items())
    session.add_all(UseRecord(job_id=record.id, source_id=source) for source in sources)
    add_event(session, record, "status", "queued", {"status": Status.queued.value}, record.created_at)
    session.flush()
    return record, True


def _refuse_unstorable(spec: JobSpec, idempotency_key: str | None) -> None:
    if idempotency_key is not None and not (0 < len(idempotency_key) <= 255 and idempotency_key.isprintable()):
        raise SpecInvalid("An Idempotency-Key has 1 to 255 printable characters.", param="Idempotency-Key")
    for key, value in spec.metadata.items():
        if "\0" in key or "\0" in value:
            raise SpecInvalid("Metadata can't hold a zero byte.", param="metadata")


def _insert(
    session: Session, project: str, spec: JobSpec, idempotency_key: str | None, body_hash: str
) -> JobRecord | None:
    """The row, or None where the key is taken."""
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    at = now()
    record: JobRecord | None = session.scalar(
        dialect.insert(JobRecord)
        .values(
            id=new_id("job"),
            project=project,
            spec=spec.model_dump(mode="json"),
            status=Status.queued,
            queue=queue_of(spec),
            priority=spec.priority,
            created_at=at,
            queued_at=at,
            enqueued_at=at,
            idempotency_key=idempotency_key,
            body_hash=body_hash,
        )
        .on_conflict_do_nothing(index_elements=[JobRecord.project, JobRecord.idempotency_key])
        .returning(JobRecord)
    )
    return record


def _sources(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every `file-…` and `job-…` that the spec names, and where."""
    if isinstance(value, str):
        if OWN_ID.match(value):
            yield value, path
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _sources(part, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _sources(part, f"{path}.{number}")


def _refuse_absent(session: Session, project: str, sources: dict[str, str]) -> None:
    """The rows are locked against removal until this job, which names them, is committed."""
    for source, path in sources.items():
        record = FileRecord if source.startswith("file-") else JobRecord
        found = session.scalar(
            select(record).where(record.id == source, record.project == project).with_for_update(read=True)
        )
        if found is None:
            how = "upload it with POST /v1/files" if record is FileRecord else "list yours with GET /v1/jobs"
            raise SpecInvalid(f"There is no {source}; {how}.", param=path)
        if isinstance(found, JobRecord) and found.status != Status.succeeded:
            raise SpecInvalid(
                f"{source} is {found.status}; only a job that succeeded has a model to start from.", param=path
            )
