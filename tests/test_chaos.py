"""The service under `kill -9`: a few jobs of what `make test-chaos` does with fifty."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_jobs_end_right_and_once_while_every_process_is_killed_at_random() -> None:
    command = [sys.executable, "scripts/chaos.py", "--jobs", "6", "--recipes", "2", "--seed", "1", "--pause", "3"]
    done = subprocess.run(
        [*command, "--minutes", "4.5"],
        cwd=ROOT,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
