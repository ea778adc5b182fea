"""The rows of the database: jobs with their events and artifacts, uploaded files, API keys."""

import secrets
import threading
import time
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Enum,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from squeeze.objects import Stage, Status

_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"
_last_id = 0
_id_lock = threading.Lock()


def now() -> datetime:
    """The present in UTC; every time in the database is one of these."""
    return datetime.now(UTC)


def new_id(prefix: str) -> str:
    """`prefix-` and 26 characters: 48 bits of milliseconds, 80 of chance (a ULID in lower case).

    Ids sort by time, and strictly by creation within a process, so a list by id is a list by age.
    """
    global _last_id  # noqa: PLW0603 (a later id must know the earlier one)
    with _id_lock:
        fresh = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
        _last_id = fresh if fresh > _last_id else _last_id + 1 + secrets.randbits(40)
        value = _last_id
    return f"{prefix}-" + "".join(_CROCKFORD[value >> shift & 31] for shift in range(125, -1, -5))


class Moment(TypeDecorator[datetime]):
    """An aware time in UTC. SQLite keeps no zone: what goes in is UTC, what comes out is said to be."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy reads it as is)
        datetime: Moment,
        dict[str, Any]: JSON(none_as_null=True),
        Status: Enum(Status, native_enum=False, length=16),
        Stage: Enum(Stage, native_enum=False, length=16),
    }


def _of_job() -> Mapped[str]:
    return mapped_column(String, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)


class JobRecord(Base):
    """One job. Its status changes in `jobs.lifecycle` alone."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str]
    spec: Mapped[dict[str, Any]]
    status: Mapped[Status]
    stage: Mapped[Stage | None]
    fraction: Mapped[float] = mapped_column(default=0.0)
    done: Mapped[int | None] = mapped_column(BigInteger)
    total: Mapped[int | None] = mapped_column(BigInteger)
    unit: Mapped[str | None]
    eta_seconds: Mapped[float | None]
    attempt: Mapped[int] = mapped_column(default=0)
    """Number of the present or last attempt: the fencing token of its worker's writes."""
    crashes: Mapped[int] = mapped_column(default=0)
    """Retryable failures since the job was submitted or retried by its user."""
    queue: Mapped[str]
    priority: Mapped[int]
    created_at: Mapped[datetime]
    queued_at: Mapped[datetime]
    enqueued_at: Mapped[datetime]
    """When a message was last due to be sent; the sender may have died before it was."""
    started_at: Mapped[datetime | None]
    """Of the present or last attempt."""
    finished_at: Mapped[datetime | None]
    lease_expires_at: Mapped[datetime | None]
    worker: Mapped[str | None]
    cancel_requested_at: Mapped[datetime | None]
    model_revision: Mapped[str | None]
    error: Mapped[dict[str, Any] | None]
    result: Mapped[dict[str, Any] | None]
    usage: Mapped[dict[str, Any] | None]
    report: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)
    """Loaded on access alone (it may be megabytes, and a list needs none): read it with `jobs.listing.report`."""
    last_event: Mapped[int] = mapped_column(default=0)
    idempotency_key: Mapped[str | None]
    body_hash: Mapped[str]

    __table_args__ = (
        UniqueConstraint("project", "idempotency_key"),
        Index(None, "project", "id"),
        Index(None, "status", "lease_expires_at"),
        Index(None, "status", "queue", "enqueued_at"),
    )


class EventRecord(Base):
    """Something that happened to a job; ids are 1, 2, 3 … within it."""

    __tablename__ = "events"

    job_id: Mapped[str] = _of_job()
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    attempt: Mapped[int]
    created_at: Mapped[datetime]
    type: Mapped[str]
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any]]


class ArtifactRecord(Base):
    """A file that a job published."""

    __tablename__ = "artifacts"

    job_id: Mapped[str] = _of_job()
    filename: Mapped[str] = mapped_column(primary_key=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    format: Mapped[str]
    storage_key: Mapped[str]
    content_type: Mapped[str]


class StepRecord(Base):
    """A step of a job, so that lists can be filtered by kind with an index and the same SQL everywhere."""

    __tablename__ = "steps"

    job_id: Mapped[str] = _of_job()
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str]
    method: Mapped[str]


class LabelRecord(Base):
    """One entry of a job's `metadata`, so that lists can be filtered by it."""

    __tablename__ = "labels"

    job_id: Mapped[str] = _of_job()
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]

    __table_args__ = (Index(None, "key", "value", "job_id"),)


class UseRecord(Base):
    """A job reads an uploaded file or an earlier job's result, which therefore must stay until it has ended."""

    __tablename__ = "uses"

    job_id: Mapped[str] = _of_job()
    source_id: Mapped[str] = mapped_column(primary_key=True)

    __table_args__ = (Index(None, "source_id"),)


class FileRecord(Base):
    """An uploaded file."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str]
    filename: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    purpose: Mapped[str]
    storage_key: Mapped[str]
    created_at: Mapped[datetime]

    __table_args__ = (Index(None, "project", "id"),)


class KeyRecord(Base):
    """An API key; the key itself is nowhere, only its SHA-256."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str]
    hash: Mapped[str] = mapped_column(unique=True)
    prefix: Mapped[str]
    name: Mapped[str]
    created_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
