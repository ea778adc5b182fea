"""A model made smaller in a process of its own that kills itself, the hard way, after the third block.

python -m tests.models.prune.slim_killed METHOD MODEL ROOM
"""

import os
import signal
import sys
from pathlib import Path

from tests.models.job_parts import Heard
from tests.models.prune.slim_parts import slim


class Suicidal(Heard):
    """Sends its own process a signal in the middle of the calibration text's way."""

    def advance(self, done: int, total: int, unit: str) -> None:
        if (done, unit) == (3, "blocks"):
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    method, model, room = sys.argv[1:]
    slim({"method": method, "params_target": 0.7}, Path(model), Path(room), Suicidal())
