"""API keys: made once, shown once, kept as SHA-256. Each belongs to a project."""

import hashlib
import re
import secrets
from datetime import datetime, timedelta

from sqlalchemy import exists, or_, select, update
from sqlalchemy.orm import Session

from jobs.records import KeyRecord, new_id, now
from squeeze.errors import NotFound, SpecInvalid

PREFIX = "sq-"
_PROJECT = re.compile(r"[a-z0-9][a-z0-9-]{0,62}", re.ASCII)
_SHOWN_CHARACTERS = len(PREFIX) + 6


def create(session: Session, project: str, name: str) -> tuple[KeyRecord, str]:
    """A new key and its plaintext, which is nowhere afterwards."""
    if not _PROJECT.fullmatch(project):
        raise SpecInvalid("A project is 1 to 63 lower-case letters, digits and dashes.", param="project")
    if not (0 < len(name) <= 200 and name.isprintable()):
        raise SpecInvalid("A key's name has 1 to 200 printable characters.", param="name")
    plaintext = PREFIX + secrets.token_urlsafe(32)
    record = KeyRecord(
        id=new_id("key"),
        project=project,
        hash=_hash(plaintext),
        prefix=plaintext[:_SHOWN_CHARACTERS],
        name=name,
        created_at=now(),
    )
    session.add(record)
    session.flush()
    return record, plaintext


def find(session: Session, plaintext: str) -> KeyRecord | None:
    """The key, unless it is unknown or revoked. 256 random bits need no slow hash."""
    return session.scalar(select(KeyRecord).where(KeyRecord.hash == _hash(plaintext), KeyRecord.revoked_at.is_(None)))


def used(session: Session, key_id: str, *, at: datetime, every_seconds: float = 60.0) -> None:
    """Remembers when a key was last used, at most once in a while: a write for each request would be dear."""
    stale = KeyRecord.last_used_at < at - timedelta(seconds=every_seconds)
    session.execute(
        update(KeyRecord)
        .where(KeyRecord.id == key_id, or_(KeyRecord.last_used_at.is_(None), stale))
        .values(last_used_at=at)
    )


def revoke(session: Session, key_id: str) -> KeyRecord:
    """Ends a key for good; again changes nothing."""
    record = session.scalar(select(KeyRecord).where(KeyRecord.id == key_id).with_for_update())
    if record is None:
        raise NotFound(f"There is no key {key_id}; list them with `python -m jobs keys list`.")
    if record.revoked_at is None:
        record.revoked_at = now()
    return record


def list_keys(session: Session, project: str | None = None) -> list[KeyRecord]:
    """All keys, oldest first, or those of a project."""
    query = select(KeyRecord).order_by(KeyRecord.id)
    return list(session.scalars(query if project is None else query.where(KeyRecord.project == project)))


def any_active(session: Session) -> bool:
    """Whether a key exists that is not revoked; while none does, the service is open on loopback."""
    return bool(session.scalar(select(exists().where(KeyRecord.revoked_at.is_(None)))))


def _hash(plaintext: str) -> str:
    return hashlib.sha256(plaintext.encode("utf-8", "replace")).hexdigest()
