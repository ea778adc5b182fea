"""Jobs that trim a vocabulary and are killed outright go on where they were, to the same bytes."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.job_parts import Heard, digests
from tests.models.prune.tokenizers_of import byte_level, model_with
from tests.models.prune.trim_killed import LINES
from tests.models.prune.trim_parts import trim


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unit", "left", "words"),
    [
        ("characters", 2, ["going on after 1 parts"]),  # while it counts
        ("characters", 5, ["going on after 3 parts", "going on after 1 parts"]),  # while it compares
        ("blocks", 3, ["going on after 3 parts", "going on after block 2 of 4"]),
    ],
)
def test_a_job_that_is_killed_goes_on_to_the_same_bytes(tmp_path: Path, unit: str, left: int, words: list[str]) -> None:
    model, room = model_with(byte_level(), tmp_path / "model", num_hidden_layers=4), tmp_path / "killed"
    command = [sys.executable, "-m", "tests.models.prune.trim_killed", unit, str(left), str(model), str(room)]
    ended = subprocess.run(command, check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    heard = Heard()
    gone_on = trim({}, model, room, LINES, heard)
    assert all(any(each in message for message in heard.messages) for each in words), heard.messages
    quiet = trim({}, model, tmp_path / "quiet", LINES)
    assert digests(gone_on.whole) == digests(quiet.whole) and gone_on.measured == quiet.measured
    assert gone_on.slimming.trimming == quiet.slimming.trimming
