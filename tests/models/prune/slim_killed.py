"""A model made smaller in a process of its own that kills itself, the hard way, after the third block.

python -m tests.models.prune.slim_killed STEP MODEL ROOM
"""

import json
import os
import signal
import sys
from pathlib import Path

from tests.models.job_parts import Heard
from tests.models.prune.slim_parts import slim


class Suicidal(Heard):
    """Sends its own process a signal in the middle of the calibration text's way."""

    def advance(self, done: int, total: int, unit: str) -> None:
        # Of a text that goes around each block, the fourth block's third pass.
        if (done, unit) in ((3, "blocks"), (12, "passes of a block")):
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    step, model, room = sys.argv[1:]
    slim(json.loads(step), Path(model), Path(room), Suicidal())
