"""Trainings whose machine is lost: all that the next one has is the database and the storage."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import listing
from jobs.places import checkpoints_prefix
from jobs.sweeping import sweep_once
from squeeze.objects import Status
from tests.hub import FaultyHub
from tests.models import tiny
from workers.checkpoints import MANIFEST
from workers.forkserver import DEFAULT_ENTRY
from workers.spawn import ForkServer
from workers.worker import Worker

from .conftest import PROJECT, Place, Running, eventually, kill_child, upload, weights, worker_here, worker_process

AUTO = {"learning_rate": "auto", "batch_size": "auto", "micro_batch_size": "auto"}
LORA = {"kind": "finetune", "method": "lora", "steps": 120, "rank": 4, "dropout": 0.1} | AUTO

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyHub]:
    with FaultyHub() as hub:
        hub.add("tiny/llama", tiny.llama(tmp_path_factory.mktemp("llama")))
        yield hub


@pytest.fixture
def worker(place: Place, warm_server: ForkServer) -> Iterator[Worker]:
    with worker_here(place, warm_server) as worker:
        yield worker


@pytest.fixture
def quiet(place: Place, worker: Worker) -> str:
    """A training that nothing disturbed."""
    job_id = submitted(place)
    assert worker.run_job(job_id) == Status.succeeded, place.job(job_id).error
    return job_id


def test_a_training_whose_process_and_disk_are_lost_goes_on_from_the_storage_to_the_same_adapter(
    place: Place, worker: Worker, quiet: str
) -> None:
    job_id = submitted(place)
    running = Running(worker, job_id)
    learning(place, job_id)
    kill_child(worker)
    assert running.status() == Status.queued
    assert stored(place, job_id)
    shutil.rmtree(place.scratch(job_id))
    assert worker.run_job(job_id) == Status.succeeded, place.job(job_id).error
    agree(place, quiet, job_id)


def test_a_training_whose_worker_is_killed_too_goes_on_from_what_was_stored_on_the_way(
    place: Place, worker: Worker, hub: FaultyHub, quiet: str
) -> None:
    job_id = submitted(place)
    restless = {"HF_ENDPOINT": hub.url, "SQUEEZE_CHECKPOINT_MINUTES": "0.001"}
    with worker_process(place, entry=DEFAULT_ENTRY, **restless) as process:
        place.ring(job_id)
        learning(place, job_id)
        eventually(lambda: stored(place, job_id), "a checkpoint is stored")
        process.kill()
        process.wait()
    lose(place, job_id)
    eventually(lambda: _swept(place, worker, job_id), "the lease is over")
    assert worker.run_job(job_id) == Status.succeeded, place.job(job_id).error
    agree(place, quiet, job_id)


def test_sigterm_leaves_a_checkpoint_in_the_storage(place: Place, worker: Worker, hub: FaultyHub, quiet: str) -> None:
    job_id = submitted(place)
    with worker_process(place, entry=DEFAULT_ENTRY, HF_ENDPOINT=hub.url) as process:
        place.ring(job_id)
        learning(place, job_id)
        assert not stored(place, job_id), "the first is due after a quarter of an hour"
        process.terminate()
        assert process.wait(60) == 0
    assert place.job(job_id).status == Status.queued
    assert stored(place, job_id)
    assert place.artifacts(job_id) == []
    lose(place, job_id)
    assert worker.run_job(job_id) == Status.succeeded, place.job(job_id).error
    agree(place, quiet, job_id)


def test_a_cancelled_training_leaves_nothing_in_the_storage(place: Place, warm_server: ForkServer) -> None:
    restless = Place(replace(place.settings, checkpoint_minutes=0.001), place.database)
    with worker_here(restless, warm_server) as worker:
        job_id = submitted(place)
        running = Running(worker, job_id)
        eventually(lambda: stored(place, job_id), "a checkpoint is stored")
        place.cancel(job_id)
        assert running.status() == Status.cancelled
        assert place.stored(job_id) == []


def submitted(place: Place) -> str:
    rows = [json.dumps({"text": f"line {n} says that {n} is followed by {n + 1}"}) for n in range(300)]
    fields: dict[str, Any] = {
        "model": "tiny/llama",
        "data": {"samples": 4, "sequence_length": "auto", "source": upload(place, "\n".join(rows))},
        "evaluation": {"samples": 2},
    }
    return place.submit(steps=[LORA], **fields)


def learning(place: Place, job_id: str) -> None:
    """Waits until some steps are done and saved."""
    work = place.scratch(job_id) / "work" / "train"

    def saved() -> list[Path]:
        return [path for path in work.glob("checkpoint-*[0-9]") if int(path.name[-8:]) > 3]

    eventually(lambda: place.job(job_id).stage, "a worker has it, which may have had to start first")
    eventually(lambda: place.job(job_id).stage == "training", "it trains")
    eventually(saved, "a checkpoint is saved")


def lose(place: Place, job_id: str) -> None:
    """All that a machine has of a job."""
    shutil.rmtree(place.scratch(job_id))
    shutil.rmtree(place.settings.cache, ignore_errors=True)


def stored(place: Place, job_id: str) -> list[str]:
    prefix = checkpoints_prefix(job_id)
    return [key for key in place.stored(job_id) if key.startswith(f"{prefix}/") and key.endswith(MANIFEST)]


def agree(place: Place, quiet: str, job_id: str) -> None:
    """It went on, as far as it had come, to the bits of the one that nothing disturbed; and left no checkpoint."""
    with place.database.read() as session:
        first, second = (listing.report(session, PROJECT, one)["training"] for one in (quiet, job_id))
    assert second["resumed"] and second["resumed"][0] > 0 and not first["resumed"]
    assert [one["loss"] for one in first["curve"]] == [one["loss"] for one in second["curve"]]
    assert len(second["chosen"]) == 4
    assert [(one["name"], one["value"]) for one in first["chosen"]] == [
        (one["name"], one["value"]) for one in second["chosen"]
    ]
    assert weights(place, quiet) == weights(place, job_id)
    assert not stored(place, job_id)


def _swept(place: Place, worker: Worker, job_id: str) -> bool:
    sweep_once(place.database, worker.app, max_attempts=3)
    return place.job(job_id).status == Status.queued
