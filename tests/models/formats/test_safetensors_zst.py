"""Weights under zstd: unpacked they are the plain directory again, to the byte."""

import shutil
import subprocess
from pathlib import Path

import pyarrow
import pytest
import torch

from models.files.checkpoint import open_model
from models.formats import layout
from models.formats.directory import weight_bytes
from models.formats.safetensors_zst import restored
from models.pipeline import run
from models.progress import Silent
from squeeze.steps.sparsifying import Magnitude
from tests.models.engine_parts import compressed
from tests.models.job_parts import Heard, digests, inputs_of
from tests.models.prune.parts import spec_of, zeroing
from tests.models.tiny import FAMILIES

STEP = Magnitude(method="magnitude", sparsity=0.7)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The plain directory, and the packed one."""
    room = tmp_path_factory.mktemp("packed")
    model = FAMILIES["llama"](room / "model", dtype=torch.bfloat16)
    done, _ = compressed(model, room / "work", STEP)
    for name in ("safetensors", "safetensors-zst"):
        layout(name).write(open_model(model), done.model, room / name, Silent())  # type: ignore[arg-type]
    return room / "safetensors", room / "safetensors-zst"


def test_what_is_unpacked_is_the_plain_directory(both: tuple[Path, Path]) -> None:
    plain, packed = both
    assert weight_bytes(packed) < 0.75 * weight_bytes(plain)
    with restored(packed) as again:
        ours = digests(again)
        ours.pop("SHA256SUMS")
        assert ours == digests(plain)
    assert not again.exists()


@pytest.mark.skipif(shutil.which("zstd") is None, reason="there is no zstd to try it with")
def test_the_usual_programs_unpack_it(both: tuple[Path, Path], tmp_path: Path) -> None:
    plain, packed = both
    mine = shutil.copytree(packed, tmp_path / "mine")
    subprocess.run("zstd -d -q --rm *.zst && sha256sum -c --quiet SHA256SUMS", shell=True, check=True, cwd=mine)
    (mine / "SHA256SUMS").unlink()
    assert digests(mine) == digests(plain)


def test_a_file_that_is_not_what_was_packed_is_found(both: tuple[Path, Path], tmp_path: Path) -> None:
    mine = shutil.copytree(both[1], tmp_path / "mine")
    file = next(mine.glob("*.zst"))
    with pyarrow.CompressedInputStream(str(file), "zstd") as packed:
        weights = bytearray(packed.read())
    weights[-1] ^= 1
    with pyarrow.CompressedOutputStream(str(file), "zstd") as packed:
        packed.write(bytes(weights))
    with pytest.raises(ValueError, match="does not hold what was packed"), restored(mine):
        pass


def test_a_job_writes_it_and_has_it_certified(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model", dtype=torch.bfloat16)
    spec = spec_of(zeroing(sparsity=0.7), formats=["safetensors-zst"])
    outcome = run(inputs_of(spec, model, None, tmp_path), Heard())
    report = outcome.report
    assert report.sparsity is not None and report.sparsity.reached == pytest.approx(0.7, abs=1e-3)
    size = report.sizes[0]
    assert size.format == "safetensors-zst" and size.ratio is not None and size.ratio > 1.3
    assert size.weight_bytes == pytest.approx(report.sparsity.zstd_bytes, rel=0.02)
    passed = [one for one in report.certificates if one.outcome == "passed"]
    assert [one.format for one in passed] == ["safetensors-zst"] and "unpacked by zstd" in passed[0].detail
