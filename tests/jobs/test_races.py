"""Many workers and clients at once: one wins, nothing is lost, nothing happens twice."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

from jobs import lifecycle, listing
from jobs.database import Database
from jobs.records import JobRecord, now
from squeeze.errors import AttemptStale, JobFinal
from squeeze.objects import Status
from tests.jobs.making import ARTIFACT, bring, claim, expire, publish, spec, submit
from tests.jobs.racing import claim_all, race

WORKERS = 8


def test_of_threads_that_claim_the_same_jobs_one_gets_each(database: Database) -> None:
    with database.write() as session:
        job_ids = [submit(session).id for _ in range(10)]

    def claim_each(worker: str) -> list[str]:
        got = []
        for job_id in job_ids:
            with database.write() as session:
                if lifecycle.claim(session, job_id, worker=worker, lease_seconds=60) is not None:
                    got.append(job_id)
        return got

    got = _at_once([lambda name=f"w{number}": claim_each(name) for number in range(WORKERS)])
    assert sorted(chain.from_iterable(got)) == job_ids
    with database.read() as session:
        assert {record.attempt for record in lifecycle.list_jobs(session, "default", limit=100)[0]} == {1}


def test_of_processes_that_claim_the_same_jobs_one_gets_each(database: Database, database_url: str) -> None:
    with database.write() as session:
        job_ids = [submit(session).id for _ in range(10)]
    got = race(claim_all, [(database_url, job_ids, f"w{number}") for number in range(WORKERS)])
    assert sorted(chain.from_iterable(got)) == job_ids


def test_of_sweeps_at_once_one_counts_each_lost_worker(database: Database) -> None:
    with database.write() as session:
        records = [bring(session, Status.running) for _ in range(10)]
        for record in records:
            expire(session, record)

    def sweep() -> list[str]:
        with database.write() as session:
            return [message[0] for message in lifecycle.sweep(session, now=now(), max_attempts=3).requeued]

    swept = _at_once([sweep] * 4)
    assert sorted(chain.from_iterable(swept)) == [record.id for record in records]
    with database.read() as session:
        assert {record.crashes for record in lifecycle.list_jobs(session, "default", limit=100)[0]} == {1}


def test_a_cancel_and_a_publication_at_once_end_in_one_of_the_two_ways(database: Database) -> None:
    for _ in range(10):
        with database.write() as session:
            record = bring(session, Status.running)

        def cancel(job_id: str = record.id) -> bool:
            try:
                with database.write() as session:
                    lifecycle.cancel(session, "default", job_id)
            except JobFinal:
                return False
            return True

        def finish(job_id: str = record.id) -> bool:
            with database.write() as session:
                return publish(session, job_id, 1, ARTIFACT)

        was_cancelled, was_published = _at_once([cancel, finish])
        assert was_cancelled is not was_published
        with database.read() as session:
            status = lifecycle.find(session, "default", record.id).status
            published = listing.artifacts(session, "default", record.id)
        assert (status, len(published)) == ((Status.succeeded, 1) if was_published else (Status.cancelled, 0))


def test_a_sweep_and_a_late_publication_at_once_never_both_take_the_job(database: Database) -> None:
    for _ in range(10):
        with database.write() as session:
            record = bring(session, Status.running)
            expire(session, record)

        def sweep() -> bool:
            with database.write() as session:
                return bool(lifecycle.sweep(session, now=now(), max_attempts=3).requeued)

        def finish(job_id: str = record.id) -> bool:
            try:
                with database.write() as session:
                    return publish(session, job_id, 1, ARTIFACT)
            except AttemptStale:
                return False

        was_requeued, was_published = _at_once([sweep, finish])
        assert was_requeued is not was_published


def test_the_same_idempotency_key_at_once_makes_one_job(database: Database) -> None:
    def send() -> tuple[str, bool]:
        with database.write() as session:
            record, created = lifecycle.submit(
                session, project="default", spec=spec(), idempotency_key="once", body_hash="same"
            )
            return record.id, created

    answers = _at_once([send] * WORKERS)
    assert len({job_id for job_id, _ in answers}) == 1
    assert sorted(created for _, created in answers) == [False] * (WORKERS - 1) + [True]


def test_a_reader_that_follows_events_misses_none_while_many_write(database: Database) -> None:
    with database.write() as session:
        job_id = submit(session).id
        attempt = claim(session, job_id).attempt
    written = threading.Event()
    seen: list[int] = []

    def write(name: str) -> None:
        for number in range(10):
            with database.write() as session:
                lifecycle.note(session, job_id, attempt, "info", f"{name} {number}", {"number": number})

    def follow() -> None:
        last_look = False
        while True:
            with database.read() as session:
                fresh = listing.events(session, job_id, after=seen[-1] if seen else 0, limit=7)
            seen.extend(event.id for event in fresh)
            if not fresh and last_look:
                return
            last_look = written.is_set()

    reader = threading.Thread(target=follow)
    reader.start()
    _at_once([lambda name=f"w{number}": write(name) for number in range(4)])
    with database.write() as session:
        lifecycle.cancel(session, "default", job_id)
    written.set()
    reader.join()
    assert seen == list(range(1, 2 + 40 + 1 + 1))
    with database.read() as session:
        assert session.get_one(JobRecord, job_id).last_event == seen[-1]


def test_a_record_that_was_read_before_its_lock_is_read_again(postgresql_database: Database) -> None:
    with postgresql_database.write() as session:
        job_id = submit(session).id
    with postgresql_database.write() as session:
        read = lifecycle.find(session, "default", job_id)
        assert read.status == Status.queued
        with postgresql_database.write() as other:
            claim(other, job_id)
        assert lifecycle.cancel(session, "default", job_id).status == Status.cancelling


def _at_once(runs: list[Callable[[], Any]]) -> list[Any]:
    together = threading.Barrier(len(runs))

    def run(each: Callable[[], Any]) -> Any:
        together.wait()
        return each()

    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(run, runs))
