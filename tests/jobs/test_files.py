"""Uploaded files: listed by page, kept while a job needs them."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy.orm import Session

from jobs import files, lifecycle, views
from jobs.database import Database
from jobs.records import FileRecord, new_id
from squeeze.errors import CursorInvalid, FileInUse, FileNotFound, SpecInvalid
from tests.jobs.making import claim, submit


def _add(session: Session, *, project: str = "default", purpose: str = "calibration") -> FileRecord:
    return files.add(
        session,
        file_id=new_id("file"),
        project=project,
        filename="text \udce9\0.txt",
        size_bytes=2**40,
        sha256="ab" * 32,
        purpose=purpose,
    )


def test_a_file_is_found_by_its_own_project_alone(database: Database) -> None:
    with database.write() as session:
        record = _add(session)
        assert files.find(session, "default", record.id) is record
        assert record.storage_key == f"files/{record.id}"
        for project, file_id in (("theirs", record.id), ("default", "file-\0"), ("default", "")):
            with pytest.raises(FileNotFound):
                files.find(session, project, file_id)
            with pytest.raises(FileNotFound):
                files.remove(session, project, file_id)


def test_a_file_has_a_wire_form(database: Database) -> None:
    with database.write() as session:
        record = _add(session)
    with database.read() as session:
        file = views.file(files.find(session, "default", record.id))
    assert (file.id, file.filename, file.bytes, file.purpose) == (record.id, "text ?\ufffd.txt", 2**40, "calibration")


def test_files_are_listed_by_page_newest_first(database: Database) -> None:
    with database.write() as session:
        made = [_add(session).id for _ in range(3)]
        evaluation = _add(session, purpose="evaluation").id
        _add(session, project="theirs")
        first, more = files.list_files(session, "default", limit=2)
        assert ([record.id for record in first], more) == ([evaluation, made[2]], True)
        second, more = files.list_files(session, "default", after=made[2], limit=2)
        assert ([record.id for record in second], more) == ([made[1], made[0]], False)
        assert [record.id for record in files.list_files(session, "default", purpose="evaluation")[0]] == [evaluation]
        with pytest.raises(CursorInvalid):
            files.list_files(session, "theirs", after=made[0])


@pytest.mark.parametrize("part", ["data", "evaluation"])
def test_a_file_stays_while_a_job_that_has_not_ended_names_it(database: Database, part: str) -> None:
    with database.write() as session:
        record = _add(session)
        job = submit(session, **{part: {"source": record.id}})
        for end in (lambda: claim(session, job.id), lambda: lifecycle.cancel(session, "default", job.id)):
            with pytest.raises(FileInUse, match=job.id):
                files.remove(session, "default", record.id)
            end()
        with pytest.raises(FileInUse):
            files.remove(session, "default", record.id)
        lifecycle.cancelled(session, job.id, 1)
        assert files.remove(session, "default", record.id) == f"files/{record.id}"
        with pytest.raises(FileNotFound):
            files.find(session, "default", record.id)


def test_a_removal_and_a_submit_at_once_never_leave_a_job_without_its_file(database: Database) -> None:
    for _ in range(10):
        with database.write() as session:
            file_id = _add(session).id
        together = threading.Barrier(2)

        def remove(file_id: str = file_id, together: threading.Barrier = together) -> bool:
            together.wait()
            try:
                with database.write() as session:
                    files.remove(session, "default", file_id)
            except FileInUse:
                return False
            return True

        def name(file_id: str = file_id, together: threading.Barrier = together) -> bool:
            together.wait()
            try:
                with database.write() as session:
                    submit(session, data={"source": file_id})
            except SpecInvalid:
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            removed, named = pool.submit(remove), pool.submit(name)
            assert removed.result() is not named.result()
