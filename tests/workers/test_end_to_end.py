"""Whole jobs: a tiny random Llama from a Hub on this machine, through the real pipeline, into the storage."""

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import listing
from squeeze.objects import Status
from storage import open_storage
from tests.hub import FaultyHub
from tests.models import tiny
from tests.models.merge.parts import finetuned
from workers.forkserver import DEFAULT_ENTRY
from workers.spawn import ForkServer
from workers.worker import Worker

from .conftest import (
    PROJECT,
    Place,
    Running,
    eventually,
    kill_child,
    upload,
    weights,
    worker_here,
    worker_process,
)

SMALL: dict[str, Any] = {
    "model": "tiny/llama",
    "data": {"samples": 4, "sequence_length": 64},
    "evaluation": {"samples": 2},
}
RTN = {"kind": "quantize", "method": "rtn", "group_size": 32}
LORA = {"kind": "finetune", "method": "lora", "steps": 8, "learning_rate": 0.01, "rank": 4}
GPTQ = {"kind": "quantize", "method": "gptq", "group_size": 32}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyHub]:
    directory = tiny.llama(tmp_path_factory.mktemp("llama"))
    with FaultyHub() as hub:
        hub.add("tiny/llama", directory)
        hub.add("tiny/tuned", finetuned(directory, tmp_path_factory.mktemp("tuned") / "model", 1))
        hub.add("tiny/small", tiny.llama(tmp_path_factory.mktemp("small"), num_hidden_layers=1))
        yield hub


@pytest.fixture
def worker(place: Place, warm_server: ForkServer) -> Iterator[Worker]:
    with worker_here(place, warm_server) as worker:
        yield worker


def test_a_job_from_the_hub_to_artifacts_with_right_digests_that_can_not_be_compressed_again(
    place: Place, worker: Worker, hub: FaultyHub
) -> None:
    job_id = place.submit(steps=[RTN], formats=["gptq"], **SMALL)
    assert worker.run_job(job_id) == Status.succeeded, place.job(job_id).error
    job = place.job(job_id)
    assert job.model_revision == hub.repos["tiny/llama"].refs["main"]
    assert job.usage is not None
    assert job.usage["cpu_seconds"] > 0
    assert job.usage["peak_host_bytes"] > 100 << 20
    storage = open_storage(place.settings.storage_url)
    with place.database.read() as session:
        artifacts = listing.artifacts(session, PROJECT, job_id)
    assert {artifact.format for artifact in artifacts} == {"gptq", "report"}
    for artifact in artifacts:
        content = b"".join(storage.read(artifact.storage_key))
        assert (len(content), hashlib.sha256(content).hexdigest()) == (artifact.bytes, artifact.sha256)
    stages = [event.message for event in place.events(job_id) if event.type == "stage"]
    assert stages[0] == "pulling"
    assert stages[-1] == "uploading"
    again = place.submit(steps=[RTN], **(SMALL | {"model": job_id}))
    assert worker.run_job(again) == Status.failed
    error = place.job(again).error
    assert error is not None
    assert error["code"] == "model_already_compressed"


def test_a_job_on_uploaded_text_killed_while_it_compresses_goes_on_and_gives_the_same_bytes(
    place: Place, worker: Worker
) -> None:
    file_id = upload(place)
    fields = SMALL | {"data": SMALL["data"] | {"source": file_id}}
    quiet, disturbed = (place.submit(steps=[GPTQ], formats=["gptq"], **fields) for _ in range(2))
    assert worker.run_job(quiet) == Status.succeeded, place.job(quiet).error
    running = Running(worker, disturbed)
    work = place.scratch(disturbed) / "work"
    eventually(lambda: work.is_dir() and any(work.rglob("*.safetensors")), "a block is done")
    kill_child(worker)
    assert running.status() == Status.queued
    assert worker.run_job(disturbed) == Status.succeeded, place.job(disturbed).error
    assert weights(place, disturbed) == weights(place, quiet)
    with place.database.read() as session:
        report = listing.report(session, PROJECT, quiet)
    assert (report["calibration"]["origin"], report["calibration"]["generic"]) == (file_id, False)


def test_a_job_that_trains_on_uploaded_examples_gives_an_adapter_and_is_told_of_a_line_that_is_none(
    place: Place, worker: Worker
) -> None:
    rows = [json.dumps({"prompt": f"{n} and one is ", "completion": str(n + 1)}) for n in range(80)]
    fields = SMALL | {"data": {"source": upload(place, "\n".join(rows)), "sequence_length": 64}}
    job_id = place.submit(steps=[LORA], **fields)
    assert worker.run_job(job_id) == Status.succeeded, place.job(job_id).error
    with place.database.read() as session:
        artifacts = listing.artifacts(session, PROJECT, job_id)
        report = listing.report(session, PROJECT, job_id)
    assert "peft/adapter_model.safetensors" in {artifact.filename for artifact in artifacts}
    assert {artifact.format for artifact in artifacts} == {"peft", "report"}
    training = report["training"]
    assert training["loss_after"] < training["loss_before"] and len(training["curve"]) == 8
    assert [one["outcome"] for one in report["certificates"]] == ["passed"]
    told = [event for event in place.events(job_id) if "steps" in event.data]
    assert [step["step"] for event in told for step in event.data["steps"]] == list(range(1, 9))
    assert "training" in [event.message for event in place.events(job_id) if event.type == "stage"]

    wrong = SMALL | {"data": {"source": upload(place, "\n".join([*rows[:2], '{"prompt": "2 and one is "}']))}}
    job_id = place.submit(steps=[LORA], **wrong)
    assert worker.run_job(job_id) == Status.failed
    error = place.job(job_id).error
    assert error is not None and error["code"] == "data_unusable" and error["message"].startswith("line 3 ")


@pytest.mark.slow
def test_a_classification_head_learns_labels_and_a_job_without_them_is_told_so(place: Place, worker: Worker) -> None:
    rows = [{"text": f"number {n} is {'odd' if n % 2 else 'even'}", "label": "ab"[n % 2]} for n in range(80)]
    head = {"kind": "finetune", "method": "head", "layers": 1, "steps": 16, "learning_rate": 3e-3, "batch_size": 16}
    text = "\n".join(map(json.dumps, rows))
    job_id = place.submit(steps=[head], **SMALL | {"data": {"source": upload(place, text), "sequence_length": 64}})
    assert worker.run_job(job_id) == Status.succeeded, place.job(job_id).error
    with place.database.read() as session:
        report = listing.report(session, PROJECT, job_id)
        artifacts = {artifact.filename for artifact in listing.artifacts(session, PROJECT, job_id)}
    assert {"safetensors/config.json", "safetensors/model.safetensors"} <= artifacts
    assert report["training"]["accuracy_after"] > report["training"]["accuracy_before"]
    assert {one["consumer"]: one["outcome"] for one in report["certificates"]}["transformers"] == "passed"

    nameless = "\n".join(json.dumps({"text": row["text"]}) for row in rows)
    job_id = place.submit(steps=[head], **SMALL | {"data": {"source": upload(place, nameless)}})
    assert worker.run_job(job_id) == Status.failed
    error = place.job(job_id).error
    assert error is not None and error["code"] == "data_unusable" and "label" in error["message"]


def test_a_student_from_the_hub_learns_and_what_it_became_learns_more(place: Place, worker: Worker) -> None:
    rows = "\n".join(json.dumps({"text": f"line {n} says that {n} is followed by {n + 1}"}) for n in range(60))
    fields = SMALL | {"data": {"source": upload(place, rows), "sequence_length": 64}}
    step = {"kind": "distill", "method": "logits", "steps": 6, "learning_rate": 0.003}
    student = "tiny/small"
    for _ in range(2):
        job_id = place.submit(steps=[step | {"student": {"model": student}}], **fields)
        assert worker.run_job(job_id) == Status.succeeded, place.job(job_id).error
        with place.database.read() as session:
            training = listing.report(session, PROJECT, job_id)["training"]
        assert training["distillation"]["student"].startswith(student)
        assert training["loss_after"] < training["loss_before"]
        student = job_id
    wrong = place.submit(steps=[step | {"student": {"model": "/etc"}}], **fields)
    assert worker.run_job(wrong) == Status.failed
    error = place.job(wrong).error
    assert error is not None and error["code"] == "model_directory_forbidden"


@pytest.mark.slow
def test_models_and_adapters_from_the_hub_and_of_earlier_jobs_are_merged_into_their_base(
    place: Place, worker: Worker
) -> None:
    rows = "\n".join(json.dumps({"text": f"line {n} says that {n} is followed by {n + 1}"}) for n in range(60))
    data = {"source": upload(place, rows), "sequence_length": 64}
    fields = SMALL | {"data": data}
    full = {name: value for name, value in LORA.items() if name != "rank"} | {"method": "full"}
    learned = [place.submit(steps=[step], **fields) for step in (LORA, full)]
    for job_id in learned:
        assert worker.run_job(job_id) == Status.succeeded, place.job(job_id).error
    models = [{"model": learned[0], "weight": 0.5}, {"model": learned[1]}, {"model": "tiny/tuned", "revision": "main"}]
    job_id = place.submit(steps=[{"kind": "merge", "method": "ties", "models": models}, RTN], **SMALL)
    assert worker.run_job(job_id) == Status.succeeded, place.job(job_id).error
    with place.database.read() as session:
        merging = listing.report(session, PROJECT, job_id)["merging"]
    assert [one["kind"] for one in merging["models"]] == ["adapter", "model", "model"]
    assert all(one["used"] > 0 for one in merging["models"]) and merging["quality"] is not None
    stages = [event.message for event in place.events(job_id) if event.type == "stage"]
    assert stages.index("merging") < stages.index("compressing")

    wrong = [{"model": "tiny/tuned"}, {"model": "tiny/small"}]
    job_id = place.submit(steps=[{"kind": "merge", "method": "linear", "models": wrong}], **SMALL)
    assert worker.run_job(job_id) == Status.failed
    error = place.job(job_id).error
    assert error is not None and error["code"] == "model_malformed" and "num_hidden_layers" in error["message"]


@pytest.mark.slow
def test_a_model_that_was_pruned_is_pruned_and_quantized_and_published(place: Place, worker: Worker) -> None:
    zeroing = {"kind": "prune", "method": "magnitude", "pattern": "2:4"}
    job_id = place.submit(steps=[zeroing], **SMALL)
    assert worker.run_job(job_id) == Status.succeeded, place.job(job_id).error
    with place.database.read() as session:
        sparsity = listing.report(session, PROJECT, job_id)["sparsity"]
        assert {artifact.format for artifact in listing.artifacts(session, PROJECT, job_id)} == {
            "safetensors",
            "report",
        }
    assert sparsity["reached"] == 0.5 and sparsity["rows_checked"] > 0
    chain = place.submit(steps=[zeroing | {"method": "sparsegpt"}, GPTQ], **(SMALL | {"model": job_id}))
    assert worker.run_job(chain) == Status.succeeded, place.job(chain).error
    with place.database.read() as session:
        report = listing.report(session, PROJECT, chain)
    assert report["sparsity"]["zeros_kept"] == 1.0 and report["bits_per_weight"] == 4.5
    stages = [event.message for event in place.events(chain) if event.type == "stage"]
    assert stages.count("compressing") == 2 and stages.count("certifying") == 1


@pytest.mark.slow
def test_a_training_whose_process_is_killed_goes_on_and_gives_the_same_adapter(place: Place, worker: Worker) -> None:
    rows = [json.dumps({"text": f"line {n} says that {n} is followed by {n + 1}"}) for n in range(300)]
    fields = SMALL | {"data": {"source": upload(place, "\n".join(rows)), "sequence_length": 64}}
    step = LORA | {"steps": 150, "dropout": 0.1}
    quiet, disturbed = (place.submit(steps=[step], **fields) for _ in range(2))
    assert worker.run_job(quiet) == Status.succeeded, place.job(quiet).error
    running = Running(worker, disturbed)
    work = place.scratch(disturbed) / "work" / "train"
    eventually(lambda: any(work.glob("checkpoint-*[0-9]")), "a checkpoint is saved")
    kill_child(worker)
    assert running.status() == Status.queued
    assert worker.run_job(disturbed) == Status.succeeded, place.job(disturbed).error
    with place.database.read() as session:
        first, second = (listing.report(session, PROJECT, one)["training"] for one in (quiet, disturbed))
    assert second["resumed"] and not first["resumed"]
    assert [one["loss"] for one in first["curve"]] == [one["loss"] for one in second["curve"]]
    assert weights(place, disturbed) == weights(place, quiet)


@pytest.mark.slow
def test_a_job_that_two_processes_share_gives_the_bytes_of_one_even_when_one_of_them_is_killed(
    place: Place, worker: Worker
) -> None:
    fields = SMALL | {"data": {"samples": 48, "sequence_length": 64, "source": upload(place)}}
    alone = place.submit(steps=[GPTQ], formats=["gptq"], **fields)
    shared = place.submit(steps=[GPTQ], formats=["gptq"], limits={"gpus": 2}, **fields)
    assert worker.run_job(alone) == Status.succeeded, place.job(alone).error
    running = Running(worker, shared)
    work = place.scratch(shared) / "work"
    eventually(lambda: work.is_dir() and any(work.rglob("*.safetensors")), "a block is done")
    kill_child(worker, "its second process")
    assert running.status() == Status.queued
    attempts = [event.message for event in place.events(shared)]
    assert any("was killed by signal 9" in message for message in attempts), attempts
    assert worker.run_job(shared) == Status.succeeded, place.job(shared).error
    assert weights(place, shared) == weights(place, alone)
    with place.database.read() as session:
        report = listing.report(session, PROJECT, shared)
    assert report["device"].startswith("2 × CPU")
    assert any(event.message.startswith("2 processes share") for event in place.events(shared))


@pytest.mark.slow
def test_a_training_that_two_processes_share_loses_what_one_does_even_when_one_is_killed_and_is_then_quantized_by_both(
    place: Place, worker: Worker
) -> None:
    rows = [json.dumps({"text": f"line {n} says that {n} is followed by {n + 1}"}) for n in range(300)]
    data = {"source": upload(place, "\n".join(rows)), "sequence_length": 64, "samples": 48}
    step = LORA | {"steps": 40, "merge": True, "learning_rate": 1e-3}
    alone = place.submit(steps=[step], **SMALL | {"data": data})
    assert worker.run_job(alone) == Status.succeeded, place.job(alone).error
    steps = [step | {"sharding": "full"}, GPTQ]
    shared = place.submit(steps=steps, formats=["gptq"], limits={"gpus": 2}, **SMALL | {"data": data})
    running = Running(worker, shared)
    work = place.scratch(shared) / "work" / "train"
    eventually(lambda: work.is_dir() and any(work.glob("checkpoint-*[0-9]/state.json")), "a checkpoint is saved")
    kill_child(worker, "its second process")
    assert running.status() == Status.queued
    assert worker.run_job(shared) == Status.succeeded, place.job(shared).error
    with place.database.read() as session:
        expected, report = (listing.report(session, PROJECT, one) for one in (alone, shared))
    one, two = expected["training"], report["training"]
    assert (one["processes"], two["processes"], two["sharding"]) == (1, 2, "full") and two["resumed"]
    losses = [[step["loss"] for step in each["curve"]] for each in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert two["loss_after"] == pytest.approx(one["loss_after"], abs=1e-5)
    assert report["device"].startswith("2 × CPU") and report["bits_per_weight"] is not None
    messages = [event.message for event in place.events(shared)]
    for words in ("2 processes share the training", "2 processes share the calibration"):
        assert any(message.startswith(words) for message in messages), messages


@pytest.mark.slow
def test_a_job_on_a_dataset_of_the_hub_reports_the_commit_and_split_that_it_read(
    place: Place, worker: Worker, hub: FaultyHub, tmp_path: Path
) -> None:
    for split, word in (("train", "def"), ("test", "class")):
        for shard in range(3):
            path = tmp_path / "texts" / "code" / f"{split}-{shard:05d}-of-00003.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = (json.dumps({"body": f"{word} name_{n}_{shard}():\n    return {n}\n"}) for n in range(800))
            path.write_text("\n".join(rows) + "\n")
    commit = hub.add_dataset("tiny/texts", tmp_path / "texts").refs["main"]
    hub.sent.clear()
    fields = SMALL | {
        "data": SMALL["data"] | {"source": "hub:tiny/texts:train", "column": "body"},
        "evaluation": SMALL["evaluation"] | {"source": "hub:tiny/texts:code/test", "column": "body"},
    }
    job_id = place.submit(steps=[GPTQ], formats=["gptq"], **fields)
    assert worker.run_job(job_id) == Status.succeeded, place.job(job_id).error
    with place.database.read() as session:
        report = listing.report(session, PROJECT, job_id)
    assert report["calibration"]["origin"] == f"hub:tiny/texts@{commit}:train"
    assert report["quality"]["text"]["origin"] == f"hub:tiny/texts@{commit}:test"
    assert not report["calibration"]["generic"] and not report["quality"]["text"]["generic"]
    shards = {name for name, _ in hub.sent if name.endswith(".jsonl")}
    assert shards == {"train-00000-of-00003.jsonl", "test-00000-of-00003.jsonl"}


def test_a_dataset_that_can_not_be_used_fails_the_job_before_the_model_s_weights_come(
    place: Place, worker: Worker, hub: FaultyHub
) -> None:
    hub.sent.clear()
    for part, source in (("data", "hub:tiny/none"), ("evaluation", "hub:tiny/nowhere:test")):
        job_id = place.submit(steps=[GPTQ], **(SMALL | {part: SMALL[part] | {"source": source}}))
        assert worker.run_job(job_id) == Status.failed
        error = place.job(job_id).error
        assert error is not None
        assert error["code"] == "data_unusable"
        assert source.removeprefix("hub:").partition(":")[0] in error["message"]
    assert not hub.sent


@pytest.mark.slow
def test_a_job_calibrates_on_text_that_its_model_samples(place: Place, worker: Worker) -> None:
    fields = SMALL | {"data": SMALL["data"] | {"source": "self"}}
    job_id = place.submit(steps=[GPTQ], formats=["gptq"], **fields)
    assert worker.run_job(job_id) == Status.succeeded, place.job(job_id).error
    with place.database.read() as session:
        report = listing.report(session, PROJECT, job_id)
    assert report["calibration"]["origin"].startswith("sampled by the model itself")
    assert report["quality"]["text"]["generic"]
    assert any("name your text as evaluation.source" in warning for warning in report["warnings"])


def test_a_model_that_does_not_fit_the_recipe_fails_before_its_weights_come(
    place: Place, worker: Worker, hub: FaultyHub, tmp_path: Path
) -> None:
    hub.add("tiny/odd", tiny.llama(tmp_path / "odd", intermediate_size=272))
    hub.sent.clear()
    job_id = place.submit(steps=[RTN | {"group_size": 128}], **(SMALL | {"model": "tiny/odd"}))
    assert worker.run_job(job_id) == Status.failed
    error = place.job(job_id).error
    assert error is not None
    assert error["code"] == "group_size_indivisible"
    assert {name for name, _ in hub.sent} == {"config.json"}


@pytest.mark.slow
def test_a_warm_worker_starts_a_job_at_once(place: Place, hub: FaultyHub, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = []
    with worker_process(place, entry=DEFAULT_ENTRY, HF_ENDPOINT=hub.url):
        for _ in range(3):
            job_id = place.submit(steps=[RTN], **SMALL)
            began = time.monotonic()
            place.ring(job_id)
            eventually(lambda job_id=job_id: place.job(job_id).stage, "it works")
            seconds.append(time.monotonic() - began)
            place.cancel(job_id)
            eventually(lambda job_id=job_id: place.job(job_id).status == Status.cancelled, "it has stopped")
    log = (place.settings.data / "one.log").read_text()
    warmed = json.loads(next(line for line in log.splitlines() if "fork server is warm" in line))
    assert warmed["threads"] == 1, "no thread of a library's may exist when the server forks"
    with capsys.disabled():
        shown = ", ".join(f"{second:.2f}" for second in seconds)
        sys.stdout.write(f"\nseconds from ring to work, the first while the server warms up: {shown}\n")
