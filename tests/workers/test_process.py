"""`python -m workers` as an operator runs it: killed, stopped, started without its broker."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from jobs import broker
from jobs.database import Database
from squeeze.objects import FINAL, Status

from .conftest import NASTY, TOKEN, Place, alive, eventually, worker_process


def test_a_job_of_a_worker_that_was_killed_is_swept_and_finished_by_another(place: Place) -> None:
    job_id = place.submit("stubborn_once")
    with worker_process(place, "one") as one:
        place.ring(job_id)
        child, grandchild = place.at_work(job_id), place.pid(job_id, "grandchild")
        one.kill()
        for pid in (child, grandchild):
            eventually(lambda pid=pid: not alive(pid), "the fork server ends all that its worker had running")
        with worker_process(place, "two"):
            eventually(lambda: place.job(job_id).status in FINAL, "the second worker finishes")
    job = place.job(job_id)
    assert (job.status, job.attempt, job.crashes) == (Status.succeeded, 2, 1)
    assert place.stored(job_id) == [f"jobs/{job_id}/2/gptq/result.txt"]
    assert any("worker_lost" in str(event.data) for event in place.events(job_id))


def test_processes_that_outlived_worker_and_fork_server_are_killed_when_the_worker_starts_again(place: Place) -> None:
    job_id = place.submit("stubborn_once")
    with worker_process(place, "one") as one:
        place.ring(job_id)
        child, grandchild = place.at_work(job_id), place.pid(job_id, "grandchild")
        os.kill(_parent(child), signal.SIGSTOP)  # a fork server that does nothing any more …
        one.kill()
        one.wait()
        assert alive(child)
        assert alive(grandchild)
        with worker_process(place, "one"):
            for pid in (child, grandchild):
                eventually(lambda pid=pid: not alive(pid), "the restarted worker ends what its ledger names")
            eventually(lambda: place.job(job_id).status == Status.succeeded, "the job is done")


def test_a_worker_that_stood_still_past_its_lease_wakes_to_a_job_that_is_done_and_changes_nothing(place: Place) -> None:
    job_id = place.submit("stubborn_once")
    with worker_process(place, "one") as one:
        place.ring(job_id)
        child = place.at_work(job_id)
        os.kill(one.pid, signal.SIGSTOP)
        with worker_process(place, "two"):
            eventually(lambda: place.job(job_id).status == Status.succeeded, "the second worker finishes")
        assert not alive(child), "the second attempt ended the first before it began"
        os.kill(one.pid, signal.SIGCONT)
        log = place.settings.data / "one.log"
        eventually(lambda: "attempt ended" in log.read_text(), "the first worker has seen that it is over")
    job = place.job(job_id)
    assert (job.status, job.attempt) == (Status.succeeded, 2)
    assert place.stored(job_id) == [f"jobs/{job_id}/2/gptq/result.txt"]


def test_sigterm_gives_the_job_back_and_ends_worker_fork_server_and_child(place: Place) -> None:
    job_id = place.submit("sleep_once")
    with worker_process(place) as worker:
        place.ring(job_id)
        child = place.at_work(job_id)
        server = _parent(child)
        worker.terminate()
        assert worker.wait(30) == 0
        assert not alive(child)
        eventually(lambda: not alive(server), "the fork server is gone")
    job = place.job(job_id)
    assert (job.status, job.crashes) == (Status.queued, 0)
    with worker_process(place):
        eventually(lambda: place.job(job_id).status == Status.succeeded, "the next worker goes on")


def test_a_signal_to_every_process_at_once_is_an_orderly_end_too(place: Place) -> None:
    job_id = place.submit("sleep_once")
    with worker_process(place) as worker:
        place.ring(job_id)
        child = place.at_work(job_id)
        for pid in (child, _parent(child), worker.pid):
            os.kill(pid, signal.SIGTERM)
        assert worker.wait(30) == 0
    job = place.job(job_id)
    assert (job.status, job.crashes) == (Status.queued, 0)


@pytest.fixture
def late_broker(place: Place) -> Iterator[Place]:
    """The same place with a broker of its own that has not been started."""
    with TemporaryDirectory(prefix="squeeze-") as directory:  # short: a socket's path has 107 bytes at most
        yield Place(replace(place.settings, broker_url=broker.broker_url(Path(directory))), place.database)


def test_a_worker_starts_without_its_broker_and_works_when_it_comes_and_comes_again(late_broker: Place) -> None:
    place = late_broker
    directory = Path(place.settings.broker_url.removeprefix("redis+socket://")).parent
    first, second = place.submit("succeed"), place.submit("succeed")
    log = place.settings.data / "one.log"
    with worker_process(place) as worker:
        eventually(lambda: log.is_file() and "no sweep this time" in log.read_text(), "the sweep has met the outage")
        assert worker.poll() is None
        server = broker.start(directory)
        try:
            place.ring(first)
            eventually(lambda: place.job(first).status == Status.succeeded, "the first job is done")
        finally:
            server.kill()
            server.wait()
        server = broker.start(directory)
        try:
            place.ring(second)
            eventually(lambda: place.job(second).status == Status.succeeded, "the second job is done")
            assert worker.poll() is None
        finally:
            server.terminate()
            server.wait()


def test_a_worker_starts_before_the_database_is_migrated(place: Place, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/later.db"
    database = Database(url)
    later = Place(replace(place.settings, database_url=url), database)
    log = place.settings.data / "one.log"
    with worker_process(later) as worker:
        eventually(lambda: log.is_file() and "no sweep this time" in log.read_text(), "the sweep has met the outage")
        database.migrate()
        job_id = later.submit("succeed")
        later.ring(job_id)
        eventually(lambda: later.job(job_id).status == Status.succeeded, "the job is done")
        assert worker.poll() is None
    database.dispose()


def test_a_second_worker_of_the_same_name_is_refused(place: Place) -> None:
    log = place.settings.data / "one.log"
    with worker_process(place, "one"):
        eventually(lambda: log.is_file() and "worker starts" in log.read_text(), "the first one runs")
        with worker_process(place, "one") as second:
            assert second.wait(30) == 2
    assert "give this one another --name" in log.read_text()


def test_a_starting_worker_clears_scratch_of_jobs_that_succeeded_or_are_gone_and_keeps_the_rest(place: Place) -> None:
    waiting = place.submit("sleep")
    gone = place.scratch("job-0000000000000000000000gone")
    for folder in (gone, place.scratch(waiting)):
        folder.mkdir(parents=True)
    with worker_process(place):
        eventually(lambda: not gone.exists(), "the deleted job's scratch is removed")
    assert place.scratch(waiting).is_dir()


def test_what_a_killed_worker_had_stored_goes_when_another_one_publishes(place: Place) -> None:
    job_id = place.submit("wait_in_upload_once")
    with worker_process(place, "one") as one:
        place.ring(job_id)
        place.at_work(job_id)
        eventually(lambda: place.stored(job_id), "half of the result is stored")
        one.kill()
        with worker_process(place, "two"):
            eventually(lambda: place.job(job_id).status == Status.succeeded, "the second worker finishes")
            eventually(lambda: not place.scratch(job_id).exists(), "and has cleared up")
    assert place.stored(job_id) == [f"jobs/{job_id}/2/gptq/result.txt"]


def test_a_starting_worker_removes_what_the_last_one_stored_in_vain(place: Place) -> None:
    job_id = place.submit("wait_in_upload")
    with worker_process(place, "one", SQUEEZE_MAX_ATTEMPTS="1") as one:
        place.ring(job_id)
        place.at_work(job_id)
        eventually(lambda: place.stored(job_id), "half of the result is stored")
        one.kill()
    with worker_process(place, "one", SQUEEZE_MAX_ATTEMPTS="1"):
        eventually(lambda: place.job(job_id).status == Status.failed, "the job was tried often enough")
        eventually(lambda: not place.stored(job_id), "and nothing of it is left in the storage")


def test_a_worker_that_starts_and_stops_prints_structured_lines_alone(place: Place) -> None:
    log = place.settings.data / "one.log"
    with worker_process(place) as worker:
        eventually(lambda: log.is_file() and "worker is ready" in log.read_text(), "it runs")
        worker.terminate()
        assert worker.wait(30) == 0
    assert all(line.startswith("{") for line in log.read_text().splitlines()), "no banner, no warning"


def test_a_fork_server_whose_worker_went_while_it_warmed_up_ends_without_a_word() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()
    with theirs:
        command = [sys.executable, "-m", "workers.forkserver", "--socket", str(theirs.fileno()), "--entry", NASTY]
        done = subprocess.run(command, pass_fds=[theirs.fileno()], capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_no_log_of_a_worker_holds_a_secret(place: Place) -> None:
    job_ids = [place.submit(do) for do in ("crash", "fail", "tell")]
    with worker_process(place):
        for job_id in job_ids:
            place.ring(job_id)
            eventually(lambda job_id=job_id: place.job(job_id).status in FINAL, "the job has ended")
    assert TOKEN not in (place.settings.data / "one.log").read_text()


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
