"""Writes how an attempt ended into the database, and clears away what it leaves behind."""

import time
from collections.abc import Callable
from typing import TypeVar

import structlog
from sqlalchemy.orm import Session

from jobs import lifecycle, listing
from jobs.database import Database
from jobs.lifecycle import Claim, NewArtifact
from squeeze.errors import AttemptStale, JobNotFound, ServiceUnavailable, SqueezeError
from squeeze.objects import Result, Status, Usage
from storage import Storage
from workers.request import attempt_prefix
from workers.supervise import Done, Ending, Failed

_AGAIN_SECONDS = 0.5

Answer = TypeVar("Answer")


def settle(database: Database, storage: Storage, claim: Claim, ending: Ending, *, max_attempts: int) -> Status | None:
    """Publishes, fails, confirms the cancel or gives back; where the job went, or None where it was not ours to say.

    A database that is away is waited for until the lease ends; after that the sweep gives the job to somebody, who
    finds the work nearly done.
    """
    log = structlog.get_logger(__name__).bind(job_id=claim.job_id, attempt=claim.attempt)
    try:
        status = _settled(database, claim, ending, max_attempts)
    except ServiceUnavailable:
        log.error("the database did not come back within the lease; the job is left to the sweep")
        return None
    if status is None:
        log.warning("the attempt no longer owns the job; nothing is published")
    if status != Status.succeeded and ending.uploading:
        _forget(storage, claim)
    return status


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


def _forget(storage: Storage, claim: Claim) -> None:
    """Nothing of an attempt that published nothing stays in the storage."""
    try:
        storage.delete_prefix(attempt_prefix(claim.job_id, claim.attempt))
    except SqueezeError as error:
        structlog.get_logger(__name__).warning(
            "an unpublished attempt's files stay in the storage", job_id=claim.job_id, error=error.message
        )
