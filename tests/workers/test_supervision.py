"""One attempt under its supervisor, in this process: real children through a real fork server, real database."""

import os
import signal
from dataclasses import replace

import pytest

from jobs import lifecycle
from jobs.records import JobRecord
from squeeze.objects import Status
from workers.spawn import ForkServer
from workers.worker import Worker

from .conftest import TOKEN, Place, Running, alive, eventually, worker_here


def test_a_job_that_ends_well_is_published_with_what_it_stored_and_leaves_no_scratch(
    place_on_either_database: Place, nasty_server: ForkServer
) -> None:
    place = place_on_either_database
    with worker_here(place, nasty_server) as worker:
        job_id = place.submit("succeed")
        assert worker.run_job(job_id) == Status.succeeded
        job = place.job(job_id)
        assert (job.status, job.attempt, job.fraction) == (Status.succeeded, 1, 1.0)
        assert place.artifacts(job_id) == ["gptq/result.txt"]
        assert place.stored(job_id) == [f"jobs/{job_id}/1/gptq/result.txt"]
        assert job.usage is not None
        assert job.usage["peak_host_bytes"] == 123
        assert not place.scratch(job_id).exists()


def test_a_second_delivery_of_the_same_job_finds_nothing_to_claim(place: Place, worker: Worker) -> None:
    job_id = place.submit("succeed")
    assert worker.run_job(job_id) == Status.succeeded
    assert worker.run_job(job_id) is None
    assert place.job(job_id).attempt == 1


def test_progress_reaches_the_database_as_stages_whole_percents_and_warnings(place: Place, worker: Worker) -> None:
    job_id = place.submit("tell")
    assert worker.run_job(job_id) == Status.succeeded
    events = place.events(job_id)
    assert place.job(job_id).model_revision == "0" * 40
    warning = next(event for event in events if event.type == "warning")
    assert TOKEN not in warning.message
    assert warning.data == {"layer": "q_proj"}
    fractions = [event.data["fraction"] for event in events if event.type == "progress"]
    assert fractions == sorted(fractions)


def test_cancel_ends_a_child_that_ignores_sigterm_and_its_grandchild(place: Place, worker: Worker) -> None:
    job_id = place.submit("stubborn")
    running = Running(worker, job_id)
    child, grandchild = place.at_work(job_id), place.pid(job_id, "grandchild")
    assert alive(child)
    assert alive(grandchild)
    place.cancel(job_id)
    assert running.status() == Status.cancelled
    assert not alive(child)
    eventually(lambda: not alive(grandchild), "the grandchild is gone")
    assert place.scratch(job_id).is_dir(), "a retry goes on from what is there"


def test_what_a_cancelled_attempt_had_stored_is_removed(place: Place, worker: Worker) -> None:
    job_id = place.submit("wait_in_upload")
    running = Running(worker, job_id)
    place.at_work(job_id)
    eventually(lambda: place.stored(job_id), "something is stored")
    place.cancel(job_id)
    assert running.status() == Status.cancelled
    assert place.stored(job_id) == []


def test_a_child_killed_from_outside_is_tried_again_and_then_ends_well(place: Place, worker: Worker) -> None:
    job_id = place.submit("stubborn_once")
    running = Running(worker, job_id)
    grandchild = place.pid(job_id, "grandchild")
    os.kill(place.at_work(job_id), signal.SIGKILL)
    assert running.status() == Status.queued
    eventually(lambda: not alive(grandchild), "the grandchild is gone")
    job = place.job(job_id)
    assert job.crashes == 1
    assert any("process_killed" in str(event.data) for event in place.events(job_id))
    assert worker.run_job(job_id) == Status.succeeded
    assert place.job(job_id).attempt == 2
    assert place.stored(job_id) == [f"jobs/{job_id}/2/gptq/result.txt"]


def test_a_child_that_is_always_killed_fails_after_the_allowed_attempts(place: Place, worker: Worker) -> None:
    job_id = place.submit("sleep")
    for attempt in (1, 2, 3):
        running = Running(worker, job_id)
        os.kill(place.at_work(job_id, attempt), signal.SIGKILL)
        assert running.status() == (Status.failed if attempt == 3 else Status.queued)
        (place.scratch(job_id) / "child").unlink()
    error = place.job(job_id).error
    assert error is not None
    assert error["code"] == "process_killed"


def test_a_fork_server_killed_from_outside_counts_as_a_killed_process_and_is_replaced(
    place: Place, worker: Worker, nasty_server: ForkServer
) -> None:
    job_id = place.submit("stubborn_once")
    running = Running(worker, job_id)
    child, grandchild, server = place.at_work(job_id), place.pid(job_id, "grandchild"), nasty_server.pid
    assert server is not None
    os.kill(server, signal.SIGKILL)
    assert running.status() == Status.queued
    for pid in (server, child, grandchild):
        eventually(lambda pid=pid: not alive(pid), "no process of the job is left")
    assert any("process_killed" in str(event.data) for event in place.events(job_id))
    assert worker.run_job(job_id) == Status.succeeded
    assert nasty_server.pid != server


def test_a_fork_server_that_died_between_two_jobs_costs_no_attempt(
    place: Place, worker: Worker, nasty_server: ForkServer
) -> None:
    nasty_server.start()
    assert nasty_server.pid is not None
    os.kill(nasty_server.pid, signal.SIGKILL)
    job_id = place.submit("succeed")
    assert worker.run_job(job_id) == Status.succeeded
    assert place.job(job_id).attempt == 1


def test_a_job_over_its_time_limit_fails_and_says_which_limit(place: Place, worker: Worker) -> None:
    job_id = place.submit("stubborn", limits={"max_runtime_seconds": 1})
    running = Running(worker, job_id)
    child = place.pid(job_id)
    assert running.status() == Status.failed
    error = place.job(job_id).error
    assert error is not None
    assert error["code"] == "runtime_exceeded"
    assert "max_runtime_seconds" in error["message"]
    assert not alive(child)


def test_a_stopping_worker_gives_the_job_back_without_counting_a_crash(place: Place, worker: Worker) -> None:
    job_id = place.submit("sleep_once")
    running = Running(worker, job_id)
    child = place.at_work(job_id)
    worker.stopping.set()
    assert running.status() == Status.queued
    assert not alive(child)
    assert place.job(job_id).crashes == 0
    worker.stopping.clear()
    assert worker.run_job(job_id) == Status.succeeded


def test_an_attempt_that_lost_its_job_kills_its_child_and_publishes_nothing(place: Place, worker: Worker) -> None:
    job_id = place.submit("sleep")
    running = Running(worker, job_id)
    child = place.at_work(job_id)
    _lose(place, job_id)
    with place.database.write() as session:
        claim = lifecycle.claim(session, job_id, worker="another", lease_seconds=60)
    assert claim is not None
    assert running.status() is None
    assert not alive(child)
    job = place.job(job_id)
    assert (job.status, job.attempt, job.worker) == (Status.running, 2, "another")


def test_a_stale_attempt_whose_child_had_finished_publishes_nothing_and_leaves_nothing_stored(
    place: Place, worker: Worker
) -> None:
    job_id = place.submit("succeed_and_hang")
    running = Running(worker, job_id)
    eventually(lambda: place.stored(job_id), "the result is stored")
    _lose(place, job_id)
    assert running.status() in (None, Status.queued)
    job = place.job(job_id)
    assert (job.status, job.attempt, place.artifacts(job_id)) == (Status.queued, 1, [])
    assert place.stored(job_id) == []


def test_a_child_that_said_it_is_done_but_does_not_end_is_killed_and_its_result_published(
    place: Place, worker: Worker
) -> None:
    job_id = place.submit("succeed_and_hang")
    assert worker.run_job(job_id) == Status.succeeded
    assert place.artifacts(job_id) == ["gptq/result.txt"]


def test_an_error_that_the_child_tells_becomes_the_jobs_without_its_secrets(
    place: Place, worker: Worker, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    job_id = place.submit("fail")
    assert worker.run_job(job_id) == Status.failed
    error = place.job(job_id).error
    assert error is not None
    assert error["code"] == "not_finite"
    _assert_no_secret(place, job_id, caplog, capfd)


def test_a_child_that_ends_without_a_word_is_a_bug_told_with_its_last_lines_but_no_secrets(
    place: Place, worker: Worker, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    job_id = place.submit("crash")
    assert worker.run_job(job_id) == Status.failed
    error = place.job(job_id).error
    assert error is not None
    assert error["code"] == "compression_bug"
    assert "RuntimeError: no word, and the secret [hidden]" in error["message"]
    _assert_no_secret(place, job_id, caplog, capfd)


def test_an_attempt_whose_database_is_away_past_its_lease_kills_its_child(
    place: Place, nasty_server: ForkServer
) -> None:
    place = Place(replace(place.settings, lease_seconds=2.0), place.database)
    path = place.settings.data / "squeeze.db"
    with worker_here(place, nasty_server) as worker:
        job_id = place.submit("sleep")
        running = Running(worker, job_id)
        child = place.at_work(job_id)
        place.database.dispose()
        hidden = path.rename(path.with_suffix(".away"))
        wal = [file.rename(file.with_name(f"{file.name}.away")) for file in path.parent.glob("squeeze.db-*")]
        path.mkdir()  # nothing can open it as a database
        assert running.status() is None
        assert not alive(child)
        path.rmdir()
        hidden.rename(path)
        for file in wal:
            file.rename(file.with_name(file.name.removesuffix(".away")))
        assert place.job(job_id).status == Status.running, "the sweep will find it"


def test_an_attempt_outlives_a_short_outage_of_the_database(
    place: Place, worker: Worker, capfd: pytest.CaptureFixture[str]
) -> None:
    path = place.settings.data / "squeeze.db"
    job_id = place.submit("sleep")
    running = Running(worker, job_id)
    child = place.at_work(job_id)
    place.database.dispose()
    hidden = path.rename(path.with_suffix(".away"))
    path.mkdir()
    eventually(lambda: "the database can't be reached" in capfd.readouterr().out, "the worker has noticed")
    path.rmdir()
    hidden.rename(path)
    assert alive(child)
    place.cancel(job_id)
    assert running.status() == Status.cancelled


def _lose(place: Place, job_id: str) -> None:
    """As a sweep does to a job whose worker was silent for longer than its lease."""
    with place.database.write() as session:
        record = session.get_one(JobRecord, job_id)
        assert record.lease_expires_at is not None
        swept = lifecycle.sweep(session, now=record.lease_expires_at.replace(year=3000), max_attempts=3)
    assert [message[0] for message in swept.requeued] == [job_id]


def _assert_no_secret(
    place: Place, job_id: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    job = place.job(job_id)
    told = [str(job.error), *(event.message + str(event.data) for event in place.events(job_id)), caplog.text]
    out, err = capfd.readouterr()
    assert all(TOKEN not in text for text in (*told, out, err))
