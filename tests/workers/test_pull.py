"""From a model's id to a directory: the real Hub client against a Hub on this machine that can be ill."""

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import lifecycle, listing
from jobs.lifecycle import NewArtifact
from squeeze.objects import Status, Usage
from storage import open_storage
from tests.hub import Faults, FaultyHub
from workers.groups import Ledger
from workers.spawn import ForkServer
from workers.worker import Worker

from .children import RESULT
from .conftest import PROJECT, Place, Running, eventually, worker_here

TOKEN = "hf_ofAnAccountThatAcceptedTheTerms"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
SHARD_BYTES = 1_500_000


@pytest.fixture(scope="module")
def _hub() -> Iterator[FaultyHub]:
    with FaultyHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def pulling_server(tmp_path_factory: pytest.TempPathFactory, _hub: FaultyHub) -> Iterator[ForkServer]:
    before = os.environ.get("HF_ENDPOINT")
    os.environ["HF_ENDPOINT"] = _hub.url
    ledger = Ledger(tmp_path_factory.mktemp("pulling"), "pulling")
    server = ForkServer(ledger, "tests.workers.pulling:run")
    server.start()
    if before is None:
        del os.environ["HF_ENDPOINT"]
    else:
        os.environ["HF_ENDPOINT"] = before
    yield server
    server.close()
    ledger.close()


@pytest.fixture
def hub(_hub: FaultyHub) -> Iterator[FaultyHub]:
    """A Hub that is well and has no models."""
    _hub.repos.clear()
    _hub.sent.clear()
    _hub.faults = Faults()
    yield _hub
    _hub.faults.let_go.set()


@pytest.fixture
def worker(place: Place, pulling_server: ForkServer) -> Iterator[Worker]:
    with worker_here(place, pulling_server) as worker:
        yield worker


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory such as the Hub has them; its weights are chance."""
    directory = tmp_path / "model"
    write(directory, "config.json", json.dumps(CONFIG))
    write(directory, "tokenizer.json", "{}")
    write(directory, "README.md", "---\nlicense: apache-2.0\n---\n# A model\n")
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (directory / name).write_bytes(os.urandom(SHARD_BYTES))
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    write(directory, "model.safetensors.index.json", json.dumps({"weight_map": shards}))
    return directory


def write(directory: Path, name: str, text: str) -> None:
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(text)


def pulled(place: Place, worker: Worker, **fields: Any) -> dict[str, Any]:
    """What came, of a job that is expected to end well."""
    job_id = place.submit(**fields)
    assert worker.run_job(job_id) == Status.succeeded, place.job(job_id).error
    return came(place, job_id)


def came(place: Place, job_id: str) -> dict[str, Any]:
    with place.database.read() as session:
        return listing.report(session, PROJECT, job_id)


def refused(place: Place, worker: Worker, **fields: Any) -> tuple[str, str]:
    """(code, message) of a job that is expected to fail at once."""
    job_id = place.submit(**fields)
    assert worker.run_job(job_id) == Status.failed
    error = place.job(job_id).error
    assert error is not None
    return error["code"], error["message"]


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir() if path.is_file()}


def test_an_id_is_resolved_to_a_commit_and_its_files_come_unharmed(
    place: Place, worker: Worker, hub: FaultyHub, model: Path
) -> None:
    commit = hub.add("org/model", model).refs["main"]
    found = pulled(place, worker)
    assert (found["revision"], found["name"], found["license"]) == (commit, "org/model", "apache-2.0")
    assert found["files"] == digests(model)


def test_code_pickles_and_other_frameworks_files_stay_on_the_hub(
    place: Place, worker: Worker, hub: FaultyHub, model: Path
) -> None:
    wanted = set(digests(model))
    unwanted = (
        "modeling.py",
        "pytorch_model.bin",
        "model.onnx",
        "model.gguf",
        "consolidated.safetensors",
        "onnx/a.json",
    )
    for name in unwanted:
        write(model, name, "unwanted")
    hub.add("org/model", model)
    assert set(pulled(place, worker)["files"]) == wanted
    assert {name for name, _ in hub.sent} == wanted


def test_a_revision_names_a_branch(place: Place, worker: Worker, hub: FaultyHub, model: Path) -> None:
    hub.add("org/model", model)
    write(model, "config.json", json.dumps(CONFIG | {"other": True}))
    other = hub.add("org/model", model, "other").refs["other"]
    assert pulled(place, worker, model="org/model@other")["revision"] == other


def test_a_model_that_is_in_the_cache_is_not_fetched_again(
    place: Place, worker: Worker, hub: FaultyHub, model: Path
) -> None:
    hub.add("org/model", model)
    first = pulled(place, worker)
    hub.sent.clear()
    assert pulled(place, worker) == first
    assert hub.sent == []


def test_a_killed_download_goes_on_where_it_was_and_at_the_same_commit(
    place: Place, worker: Worker, hub: FaultyHub, model: Path
) -> None:
    commit = hub.add("org/model", model).refs["main"]
    expected = digests(model)
    hub.faults.hold_after = 1_000_000
    job_id = place.submit()
    running = Running(worker, job_id)
    parts = eventually(lambda: _parts(place, 700_000), "most of two shards")
    os.kill(place.pid(job_id), signal.SIGKILL)
    assert running.status() == Status.queued
    kept = sorted(part.stat().st_size for part in parts)
    hub.faults.let_go.set()
    hub.faults.hold_after = None
    hub.sent.clear()
    moved = model.rename(model.with_name("old"))  # the branch moves on, the job must not
    for repo in hub.repos.values():
        repo.commits[commit] = {name: replace(file, path=moved / name) for name, file in repo.commits[commit].items()}
    write(model, "config.json", json.dumps(CONFIG | {"newer": True}))
    assert hub.add("org/model", model).refs["main"] != commit
    assert worker.run_job(job_id) == Status.succeeded
    found = came(place, job_id)
    assert (found["revision"], found["files"]) == (commit, expected)
    assert sorted(start for name, start in hub.sent if name.endswith(".safetensors")) == kept
    assert place.job(job_id).model_revision == commit


def test_connections_that_break_cost_no_attempt(place: Place, worker: Worker, hub: FaultyHub, model: Path) -> None:
    hub.add("org/model", model)
    hub.faults.break_after, hub.faults.breaks_left = 400_000, 4
    assert pulled(place, worker)["files"] == digests(model)
    assert len([start for _, start in hub.sent if start > 0]) == 4


def test_a_server_that_ignores_ranges_makes_the_download_start_again(
    place: Place, worker: Worker, hub: FaultyHub, model: Path
) -> None:
    hub.add("org/model", model)
    hub.faults.ignore_range = True
    hub.faults.break_after, hub.faults.breaks_left = 400_000, 1
    assert pulled(place, worker)["files"] == digests(model)


def test_a_part_that_was_damaged_on_disk_is_fetched_again(
    place: Place, worker: Worker, hub: FaultyHub, model: Path
) -> None:
    hub.add("org/model", model)
    shard = model / "model-00001-of-00002.safetensors"
    blobs = place.settings.cache / "models--org--model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(shard.read_bytes()).hexdigest()}.incomplete").write_bytes(b"x" * 1000)
    assert pulled(place, worker)["files"] == digests(model)


def test_a_file_that_is_damaged_on_the_way_twice_is_refused(
    place: Place, worker: Worker, hub: FaultyHub, model: Path
) -> None:
    hub.add("org/model", model)
    hub.faults.damage = True
    code, message = refused(place, worker)
    assert code == "model_malformed"
    assert "digest" in message


def test_a_mirror_whose_listing_has_no_sizes_will_do(place: Place, worker: Worker, hub: FaultyHub, model: Path) -> None:
    hub.add("org/model", model)
    hub.faults.bare_listing = True
    assert pulled(place, worker)["files"] == digests(model)


def test_an_unknown_model_is_told_from_an_unknown_revision(
    place: Place, worker: Worker, hub: FaultyHub, model: Path
) -> None:
    hub.add("org/model", model, "release")
    code, message = refused(place, worker, model="org/absent")
    assert (code, "org/absent" in message, "spelling" in message) == ("model_not_found", True, True)
    code, message = refused(place, worker, model="org/model@relaese")
    assert (code, "Did you mean 'release'?" in message) == ("model_not_found", True)


def test_a_gated_model_says_where_to_accept_its_terms_and_opens_to_the_right_token(
    place: Place, worker: Worker, hub: FaultyHub, model: Path
) -> None:
    hub.add("org/model", model).token = TOKEN
    code, message = refused(place, worker)
    assert (code, f"{hub.url}/org/model" in message, "no HF_TOKEN" in message) == ("model_gated", True, True)
    code, message = refused(place, worker, metadata={"token": "hf_OfSomebodyElse"})
    assert (code, "no access" in message, "hf_OfSomebodyElse" in message) == ("model_gated", True, False)
    assert pulled(place, worker, metadata={"token": TOKEN})["files"] == digests(model)


def test_a_hub_that_is_down_is_tried_again_later(place: Place, worker: Worker, hub: FaultyHub, model: Path) -> None:
    hub.add("org/model", model)
    hub.faults.status = 503
    job_id = place.submit()
    assert worker.run_job(job_id) == Status.queued
    assert any("hub_unavailable" in str(event.data) for event in place.events(job_id))
    hub.faults.status = None
    assert worker.run_job(job_id) == Status.succeeded


def test_a_hub_that_is_not_there_is_tried_again_later(place: Place, worker: Worker, hub: FaultyHub) -> None:
    job_id = place.submit(metadata={"endpoint": "http://127.0.0.1:9"})  # discard: nobody listens
    assert worker.run_job(job_id) == Status.queued
    assert any("can't be reached" in event.message for event in place.events(job_id))


def test_what_the_check_refuses_costs_no_weights(place: Place, worker: Worker, hub: FaultyHub, model: Path) -> None:
    write(model, "config.json", json.dumps({"model_type": "unheard-of"}))
    hub.add("org/model", model)
    code, _ = refused(place, worker)
    assert code == "architecture_unsupported"
    assert {name for name, _ in hub.sent} == {"config.json", "model.safetensors.index.json"}


@pytest.mark.parametrize(
    ("files", "code", "said"),
    [
        ({"model.safetensors": "x"}, "model_malformed", "no config.json"),
        ({"config.json": "{"}, "model_malformed", "not JSON"),
        ({"config.json": "{}"}, "model_malformed", "no safetensors weights"),
        ({"config.json": "{}", "model.gguf": "x"}, "model_malformed", "GGUF"),
        ({"config.json": "{}", "model.pt": "x"}, "model_unsafe", "pickles"),
        ({"config.json": "{}", "weights.bin": "x"}, "model_unsafe", "pickles"),
        ({"config.json": "{}", "adapter_model.safetensors": "x"}, "model_malformed", "adapter"),
        (
            {
                "config.json": json.dumps({"model_type": "own", "auto_map": {"AutoModel": "a.B"}}),
                "model.safetensors": "x",
            },
            "model_unsafe",
            "auto_map",
        ),
        (
            {
                "config.json": "{}",
                "model.safetensors.index.json": json.dumps({"weight_map": {"a": "../../x.safetensors"}}),
            },
            "model_malformed",
            "not among",
        ),
        ({"config.json": "{}", "model.safetensors.index.json": "[]"}, "model_malformed", "can't be read"),
    ],
)
def test_a_model_that_can_not_be_used_is_refused_with_the_reason(
    place: Place, worker: Worker, hub: FaultyHub, tmp_path: Path, files: dict[str, str], code: str, said: str
) -> None:
    for name, text in files.items():
        write(tmp_path / "bad", name, text)
    hub.add("org/model", tmp_path / "bad")
    found, message = refused(place, worker)
    assert found == code
    assert said in message


def test_a_built_in_architecture_that_also_brings_code_is_taken_without_it(
    place: Place, worker: Worker, hub: FaultyHub, model: Path
) -> None:
    write(model, "config.json", json.dumps(CONFIG | {"auto_map": {"AutoModel": "modeling.Model"}}))
    write(model, "modeling.py", "raise SystemExit")
    hub.add("org/model", model)
    assert "modeling.py" not in pulled(place, worker)["files"]


def test_legacy_weights_are_taken_where_there_are_no_others(
    place: Place, worker: Worker, hub: FaultyHub, tmp_path: Path
) -> None:
    legacy = tmp_path / "legacy"
    write(legacy, "config.json", json.dumps(CONFIG))
    write(legacy, "pytorch_model.bin", "x" * 1000)
    write(legacy, "training_args.bin", "x")
    hub.add("org/model", legacy)
    assert set(pulled(place, worker)["files"]) == {"config.json", "pytorch_model.bin"}


def test_a_disk_without_room_for_source_and_result_is_seen_before_the_weights_come(
    place: Place, worker: Worker, hub: FaultyHub, model: Path
) -> None:
    repo = hub.add("org/model", model)
    files = repo.commits[repo.refs["main"]]
    files["model-00001-of-00002.safetensors"] = replace(files["model-00001-of-00002.safetensors"], size_bytes=1 << 50)
    code, message = refused(place, worker)
    assert code == "disk_full"
    assert "GiB free" in message
    assert not any(name.endswith(".safetensors") for name, _ in hub.sent)


def test_a_directory_under_an_allowed_root_is_used_in_place(
    place: Place, pulling_server: ForkServer, hub: FaultyHub, model: Path, tmp_path: Path
) -> None:
    place = Place(replace(place.settings, model_roots=(model.parent / "roots",)), place.database)
    (model.parent / "roots").mkdir()
    inside = model.rename(model.parent / "roots" / "inside")
    outside = tmp_path / "outside"
    outside.mkdir()
    write(outside, "config.json", "{}")
    with worker_here(place, pulling_server) as worker:
        found = pulled(place, worker, model=str(inside))
        assert (found["directory"], found["name"]) == (str(inside), "inside")
        (inside / "link").symlink_to("/etc/hostname")
        for name in (str(outside), str(inside.parent / ".." / "outside"), str(inside)):
            code, _ = refused(place, worker, model=name)
            assert code == "model_directory_forbidden"
        assert refused(place, worker, model=str(inside.parent / "absent"))[0] == "model_not_found"


def test_no_directory_is_read_where_the_operator_allows_none(
    place: Place, worker: Worker, hub: FaultyHub, model: Path
) -> None:
    assert refused(place, worker, model=str(model))[0] == "model_directory_forbidden"


def test_an_earlier_jobs_result_is_fetched_from_the_storage_and_checked(
    place: Place, worker: Worker, hub: FaultyHub, model: Path
) -> None:
    earlier = place.submit(formats=["gptq", "compressed-tensors"])
    storage = open_storage(place.settings.storage_url)
    artifacts = []
    for path in sorted(model.iterdir()):
        for kind in ("gptq", "compressed-tensors"):
            key = f"jobs/{earlier}/1/{kind}/{path.name}"
            stored = storage.put_file(key, path)
            artifacts.append(NewArtifact(f"{kind}/{path.name}", stored.size_bytes, stored.sha256, kind, key))
    with place.database.write() as session:
        claim = lifecycle.claim(session, earlier, worker="another", lease_seconds=60)
        assert claim is not None
        lifecycle.publish(session, earlier, 1, artifacts=artifacts, result=RESULT, report={}, usage=Usage())
    found = pulled(place, worker, model=earlier)
    assert found["files"] == digests(model)
    assert (found["name"], found["revision"]) == (earlier, None)


def _parts(place: Place, least_bytes: int) -> list[Path]:
    """The partial shards, once both hold so much; other files get their own name at any moment."""
    full = []
    for part in place.settings.cache.rglob("*.incomplete"):
        with suppress(FileNotFoundError):
            full += [part] * (part.stat().st_size >= least_bytes)
    return full if len(full) == 2 else []
