"""The sweep on a real database and broker: it rings again for jobs whose message was lost, and only for them."""

from collections.abc import Iterator
from datetime import timedelta

import pytest
from celery import Celery

from jobs import lifecycle
from jobs.database import Database
from jobs.queue import celery_app, enqueue, waiting
from jobs.records import JobRecord, now
from jobs.sweeping import OVERDUE_SECONDS, SETTLED_SECONDS, sweep_once, unanswered
from squeeze.errors import ServiceUnavailable
from squeeze.objects import Status
from tests import servers
from tests.jobs.making import bring, claim, expire, submit


@pytest.fixture
def app(valkey_url: str) -> Iterator[Celery]:
    app = celery_app(valkey_url)
    yield app
    app.close()


def _age(database: Database, job_id: str, seconds: float) -> None:
    """Makes a job's message one that was sent so long ago."""
    with database.write() as session:
        session.get_one(JobRecord, job_id).enqueued_at = now() - timedelta(seconds=seconds)


def _submitted(database: Database, number: int = 1, **fields: object) -> list[str]:
    with database.write() as session:
        return [submit(session, **fields).id for _ in range(number)]


def test_a_job_whose_message_was_lost_is_sent_again_once(database: Database, app: Celery) -> None:
    on_cpu, on_gpu = _submitted(database), _submitted(database, limits={"gpus": 1})
    for job_id in (*on_cpu, *on_gpu):
        _age(database, job_id, 2 * SETTLED_SECONDS)
    for _ in range(3):
        sweep_once(database, app, max_attempts=3)
    assert (waiting(app, "cpu"), waiting(app, "gpu")) == (1, 1)


def test_a_message_that_is_just_being_sent_is_not_sent_again(database: Database, app: Celery) -> None:
    _submitted(database)
    sweep_once(database, app, max_attempts=3)
    assert waiting(app, "cpu") == 0


def test_a_long_queue_is_not_filled_with_second_messages(database: Database, app: Celery) -> None:
    for job_id in _submitted(database, 3):
        enqueue(app, job_id, "cpu", 0)
        _age(database, job_id, 10 * OVERDUE_SECONDS)
    sweep_once(database, app, max_attempts=3)
    assert waiting(app, "cpu") == 3


def test_one_lost_message_among_many_is_sent_again_when_it_is_overdue(database: Database) -> None:
    lost, fresh = _submitted(database, 2)
    _age(database, lost, 2 * OVERDUE_SECONDS)
    _age(database, fresh, 2 * SETTLED_SECONDS)
    with database.write() as session:
        assert unanswered(session, now=now(), waiting={"cpu": 1}) == [(lost, "cpu", 0)]
        assert unanswered(session, now=now(), waiting={"cpu": 1}) == []


def test_jobs_that_do_not_wait_are_not_sent(database: Database, app: Celery) -> None:
    for status in Status:
        if status != Status.queued:
            with database.write() as session:
                job_id = bring(session, status).id
            _age(database, job_id, 10 * OVERDUE_SECONDS)
    sweep_once(database, app, max_attempts=3)
    assert waiting(app, "cpu") == 0


def test_a_lost_worker_s_job_is_queued_and_sent(database: Database, app: Celery) -> None:
    with database.write() as session:
        record = bring(session, Status.running, priority=4)
        expire(session, record)
    assert sweep_once(database, app, max_attempts=3).requeued == [(record.id, "cpu", 4)]
    assert waiting(app, "cpu") == 1
    with database.write() as session:
        assert claim(session, record.id).attempt == 2


def test_losing_the_broker_with_all_its_messages_loses_no_job(database: Database) -> None:
    job_ids = _submitted(database, 3)
    with servers.valkey_server() as (url, server):
        gone = celery_app(url)
        for job_id in job_ids:
            enqueue(gone, job_id, "cpu", 0)
        server.kill()
        server.wait()
        for job_id in job_ids:
            _age(database, job_id, 2 * SETTLED_SECONDS)
        with pytest.raises(ServiceUnavailable):
            sweep_once(database, gone, max_attempts=3)
        gone.close()
    with servers.valkey_server() as (url, _):
        app = celery_app(url)
        sweep_once(database, app, max_attempts=3)
        assert waiting(app, "cpu") == 3
        app.close()


def test_the_sweep_counts_crashes_though_the_broker_is_down(database: Database) -> None:
    with database.write() as session:
        record = bring(session, Status.running)
        expire(session, record)
    with servers.valkey_server() as (url, server):
        server.kill()
        server.wait()
        app = celery_app(url)
        with pytest.raises(ServiceUnavailable):
            sweep_once(database, app, max_attempts=1)
        app.close()
    with database.read() as session:
        assert lifecycle.find(session, "default", record.id).status == Status.failed
