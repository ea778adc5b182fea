"""Every way to train under `kill -9`: what a process left half done goes on to the same files, bit for bit."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from models.pipeline import run
from squeeze.reports.report import Report
from squeeze.reports.training import Training, Tuning
from tests.models.job_parts import Heard, digests
from tests.models.tiny import FAMILIES
from tests.models.train.killed_job import STEPS, WAYS, inputs_of
from tests.models.train.parts import seen_in

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # of heads
@pytest.mark.parametrize("way", WAYS)
def test_a_job_killed_at_a_random_step_goes_on_to_the_same_curve_and_the_same_files(tmp_path: Path, way: str) -> None:
    model, step = FAMILIES["llama"](tmp_path / "model"), random.randrange(2, STEPS)
    quiet = run(inputs_of(way, model, tmp_path / "quiet"), Heard())
    command = [
        sys.executable,
        "-m",
        "tests.models.train.killed_job",
        way,
        str(model),
        str(tmp_path / "room"),
        str(step),
    ]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    again = run(inputs_of(way, model, tmp_path / "room"), Heard())
    before, after = told(quiet.report), told(again.report)
    # It had saved before the step that it died after: a checkpoint holds weights that gave a finite loss.
    assert (before.resumed, after.resumed) == ([], [step - 1])
    assert len(before.curve) == STEPS and seen_in(after.curve) == seen_in(before.curve)
    if isinstance(before, Training) and isinstance(after, Training):
        assert after.held_out == before.held_out
    assert digests(tmp_path / "room" / "out") == digests(tmp_path / "quiet" / "out")


def told(report: Report) -> Training | Tuning:
    found = report.training or report.tuning
    assert found is not None
    return found
