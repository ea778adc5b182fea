"""What is read of jobs: one, a page of them, their events, artifacts and report, and counts for the metrics."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import exists, func, select
from sqlalchemy.orm import Session

from jobs.moves import absent, askable
from jobs.records import ArtifactRecord, EventRecord, JobRecord, LabelRecord, StepRecord, UseRecord
from squeeze.errors import ArtifactNotFound, CursorInvalid, ReportNotReady
from squeeze.objects import FINAL, Status


def find(session: Session, project: str, job_id: str) -> JobRecord:
    """The project's job; another project's is as unknown as none."""
    record = session.scalar(select(JobRecord).where(JobRecord.id == askable(job_id), JobRecord.project == project))
    if record is None:
        raise absent(job_id)
    return record


def list_jobs(
    session: Session,
    project: str,
    *,
    after: str | None = None,
    limit: int = 20,
    status: Status | None = None,
    kind: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[list[JobRecord], bool]:
    """A page, newest first, and whether more follow. `after` is the last id of the page before."""
    query = select(JobRecord).where(JobRecord.project == project)
    if after is not None:
        known = exists().where(JobRecord.id == askable(after), JobRecord.project == project)
        if not session.scalar(select(known)):
            raise CursorInvalid("`after` names no job of yours; take `last_id` of the page before.", param="after")
        query = query.where(JobRecord.id < after)
    if status is not None:
        query = query.where(JobRecord.status == status)
    if kind is not None:
        if "\0" in kind:
            return [], False
        query = query.where(exists().where(StepRecord.job_id == JobRecord.id, StepRecord.kind == kind))
    for key, value in (metadata or {}).items():
        if "\0" in key or "\0" in value:  # no job can have it, and PostgreSQL would not take the question
            return [], False
        query = query.where(
            exists().where(LabelRecord.job_id == JobRecord.id, LabelRecord.key == key, LabelRecord.value == value)
        )
    records = session.scalars(query.order_by(JobRecord.id.desc()).limit(limit + 1)).all()
    return list(records[:limit]), len(records) > limit


def events(session: Session, job_id: str, after: int = 0, limit: int = 100) -> list[EventRecord]:
    """The events past `after`, oldest first. The caller has found the job in its project."""
    after = min(max(after, 0), 2**31 - 1)  # a client's number may be larger than any column
    query = select(EventRecord).where(EventRecord.job_id == job_id, EventRecord.id > after)
    return list(session.scalars(query.order_by(EventRecord.id).limit(limit)))


def artifacts(session: Session, project: str, job_id: str) -> list[ArtifactRecord]:
    """What the job published, by name; empty before it succeeds."""
    find(session, project, job_id)
    query = select(ArtifactRecord).where(ArtifactRecord.job_id == job_id)
    return list(session.scalars(query.order_by(ArtifactRecord.filename)))


def artifact(session: Session, project: str, job_id: str, filename: str) -> ArtifactRecord:
    """One file that the job published."""
    find(session, project, job_id)
    record = None if "\0" in filename else session.get(ArtifactRecord, (job_id, filename))
    if record is None:
        raise ArtifactNotFound(f"{job_id} has no such artifact; list them with GET /v1/jobs/{job_id}/artifacts.")
    return record


def report(session: Session, project: str, job_id: str) -> dict[str, Any]:
    """The job's report."""
    row = session.execute(
        select(JobRecord.report, JobRecord.status).where(JobRecord.id == askable(job_id), JobRecord.project == project)
    ).one_or_none()
    if row is None:
        raise absent(job_id)
    if row.report is None:
        raise ReportNotReady(f"{job_id} is {row.status.value}; a report is written when a job succeeds.")
    return dict(row.report)


def reader_of(session: Session, source_id: str) -> str | None:
    """A job that has not ended and reads that file, or that job's result."""
    return session.scalar(
        select(JobRecord.id)
        .join(UseRecord, UseRecord.job_id == JobRecord.id)
        .where(UseRecord.source_id == source_id, JobRecord.status.not_in(FINAL))
        .limit(1)
    )


def count(session: Session) -> dict[tuple[str, Status], int]:
    """Jobs of all projects by (queue, status)."""
    query = select(JobRecord.queue, JobRecord.status, func.count()).group_by(JobRecord.queue, JobRecord.status)
    return {(queue, status): number for queue, status, number in session.execute(query)}
