"""Room on the disk is counted before anything large comes, once for each disk."""

import os
import shutil
from pathlib import Path

import pytest

from squeeze.errors import DiskFull
from squeeze.specs.job_spec import JobSpec
from workers.room import demand

SPEC = JobSpec.model_validate({"model": "org/model", "steps": [{"kind": "quantize", "method": "rtn", "bits": 4}]})


def ask(tmp_path: Path, *, source_bytes: int, missing_bytes: int, storage: Path | None = None) -> None:
    demand(
        SPEC,
        source_bytes=source_bytes,
        missing_bytes=missing_bytes,
        cache=tmp_path,
        scratch=tmp_path,
        storage=storage,
    )


def test_what_fits_is_let_through(tmp_path: Path) -> None:
    ask(tmp_path, source_bytes=1 << 20, missing_bytes=1 << 20, storage=tmp_path)
    assert not any(tmp_path.iterdir()), "room is asked for, not taken"


def test_model_result_and_its_copy_in_a_local_storage_must_fit_together(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    source_bytes = int(free / 1.6)  # the source alone fits; with codes and result it does not
    with pytest.raises(DiskFull, match="GiB free"):
        ask(tmp_path, source_bytes=source_bytes, missing_bytes=source_bytes)
    ask(tmp_path, source_bytes=source_bytes, missing_bytes=0)


def test_what_an_earlier_attempt_left_is_not_asked_for_again(tmp_path: Path) -> None:
    source_bytes = int(shutil.disk_usage(tmp_path).free * 1.3)
    with pytest.raises(DiskFull):
        ask(tmp_path, source_bytes=source_bytes, missing_bytes=0)
    with (tmp_path / "codes").open("wb") as file:
        os.truncate(file.fileno(), source_bytes)  # a hole: it takes no room, but counts as what is there
    ask(tmp_path, source_bytes=source_bytes, missing_bytes=0)
