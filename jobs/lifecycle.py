"""Every way a job may change. Each function takes a session and is one step of its transaction.

A worker's functions take the attempt's number and raise AttemptStale when another attempt, or nobody, owns the job.
Nothing here talks to the broker: the caller enqueues what became queued after its commit, and `jobs.sweeping` sends
again what got lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from jobs.listing import events, find, list_jobs, reader_of
from jobs.moves import OWNED, add_event, lock, move, own, printable
from jobs.places import job_prefix
from jobs.records import ArtifactRecord, JobRecord, now
from jobs.submitting import submit
from squeeze.errors import Conflict, JobFinal, JobNotFinal, JobNotRetryable, SqueezeError, WorkerLost
from squeeze.objects import FINAL, JobError, Result, Stage, Status, Usage
from squeeze.specs.job_spec import JobSpec

__all__ = [  # submit and the reads live in files of their own
    "Claim",
    "NewArtifact",
    "Swept",
    "cancel",
    "cancelled",
    "claim",
    "delete",
    "events",
    "fail",
    "find",
    "list_jobs",
    "note",
    "progress",
    "publish",
    "release",
    "renew",
    "retry",
    "submit",
    "sweep",
]


@dataclass(frozen=True)
class Claim:
    """What a worker gets with a job: the attempt's number is the token of all its writes."""

    job_id: str
    project: str
    spec: JobSpec
    attempt: int
    created_at: datetime
    started_at: datetime


@dataclass(frozen=True)
class NewArtifact:
    """A file that lies in storage and becomes the job's when it is published."""

    filename: str
    bytes: int
    sha256: str
    format: str
    storage_key: str
    content_type: str = "application/octet-stream"


@dataclass(frozen=True)
class Swept:
    """What a sweep changed. `requeued` are (job_id, queue, priority) to enqueue after the commit."""

    requeued: list[tuple[str, str, int]]
    lost: list[str]
    """Failed for good: their workers disappeared too often."""
    cancelled: list[str]


def cancel(session: Session, project: str, job_id: str) -> JobRecord:
    """Asks a job to stop; asking again changes nothing. Raises JobFinal when it has ended otherwise."""
    record = lock(session, project, job_id)
    at = now()
    if record.status in (Status.succeeded, Status.failed):
        raise JobFinal(f"{job_id} has already {record.status}; there is nothing left to cancel.")
    if record.status == Status.queued:
        record.cancel_requested_at = at
        move(session, record, Status.cancelled, at, "cancelled before it started")
    elif record.status == Status.running:
        record.cancel_requested_at = at
        move(session, record, Status.cancelling, at, "cancel was asked for")
    return record


def retry(session: Session, project: str, job_id: str) -> JobRecord:
    """Queues a failed or cancelled job again; the next attempt resumes from what the last one kept."""
    record = lock(session, project, job_id)
    if record.status == Status.succeeded:
        raise JobNotRetryable(f"{job_id} has succeeded; submit a new job to compress again.")
    _refuse_unfinished(record)
    record.crashes = 0
    record.error = None
    move(session, record, Status.queued, now(), "queued again by its user")
    return record


def delete(session: Session, project: str, job_id: str) -> list[str]:
    """Removes a final job; the caller removes what lies under the storage prefixes returned, after the commit."""
    record = lock(session, project, job_id)
    _refuse_unfinished(record)
    reader = reader_of(session, job_id)
    if reader is not None:
        raise Conflict(f"{job_id} is the model of {reader}, which has not ended; cancel that job, or wait for its end.")
    session.delete(record)
    return [job_prefix(job_id)]


def claim(session: Session, job_id: str, *, worker: str, lease_seconds: float) -> Claim | None:
    """Takes a queued job for a worker, or None: of any number of workers that try, one compare-and-swap wins."""
    at = now()
    record = session.scalar(
        update(JobRecord)
        .where(JobRecord.id == job_id, JobRecord.status == Status.queued)
        .values(
            status=Status.running,
            attempt=JobRecord.attempt + 1,
            worker=worker,
            started_at=at,
            lease_expires_at=at + timedelta(seconds=lease_seconds),
        )
        .returning(JobRecord)
        .execution_options(populate_existing=True, synchronize_session=False)
    )
    if record is None:
        return None
    message = f"attempt {record.attempt} started"
    add_event(session, record, "status", message, {"status": Status.running.value, "worker": worker}, at)
    return Claim(record.id, record.project, JobSpec.model_validate(record.spec), record.attempt, record.created_at, at)


def renew(session: Session, job_id: str, attempt: int, lease_seconds: float) -> bool:
    """Keeps the job for another lease. True: its user asked to cancel."""
    record = own(session, job_id, attempt)
    record.lease_expires_at = now() + timedelta(seconds=lease_seconds)
    return record.status == Status.cancelling


def progress(
    session: Session,
    job_id: str,
    attempt: int,
    *,
    stage: Stage | None = None,
    fraction: float | None = None,
    done: int | None = None,
    total: int | None = None,
    unit: str | None = None,
    eta_seconds: float | None = None,
    model_revision: str | None = None,
) -> None:
    """Where the attempt stands; what is not given stays. Events tell a new stage and every whole percent, no more."""
    record = own(session, job_id, attempt)
    at = now()
    before = int(100 * record.fraction)
    if model_revision is not None:
        record.model_revision = model_revision
    if fraction is not None:
        record.fraction = min(max(fraction, 0.0), 1.0)
    if stage is not None and stage != record.stage:
        record.stage = Stage(stage)
        record.done = record.total = record.unit = None
        add_event(session, record, "stage", record.stage.value, {"stage": record.stage.value}, at)
    if done is not None:
        record.done = done
    if total is not None:
        record.total = total
    if unit is not None:
        record.unit = unit
    if eta_seconds is not None:
        record.eta_seconds = max(eta_seconds, 0.0)
    if int(100 * record.fraction) != before:
        add_event(session, record, "progress", f"{int(100 * record.fraction)} %", _standing(record), at)


def note(session: Session, job_id: str, attempt: int, type: str, message: str, data: dict[str, Any]) -> None:
    """Something that the user should read, told by the worker."""
    add_event(session, own(session, job_id, attempt), type, message, data, now())


def publish(
    session: Session,
    job_id: str,
    attempt: int,
    *,
    artifacts: Sequence[NewArtifact],
    result: Result,
    report: dict[str, Any],
    usage: Usage,
) -> bool:
    """The job succeeds with all it made, at once. False: it was cancelled meanwhile, and nothing is published."""
    record = own(session, job_id, attempt)
    at = now()
    record.usage = _sum(record.usage, usage)
    if record.status == Status.cancelling:
        move(session, record, Status.cancelled, at, "cancelled; what it had made is not published")
        return False
    session.add_all(ArtifactRecord(job_id=job_id, **vars(artifact)) for artifact in artifacts)
    record.result = result.model_dump(mode="json")
    record.report = report
    record.fraction = 1.0
    move(session, record, Status.succeeded, at, f"succeeded with {len(artifacts)} artifacts")
    return True


def fail(
    session: Session,
    job_id: str,
    attempt: int,
    error: SqueezeError,
    usage: Usage | None = None,
    max_attempts: int = 3,
) -> Status:
    """The attempt ended with an error. Answers where the job went: the caller enqueues it when that is `queued`."""
    record = own(session, job_id, attempt)
    if usage is not None:
        record.usage = _sum(record.usage, usage)
    return _end_attempt(session, record, error, max_attempts, now())


def cancelled(session: Session, job_id: str, attempt: int) -> None:
    """The worker has stopped as it was asked to."""
    move(session, own(session, job_id, attempt), Status.cancelled, now(), "cancelled")


def release(session: Session, job_id: str, attempt: int) -> Status:
    """A worker that shuts down in good order gives the job back; that is no crash of the job."""
    record = own(session, job_id, attempt)
    if record.status == Status.cancelling:
        move(session, record, Status.cancelled, now(), "cancelled")
    else:
        move(session, record, Status.queued, now(), "given back by a worker that shut down")
    return record.status


def sweep(session: Session, *, now: datetime, max_attempts: int) -> Swept:
    """Ends the attempts whose lease ran out: their workers are gone."""
    swept = Swept([], [], [])
    overdue = session.scalars(
        select(JobRecord)
        .where(JobRecord.status.in_(OWNED), JobRecord.lease_expires_at < now)
        .order_by(JobRecord.id)
        .with_for_update(skip_locked=True)  # a row that its worker or another sweep holds is not ours to end
        .execution_options(populate_existing=True)
    ).all()
    for record in overdue:
        error = WorkerLost(
            f"The worker of attempt {record.attempt} stopped answering; look at its machine, then retry the job."
        )
        ended_as = _end_attempt(session, record, error, max_attempts, now)
        if ended_as == Status.queued:
            swept.requeued.append((record.id, record.queue, record.priority))
        else:
            (swept.lost if ended_as == Status.failed else swept.cancelled).append(record.id)
    return swept


def _refuse_unfinished(record: JobRecord) -> None:
    if record.status not in FINAL:
        raise JobNotFinal(f"{record.id} is {record.status}; cancel it first, or wait for its end.")


def _end_attempt(session: Session, record: JobRecord, error: SqueezeError, max_attempts: int, at: datetime) -> Status:
    """What becomes of a job whose attempt broke off: cancelled as asked, queued again as long as that may help."""
    if record.status == Status.cancelling:
        move(session, record, Status.cancelled, at, "cancelled", {"error": error.code})
        return record.status
    message = printable(error.message)
    record.crashes += error.retryable
    if error.retryable and record.crashes < max_attempts:
        detail = {"error": error.code, "crashes": record.crashes, "max_attempts": max_attempts}
        move(session, record, Status.queued, at, f"queued again: {message}", detail)
        return record.status
    record.error = JobError(code=error.code, message=message, retryable=error.retryable).model_dump()
    move(session, record, Status.failed, at, message, {"error": error.code})
    return record.status


def _standing(record: JobRecord) -> dict[str, Any]:
    stage = None if record.stage is None else record.stage.value
    return {
        "fraction": record.fraction,
        "stage": stage,
        "done": record.done,
        "total": record.total,
        "unit": record.unit,
        "eta_seconds": record.eta_seconds,
    }


def _sum(earlier: dict[str, Any] | None, usage: Usage) -> dict[str, Any]:
    """What all attempts of the job used together."""
    if earlier is None:
        return usage.model_dump(mode="json")
    before = Usage.model_validate(earlier)
    energy = [wh for wh in (before.energy_wh, usage.energy_wh) if wh is not None]
    return Usage(
        gpu_seconds=before.gpu_seconds + usage.gpu_seconds,
        cpu_seconds=before.cpu_seconds + usage.cpu_seconds,
        peak_gpu_bytes=max(before.peak_gpu_bytes, usage.peak_gpu_bytes),
        peak_host_bytes=max(before.peak_host_bytes, usage.peak_host_bytes),
        energy_wh=sum(energy) if energy else None,
    ).model_dump(mode="json")
