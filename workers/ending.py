"""Writes how an attempt ended into the database, and clears away what it leaves behind."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import structlog
from sqlalchemy.orm import Session

from jobs import lifecycle, listing
from jobs.database import Database
from jobs.lifecycle import Claim, NewArtifact
from jobs.moves import OWNED
from jobs.places import attempt_of, attempt_prefix, job_prefix
from jobs.records import JobRecord
from squeeze.errors import AttemptStale, JobNotFound, ServiceUnavailable, SqueezeError
from squeeze.objects import FINAL, Result, Status, Usage
from storage import Storage
from workers.checkpoints import forget
from workers.supervise import Done, Ending, Failed

log = structlog.get_logger(__name__)

LEAVES_NOTHING = (Status.succeeded, Status.cancelled)  # that a training could go on from on another machine

_AGAIN_SECONDS = 0.5

Answer = TypeVar("Answer")


def settle(database: Database, storage: Storage, claim: Claim, ending: Ending, *, max_attempts: int) -> Status | None:
    """Publishes, fails, confirms the cancel or gives back; where the job went, or None where it was not ours to say.

    A database that is away is waited for until the lease ends; after that the sweep gives the job to somebody, who
    finds the work nearly done.
    """
    bound = log.bind(job_id=claim.job_id, attempt=claim.attempt)
    try:
        status = _settled(database, claim, ending, max_attempts)
    except ServiceUnavailable:
        bound.error("the database did not come back within the lease; the job is left to the sweep")
        return None
    if status is None:
        bound.warning("the attempt no longer owns the job; nothing is published")
    if status != Status.succeeded and ending.uploading:
        _forget(storage, claim.job_id, [claim.attempt])
    if status is None or (status in FINAL and claim.attempt > 1):
        clear(database, storage, claim.job_id)
    elif status in LEAVES_NOTHING:
        forget(storage, claim.job_id)
    return status


def clear(database: Database, storage: Storage, job_id: str) -> None:
    """Removes from the storage what earlier attempts left there: those whose workers were killed could not do so.

    An attempt's number never comes again, so one that can't publish any more now never can. Checkpoints go with a job
    that nobody will go on with; a failed one keeps them, for its retry or until it is deleted.
    """
    try:
        with database.read() as session:
            record = session.get(JobRecord, job_id)
        stored = {number for key in storage.list(job_prefix(job_id)) if (number := attempt_of(key)) is not None}
    except SqueezeError as error:
        log.warning("leftovers of earlier attempts stay in the storage", job_id=job_id, error=error.message)
        return
    if record is None:
        dead = stored
    else:
        kept = record.attempt if record.status in (*OWNED, Status.succeeded) else record.attempt + 1
        dead = {attempt for attempt in stored if attempt < kept}
    _forget(storage, job_id, sorted(dead))
    if record is None or record.status in LEAVES_NOTHING:
        forget(storage, job_id)


def usage_of(ending: Ending) -> Usage:
    return Usage(
        gpu_seconds=round(ending.figures.get("gpu_seconds", 0.0), 3),
        cpu_seconds=round(ending.cpu_seconds, 3),
        peak_gpu_bytes=ending.figures.get("peak_gpu_bytes", 0),
        peak_host_bytes=ending.figures.get("peak_host_bytes", ending.peak_bytes),
    )


def _settled(database: Database, claim: Claim, ending: Ending, max_attempts: int) -> Status | None:
    try:
        return _patiently(database, lambda session: _write(session, claim, ending, max_attempts), ending.leased_until)
    except (AttemptStale, JobNotFound):
        pass
    # A commit whose answer was lost looks like an attempt that lost its job: the record tells them apart.
    try:
        record = _patiently(
            database, lambda session: listing.find(session, claim.project, claim.job_id), ending.leased_until
        )
    except JobNotFound:
        return None
    return record.status if record.attempt == claim.attempt else None


def _write(session: Session, claim: Claim, ending: Ending, max_attempts: int) -> Status:
    job, attempt = claim.job_id, claim.attempt
    match ending.how:
        case Done(manifest):
            published = lifecycle.publish(
                session,
                job,
                attempt,
                artifacts=[NewArtifact(**artifact) for artifact in manifest["artifacts"]],
                result=Result.model_validate(manifest["result"]),
                report=manifest["report"],
                usage=usage_of(ending),
            )
            return Status.succeeded if published else Status.cancelled
        case Failed(error):
            return lifecycle.fail(session, job, attempt, error, usage_of(ending), max_attempts)
    if ending.how.why == "cancelled":
        lifecycle.cancelled(session, job, attempt)
        return Status.cancelled
    if ending.how.why == "released":
        return lifecycle.release(session, job, attempt)
    raise AttemptStale(f"attempt {attempt} of {job} ended as {ending.how.why}")


def _patiently(database: Database, write: Callable[[Session], Answer], until: float) -> Answer:
    while True:
        try:
            with database.write() as session:
                return write(session)
        except ServiceUnavailable:
            if time.monotonic() >= until:
                raise
            time.sleep(_AGAIN_SECONDS)


def _forget(storage: Storage, job_id: str, attempts: Sequence[int]) -> None:
    """Nothing of an attempt that published nothing stays in the storage."""
    for attempt in attempts:
        try:
            storage.delete_prefix(attempt_prefix(job_id, attempt))
        except SqueezeError as error:
            log.warning(
                "an unpublished attempt's files stay in the storage",
                job_id=job_id,
                attempt=attempt,
                error=error.message,
            )
