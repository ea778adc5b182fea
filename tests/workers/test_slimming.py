"""A model made smaller through the whole service: from the Hub to artifacts that say they are a smaller model."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from jobs import listing
from squeeze.objects import Status
from storage import open_storage
from tests.hub import FaultyHub
from tests.models import tiny
from workers.spawn import ForkServer
from workers.worker import Worker

from .conftest import PROJECT, Place, upload, worker_here

SMALL: dict[str, Any] = {
    "model": "tiny/deep",
    "data": {"samples": 4, "sequence_length": 64},
    "evaluation": {"samples": 2},
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyHub]:
    with FaultyHub() as hub:
        hub.add("tiny/deep", tiny.llama(tmp_path_factory.mktemp("deep"), num_hidden_layers=4))
        yield hub


@pytest.fixture
def worker(place: Place, warm_server: ForkServer) -> Iterator[Worker]:
    with worker_here(place, warm_server) as worker:
        yield worker


@pytest.mark.slow
def test_a_smaller_model_is_published_and_can_be_named_by_another_job(place: Place, worker: Worker) -> None:
    job_id = place.submit(steps=[{"kind": "prune", "method": "depth", "blocks": 3}], **SMALL)
    assert worker.run_job(job_id) == Status.succeeded, place.job(job_id).error
    with place.database.read() as session:
        artifacts = {one.filename: one for one in listing.artifacts(session, PROJECT, job_id)}
        report = listing.report(session, PROJECT, job_id)
    config = next(one for name, one in artifacts.items() if name.endswith("config.json"))
    written = json.loads(b"".join(open_storage(place.settings.storage_url).read(config.storage_key)))
    assert written["num_hidden_layers"] == 3
    assert report["slimming"]["parameters_after"] < report["slimming"]["parameters_before"]
    assert report["certificates"][0]["outcome"] == "passed" and len(report["slimming"]["removed"]) == 1
    stages = [event.message for event in place.events(job_id) if event.type == "stage"]
    assert stages[0] == "pulling" and stages.index("calibrating") < stages.index("certifying")

    narrow = {"kind": "prune", "method": "width", "intermediate_size": 128}
    rounded = {"kind": "quantize", "method": "rtn", "group_size": 32}
    again = place.submit(steps=[narrow, rounded], **(SMALL | {"model": job_id}))
    assert worker.run_job(again) == Status.succeeded, place.job(again).error
    with place.database.read() as session:
        report = listing.report(session, PROJECT, again)
    assert report["slimming"]["widths"]["intermediate_size"] == 128 and report["bits_per_weight"] == 4.5


@pytest.mark.slow
def test_a_vocabulary_is_trimmed_to_uploaded_texts_and_one_that_they_do_not_fit_ends_with_what_would(
    place: Place, worker: Worker
) -> None:
    rows = "\n".join(json.dumps({"text": f"the {number} words of a line, and so on"}) for number in range(200))
    fields = SMALL | {"data": {"source": upload(place, rows), "sequence_length": 64}}
    job_id = place.submit(steps=[{"kind": "prune", "method": "vocabulary"}], **fields)
    assert worker.run_job(job_id) == Status.succeeded, place.job(job_id).error
    with place.database.read() as session:
        report = listing.report(session, PROJECT, job_id)
    told = report["slimming"]["trimming"]
    assert told["rows_after"] < told["rows_before"] == 512 and told["largest_difference"] <= 1e-5
    assert told["corpus"]["texts"] == told["corpus"]["decoded_to_themselves"] == 200
    assert report["certificates"][0]["outcome"] == "passed"

    small = place.submit(steps=[{"kind": "prune", "method": "vocabulary", "size": 64}], **fields)
    assert worker.run_job(small) == Status.failed
    error = place.job(small).error
    assert error and error["code"] == "spec_invalid"
    assert f"the least size is {told['rows_after']}, not 64" in error["message"]
