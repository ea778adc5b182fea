"""Uploaded files as rows; their bytes lie in storage under `storage_key`."""

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from jobs.listing import reader_of
from jobs.moves import askable, printable
from jobs.records import FileRecord, now
from squeeze.errors import CursorInvalid, FileInUse, FileNotFound


def storage_key(file_id: str) -> str:
    """Where the bytes of a file lie."""
    return f"files/{file_id}"


def add(
    session: Session, *, file_id: str, project: str, filename: str, size_bytes: int, sha256: str, purpose: str
) -> FileRecord:
    """Records a file whose bytes are stored; `file_id` comes from `records.new_id("file")`, before the upload."""
    record = FileRecord(
        id=file_id,
        project=project,
        filename=printable(filename),
        bytes=size_bytes,
        sha256=sha256,
        purpose=purpose,
        storage_key=storage_key(file_id),
        created_at=now(),
    )
    session.add(record)
    session.flush()
    return record


def find(session: Session, project: str, file_id: str) -> FileRecord:
    """The project's file; another project's is as unknown as none."""
    record = session.scalar(select(FileRecord).where(FileRecord.id == askable(file_id), FileRecord.project == project))
    if record is None:
        raise _absent(file_id)
    return record


def list_files(
    session: Session, project: str, *, after: str | None = None, limit: int = 20, purpose: str | None = None
) -> tuple[list[FileRecord], bool]:
    """A page, newest first, and whether more follow. `after` is the last id of the page before."""
    query = select(FileRecord).where(FileRecord.project == project)
    if after is not None:
        known = exists().where(FileRecord.id == askable(after), FileRecord.project == project)
        if not session.scalar(select(known)):
            raise CursorInvalid("`after` names no file of yours; take `last_id` of the page before.", param="after")
        query = query.where(FileRecord.id < after)
    if purpose is not None:
        query = query.where(FileRecord.purpose == askable(purpose))
    records = session.scalars(query.order_by(FileRecord.id.desc()).limit(limit + 1)).all()
    return list(records[:limit]), len(records) > limit


def remove(session: Session, project: str, file_id: str) -> str:
    """Forgets a file; the caller deletes the storage key returned, after the commit.

    Raises FileInUse when a job that has not ended names it.
    """
    record = session.scalar(
        select(FileRecord)
        .where(FileRecord.id == askable(file_id), FileRecord.project == project)
        .with_for_update()  # a submit that names the file waits, or we wait for it
    )
    if record is None:
        raise _absent(file_id)
    reader = reader_of(session, file_id)
    if reader is not None:
        raise FileInUse(f"{file_id} is needed by {reader}, which has not ended; cancel that job, or wait for its end.")
    session.delete(record)
    return record.storage_key


def _absent(file_id: str) -> FileNotFound:
    return FileNotFound(f"There is no file {askable(file_id) or 'of that id'}; list yours with GET /v1/files.")
