"""Jobs that make a model smaller and are killed outright go on where their last snapshot is, to the same bytes."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.models import tiny
from tests.models.job_parts import Heard, digests
from tests.models.prune.slim_parts import slim


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "done"),
    [
        ({"method": "depth"}, 2),
        ({"method": "depth", "importance": "perplexity"}, 3),
        ({"method": "width"}, 2),
        ({"method": "experts"}, 2),
        ({"method": "width", "importance": "gradient"}, 8),
    ],
)
def test_a_job_that_is_killed_goes_on_to_the_same_bytes(tmp_path: Path, step: dict[str, Any], done: int) -> None:
    family = "olmoe" if step["method"] == "experts" else "llama"
    model, room = tiny.FAMILIES[family](tmp_path / "model", num_hidden_layers=5), tmp_path / "killed"
    step = step | {"params_target": 0.7}
    command = [sys.executable, "-m", "tests.models.prune.slim_killed", json.dumps(step), str(model), str(room)]
    ended = subprocess.run(command, check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    heard = Heard()
    gone_on = slim(step, model, room, heard)
    assert any(f" {done} of " in message for message in heard.messages)
    quiet = slim(step, model, tmp_path / "quiet")
    assert digests(gone_on.whole) == digests(quiet.whole) and gone_on.measured == quiet.measured
