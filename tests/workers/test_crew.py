"""Jobs of several processes, under the supervisor that knows of the first one alone."""

import os
import signal
import sys

import pytest
from pydantic import ValidationError

from squeeze.objects import Status
from squeeze.specs.job_spec import JobSpec
from workers.processors import devices_of
from workers.spawn import ForkServer
from workers.worker import Worker

from .conftest import TOKEN, Place, Running, alive, eventually, worker_here


def test_what_a_further_process_says_of_its_failure_is_the_jobs_error(place: Place, worker: Worker) -> None:
    job_id = place.submit("share_and_fail")
    assert worker.run_job(job_id) == Status.failed
    error = place.job(job_id).error
    assert error is not None
    assert error["code"] == "not_finite"
    assert TOKEN not in error["message"]


def test_a_further_process_that_is_killed_ends_the_attempt_as_if_it_were_the_first(
    place: Place, worker: Worker
) -> None:
    job_id = place.submit("share_once")
    running = Running(worker, job_id)
    first, second = place.at_work(job_id), place.pid(job_id, "second")
    os.kill(second, signal.SIGKILL)
    assert running.status() == Status.queued
    assert not alive(first)
    assert any("killed by signal 9 (SIGKILL)" in event.message for event in place.events(job_id))
    assert worker.run_job(job_id) == Status.succeeded


def test_a_further_process_that_ends_without_a_word_is_a_bug_told_with_its_last_lines(
    place: Place, worker: Worker
) -> None:
    job_id = place.submit("share_and_raise")
    assert worker.run_job(job_id) == Status.failed
    error = place.job(job_id).error
    assert error is not None
    assert error["code"] == "compression_bug"
    assert "RuntimeError: out of the second process" in error["message"]


@pytest.mark.parametrize("end", ["cancelled", "first process killed"])
def test_no_further_process_is_left_when_the_first_has_ended(place: Place, worker: Worker, end: str) -> None:
    job_id = place.submit("share_once")
    running = Running(worker, job_id)
    first, second = place.at_work(job_id), place.pid(job_id, "second")
    if end == "cancelled":
        place.cancel(job_id)
    else:
        os.kill(first, signal.SIGKILL)
    running.status()
    eventually(lambda: not alive(second), "the second process is gone")


def test_a_further_process_may_end_before_the_first(place: Place, worker: Worker) -> None:
    assert worker.run_job(place.submit("share_and_succeed")) == Status.succeeded


def test_a_job_gets_as_many_devices_as_it_asks_for() -> None:
    assert devices_of("cpu", 0) == ("cpu",)
    assert devices_of("cpu", 3) == ("cpu", "cpu", "cpu")
    assert devices_of("cuda:1", 1) == ("cuda:1",)
    assert devices_of("cuda:0,2,3", 0) == ("cuda:0",)
    assert devices_of("cuda:0,2,3", 2) == ("cuda:0", "cuda:2")


def test_a_job_that_asks_for_more_gpus_than_the_worker_has_fails_with_how_many_there_are(
    place: Place, nasty_server: ForkServer
) -> None:
    with worker_here(place, nasty_server, "cuda:0,1") as worker:
        job_id = place.submit("succeed", limits={"gpus": 3})
        assert worker.run_job(job_id) == Status.failed
        error = place.job(job_id).error
        assert error is not None
        assert error["code"] == "spec_invalid"
        assert "limits.gpus is 3, and the worker has 2" in error["message"]


def test_deepspeed_that_a_worker_has_not_fails_the_job_before_its_model_is_pulled(
    place: Place, nasty_server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as if it were not there
    step = {"kind": "finetune", "method": "full", "sharding": "zero2"}
    with worker_here(place, nasty_server, "cpu") as worker:
        job_id = place.submit(steps=[step], data={"source": "hub:org/data"}, limits={"gpus": 2})
        assert worker.run_job(job_id) == Status.failed
        error = place.job(job_id).error
        assert error is not None
        assert error["code"] == "spec_invalid"
        assert error["message"].startswith(
            "sharding 'zero2' is done by DeepSpeed, which this worker has not: take full"
        )
        assert "requirements/deepspeed.txt" in error["message"]


def test_a_method_on_whole_blocks_is_refused_on_several_gpus_when_it_is_submitted() -> None:
    step = {"kind": "quantize", "method": "autoround"}
    JobSpec.model_validate({"model": "org/model", "steps": [step], "limits": {"gpus": 1}})
    with pytest.raises(ValidationError, match="autoround works on whole blocks, which GPUs can't share"):
        JobSpec.model_validate({"model": "org/model", "steps": [step], "limits": {"gpus": 2}})
