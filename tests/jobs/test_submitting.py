"""How a job is made: once for each Idempotency-Key, with sources that are there."""

import pytest

from jobs import files, lifecycle
from jobs.database import Database
from jobs.records import JobRecord, new_id
from squeeze.errors import IdempotencyMismatch, SpecInvalid
from squeeze.objects import Status
from tests.jobs.making import bring, spec, submit


def _send(database: Database, *, key: str | None, body: str = "body", project: str = "default") -> tuple[str, bool]:
    with database.write() as session:
        record, created = lifecycle.submit(session, project=project, spec=spec(), idempotency_key=key, body_hash=body)
        return record.id, created


def test_a_new_job_is_queued_in_the_queue_of_its_workers(database: Database) -> None:
    with database.write() as session:
        plain, on_gpu = submit(session, priority=3), submit(session, limits={"gpus": 1})
        assert (plain.status, plain.queue, plain.priority, plain.attempt) == (Status.queued, "cpu", 3, 0)
        assert on_gpu.queue == "gpu"


def test_the_same_key_and_body_give_the_same_job(database: Database) -> None:
    first = _send(database, key="k")
    assert first[1] is True
    assert _send(database, key="k") == (first[0], False)


def test_the_same_key_with_another_body_is_refused(database: Database) -> None:
    job_id, _ = _send(database, key="k")
    with pytest.raises(IdempotencyMismatch, match=job_id):
        _send(database, key="k", body="other")


def test_keys_of_two_projects_are_two_keys(database: Database) -> None:
    ours, theirs = _send(database, key="k"), _send(database, key="k", project="theirs")
    assert ours[1] is theirs[1] is True
    assert ours[0] != theirs[0]


def test_without_a_key_every_request_makes_a_job(database: Database) -> None:
    assert _send(database, key=None)[0] != _send(database, key=None)[0]


def test_the_key_of_a_deleted_job_is_free_again(database: Database) -> None:
    job_id, _ = _send(database, key="k")
    with database.write() as session:
        lifecycle.cancel(session, "default", job_id)
        lifecycle.delete(session, "default", job_id)
    again, created = _send(database, key="k", body="other")
    assert created
    assert again != job_id


@pytest.mark.parametrize("key", ["", "a" * 256, "a\0b", "a\nb"])
def test_a_key_that_is_no_key_is_refused(database: Database, key: str) -> None:
    with pytest.raises(SpecInvalid, match="Idempotency-Key"):
        _send(database, key=key)


@pytest.mark.parametrize("metadata", [{"a\0": "b"}, {"a": "b\0"}])
def test_metadata_with_a_zero_byte_is_refused_on_both_databases(database: Database, metadata: dict[str, str]) -> None:
    with pytest.raises(SpecInvalid) as caught, database.write() as session:
        submit(session, metadata=metadata)
    assert caught.value.param == "metadata"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"data": {"source": "file-0123456789"}}, "data.source"),
        ({"evaluation": {"source": "file-0123456789"}}, "evaluation.source"),
        ({"model": "job-0123456789"}, "model"),
    ],
)
def test_a_source_that_is_not_there_is_refused_by_its_field(
    database: Database, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(SpecInvalid) as caught, database.write() as session:
        submit(session, **fields)
    assert caught.value.param == param
    with database.read() as session:
        assert session.query(JobRecord).count() == 0


def test_another_projects_sources_are_not_there(database: Database) -> None:
    with database.write() as session:
        file_id = new_id("file")
        files.add(
            session,
            file_id=file_id,
            project="theirs",
            filename="a.txt",
            size_bytes=1,
            sha256="00",
            purpose="calibration",
        )
        job_id = bring(session, Status.succeeded, project="theirs").id
    for fields in ({"data": {"source": file_id}}, {"model": job_id}):
        with pytest.raises(SpecInvalid), database.write() as session:
            submit(session, **fields)


def test_only_a_job_that_succeeded_is_a_model(database: Database) -> None:
    with database.write() as session:
        running = bring(session, Status.running)
        with pytest.raises(SpecInvalid, match="running"):
            submit(session, model=running.id)
        done = bring(session, Status.succeeded)
        assert submit(session, model=done.id).spec["model"] == done.id


def test_an_id_in_the_metadata_is_no_source(database: Database) -> None:
    with database.write() as session:
        assert submit(session, metadata={"from": "job-0123456789"}).status == Status.queued
