"""The table of a job's legal moves, and the one function that makes a move."""

from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs.records import EventRecord, JobRecord
from squeeze.errors import AttemptStale, JobNotFound, MoveIllegal
from squeeze.objects import FINAL, Status

MOVES: dict[Status, frozenset[Status]] = {
    Status.queued: frozenset({Status.running, Status.cancelled}),
    Status.running: frozenset({Status.queued, Status.cancelling, Status.succeeded, Status.failed}),
    Status.cancelling: frozenset({Status.cancelled}),
    Status.cancelled: frozenset({Status.queued}),
    Status.failed: frozenset({Status.queued}),
    Status.succeeded: frozenset(),
}
OWNED = (Status.running, Status.cancelling)  # a worker's attempt owns the job


def move(
    session: Session, record: JobRecord, to: Status, at: datetime, message: str, data: dict[str, Any] | None = None
) -> None:
    """Changes the status of a locked record and tells so in an event; raises MoveIllegal outside the table."""
    if to not in MOVES[record.status]:
        raise MoveIllegal(f"A job that is {record.status} can't become {to}.")
    if record.status in OWNED and to not in OWNED:
        record.worker = None
        record.lease_expires_at = None
        record.eta_seconds = None
    if to == Status.queued:
        record.queued_at = record.enqueued_at = at
        record.started_at = record.finished_at = record.stage = record.cancel_requested_at = None
        record.fraction, record.done, record.total, record.unit = 0.0, None, None, None
    if to in FINAL:
        record.finished_at = at
    record.status = to
    add_event(session, record, "status", message, {"status": to.value} | (data or {}), at)


def add_event(session: Session, record: JobRecord, kind: str, message: str, data: dict[str, Any], at: datetime) -> None:
    """The record is locked, so ids have no twins and become visible in their order: a reader can't miss one."""
    record.last_event += 1
    session.add(
        EventRecord(
            job_id=record.id,
            id=record.last_event,
            attempt=record.attempt,
            created_at=at,
            type=kind,
            message=printable(message),
            data=data,
        )
    )


def lock(session: Session, project: str, job_id: str) -> JobRecord:
    """The project's job, locked until the transaction ends."""
    record = session.scalar(
        select(JobRecord)
        .where(JobRecord.id == askable(job_id), JobRecord.project == project)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    if record is None:
        raise absent(job_id)
    return record


def own(session: Session, job_id: str, attempt: int) -> JobRecord:
    """The job, locked, if this attempt still owns it; every write of a worker passes here."""
    record = session.scalar(
        select(JobRecord)
        .where(JobRecord.id == job_id, JobRecord.attempt == attempt, JobRecord.status.in_(OWNED))
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    if record is None:
        raise AttemptStale(f"Attempt {attempt} of {job_id} does not own the job any more; its work is not taken.")
    return record


def absent(job_id: str) -> JobNotFound:
    """The error of a job that this project does not have."""
    return JobNotFound(f"There is no job {askable(job_id) or 'of that id'}; list yours with GET /v1/jobs.")


def askable(text: str) -> str:
    """What a user sent, or an empty text where it holds what no id can: PostgreSQL takes no zero byte."""
    return text if text.isascii() and text.isprintable() else ""


def printable(text: str) -> str:
    """Text that every database and JSON reader takes; messages may quote broken file names."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
