"""Checkpoints on their way into the storage and back, in a real local storage."""

import json
from pathlib import Path

import pytest

from jobs.places import checkpoints_prefix
from storage import Storage, open_storage
from workers.checkpoints import MANIFEST, Safekeeping, bring, forget

from .conftest import eventually

JOB = "job-aaaaaaaa"
ABOVE = f"{checkpoints_prefix(JOB)}/train"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage((tmp_path / "storage").as_uri())


def test_a_checkpoint_comes_back_with_its_bytes_on_a_machine_that_has_none(storage: Storage, tmp_path: Path) -> None:
    keep(storage, saved(tmp_path / "one", 7))
    [(place, brought)] = bring(storage, JOB, tmp_path / "two")
    assert place == tmp_path / "two" / "train" / "checkpoint-00000007"
    assert contents(brought) == contents(tmp_path / "one" / "train" / "checkpoint-00000007")


def test_a_newer_one_replaces_the_one_before_and_an_attempt_that_came_later_wins(
    storage: Storage, tmp_path: Path
) -> None:
    for attempt, step in ((1, 3), (1, 9), (2, 5)):
        keep(storage, saved(tmp_path / f"{attempt}", step), attempt)
        versions = {key.split("/")[4] for key in storage.list(ABOVE)}
        assert versions == {f"{attempt:06d}-checkpoint-{step:08d}"}
    [(place, _)] = bring(storage, JOB, tmp_path / "other")
    assert place.name == "checkpoint-00000005"


@pytest.mark.parametrize("step", [7, 8])
def test_a_machine_that_is_as_far_fetches_nothing(storage: Storage, tmp_path: Path, step: int) -> None:
    keep(storage, saved(tmp_path / "one", 7))
    saved(tmp_path / "two", step)
    assert bring(storage, JOB, tmp_path / "two") == []


def test_one_that_was_not_written_to_its_end_is_not_used(storage: Storage, tmp_path: Path) -> None:
    keep(storage, saved(tmp_path / "one", 7))
    storage.put_stream(f"{ABOVE}/000001-checkpoint-00000009/state.json", [b"{}"])
    [(place, _)] = bring(storage, JOB, tmp_path / "two")
    assert place.name == "checkpoint-00000007"


def test_one_that_is_damaged_or_names_files_elsewhere_is_not_used(storage: Storage, tmp_path: Path) -> None:
    keep(storage, saved(tmp_path / "one", 7))
    version = f"{ABOVE}/000001-checkpoint-00000007"
    storage.put_stream(f"{version}/state.json", [b"{} "])
    assert bring(storage, JOB, tmp_path / "two") == []
    told = json.dumps({"files": {"../../evil": {"bytes": 1, "sha256": "0"}}}).encode()
    storage.put_stream(f"{version}/{MANIFEST}", [told])
    assert bring(storage, JOB, tmp_path / "two") == []
    assert not list((tmp_path / "two").rglob("evil"))


def test_one_that_its_training_removes_meanwhile_is_stored_whole(storage: Storage, tmp_path: Path) -> None:
    directory = saved(tmp_path / "one", 7)
    before = contents(directory)
    keeping = Safekeeping(storage, JOB, 1, tmp_path / "one", 1000.0)
    keeping.hold(directory)
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()
    keeping.hold(directory)  # told too late: the next one is there already
    finish(keeping)
    [(_, brought)] = bring(storage, JOB, tmp_path / "two")
    assert contents(brought) == before


def test_nothing_is_copied_before_its_time_and_nothing_ever_where_that_is_not_wanted(
    storage: Storage, tmp_path: Path
) -> None:
    directory = saved(tmp_path / "one", 7)
    for every_seconds in (1000.0, None):
        keeping = Safekeeping(storage, JOB, 1, tmp_path / "one", every_seconds)
        keeping.hold(directory)
        keeping.act()
        assert keeping.busy == (every_seconds is not None)
        keeping.end()
        assert not list(storage.list())


def test_half_a_copy_that_is_not_wanted_any_more_goes(storage: Storage, tmp_path: Path) -> None:
    keeping = Safekeeping(storage, JOB, 1, tmp_path / "one", 0.001)
    keeping.hold(saved(tmp_path / "one", 7, size_bytes=16 << 20))
    keeping.act(now=True)
    keeping.end()
    assert not list(storage.list()) or f"{ABOVE}/000001-checkpoint-00000007/{MANIFEST}" in storage.list()


def test_a_storage_that_fails_costs_the_copy_and_nothing_else(tmp_path: Path) -> None:
    storage = open_storage((tmp_path / "storage").as_uri())
    (tmp_path / "storage" / "objects").rmdir()
    (tmp_path / "storage" / "objects").write_text("in the way")
    keep(storage, saved(tmp_path / "one", 7))
    (tmp_path / "storage" / "objects").unlink()
    assert not list(storage.list())


def test_nothing_is_left_of_a_job_that_is_forgotten(storage: Storage, tmp_path: Path) -> None:
    keep(storage, saved(tmp_path / "one", 7))
    forget(storage, JOB)
    assert not list(storage.list())


def saved(work: Path, step: int, size_bytes: int = 3 << 20) -> Path:
    """A checkpoint, as far as anybody but its training can tell."""
    directory = work / "train" / f"checkpoint-{step:08d}"
    directory.mkdir(parents=True)
    (directory / "state.safetensors").write_bytes(step.to_bytes() * size_bytes)
    (directory / "state.json").write_text("{}")
    (directory / "fingerprint").write_text("mark")
    return directory


def keep(storage: Storage, directory: Path, attempt: int = 1) -> None:
    keeping = Safekeeping(storage, JOB, attempt, directory.parents[1], 1000.0)
    keeping.hold(directory)
    finish(keeping)


def finish(keeping: Safekeeping) -> None:
    keeping.act(now=True)
    eventually(lambda: not keeping.busy, "the copy is made")
    keeping.end()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
