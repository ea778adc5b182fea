"""What must hold after `scripts/chaos.py` has killed everything: read from the database and the storage themselves."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath

from sqlalchemy import select

from jobs.database import Database
from jobs.moves import MOVES
from jobs.records import ArtifactRecord, EventRecord, JobRecord
from squeeze.objects import FINAL, Status
from storage import Storage

# They tell of seconds and memory, or quote what does.
TOLD = ("report.json", "README.md")


@dataclass(frozen=True)
class Life:
    """Everything that was written down of one job."""

    job: JobRecord
    events: Sequence[EventRecord]
    artifacts: Sequence[ArtifactRecord]
    stored: Sequence[str]

    @property
    def prefix(self) -> str:
        return f"jobs/{self.job.id}/{self.job.attempt}/"


@dataclass(frozen=True)
class Check:
    """What was to hold of `looked` jobs, and where it does not."""

    holds: str
    looked: int
    broken: Sequence[str]


def lives(database: Database, storage: Storage) -> dict[str, Life]:
    """By job id."""
    with database.read() as session:
        return {
            job.id: Life(
                job,
                session.scalars(select(EventRecord).where(EventRecord.job_id == job.id).order_by(EventRecord.id)).all(),
                session.scalars(select(ArtifactRecord).where(ArtifactRecord.job_id == job.id)).all(),
                list(storage.list(f"jobs/{job.id}")),
            )
            for job in session.scalars(select(JobRecord).order_by(JobRecord.id)).all()
        }


def checks(
    found: Mapping[str, Life], wanted: Mapping[str, str], calm: Mapping[str, Life], storage: Storage, scratch: Path
) -> list[Check]:
    """wanted: job id -> name of its recipe. calm: by recipe, a job of it that nothing disturbed."""
    chosen = {job_id: found[job_id] for job_id in wanted if job_id in found}

    def each(holds: str, broken: Callable[[Life], str | None]) -> Check:
        told = {job_id: broken(life) for job_id, life in chosen.items()}
        return Check(holds, len(chosen), [f"{job_id}: {why}" for job_id, why in told.items() if why])

    known = {*wanted, *(life.job.id for life in calm.values())}
    listed = {key for life in found.values() for key in life.stored}
    return [
        Check("no job is lost, none came twice", len(wanted), sorted(known ^ found.keys())),
        each("it is final", lambda life: None if life.job.status in FINAL else life.job.status),
        each("it succeeded", lambda life: None if life.job.status == Status.succeeded else str(life.job.error)),
        each("its life is one of legal moves, told once each", _illegal),
        each("it was published once, by its last attempt", _published_twice),
        each("the storage holds what was published, and nothing else", _leftovers),
        each("what is stored has the SHA-256 that was published", lambda life: _damaged(life, storage)),
        each("it made the same bytes as undisturbed", lambda life: _differs(life, calm[wanted[life.job.id]])),
        Check("no other object is left in the storage", len(listed), sorted({*storage.list()} - listed)),
        Check("no work directory is left", len(found), sorted(path.name for path in scratch.glob("job-*"))),
    ]


def _illegal(life: Life) -> str | None:
    numbers = [event.id for event in life.events]
    if numbers != list(range(1, len(numbers) + 1)):
        return f"its events are numbered {numbers}"
    attempts = [event.attempt for event in life.events]
    if attempts != sorted(attempts):
        return f"its attempts came as {attempts}"
    statuses = [Status(event.data["status"]) for event in life.events if event.type == "status"]
    for before, after in pairwise(statuses):
        if after not in MOVES[before]:
            return f"it went from {before} to {after}"
    return None if statuses[:1] == [Status.queued] else "it did not begin as queued"


def _published_twice(life: Life) -> str | None:
    twice = [name for name, count in Counter(row.filename for row in life.artifacts).items() if count > 1]
    elsewhere = [row.storage_key for row in life.artifacts if not row.storage_key.startswith(life.prefix)]
    successes = [event for event in life.events if event.data.get("status") == Status.succeeded]
    if twice or elsewhere or len(successes) != 1:
        return f"{len(successes)} times succeeded, twice {twice}, by other attempts {elsewhere}"
    return None


def _leftovers(life: Life) -> str | None:
    keys = {row.storage_key for row in life.artifacts}
    return None if keys == {*life.stored} else f"{sorted(keys ^ {*life.stored})}"


def _damaged(life: Life, storage: Storage) -> str | None:
    for row in life.artifacts:
        digest = hashlib.sha256()
        for chunk in storage.read(row.storage_key):
            digest.update(chunk)
        if digest.hexdigest() != row.sha256:
            return row.filename
    return None


def _differs(life: Life, calm: Life) -> str | None:
    ours, theirs = _digests(life), _digests(calm)
    names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    return f"{names}" if names else None


def _digests(life: Life) -> dict[str, str]:
    return {row.filename: row.sha256 for row in life.artifacts if PurePosixPath(row.filename).name not in TOLD}
