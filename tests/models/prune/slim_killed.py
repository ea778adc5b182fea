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
    """Sends its own process a signal in the middle of the calibration text's way, as `unit` counts it."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def advance(self, done: int, total: int, unit: str) -> None:
        # The fourth block's third pass of a text that goes around each; the first block that is gone back through.
        if unit == self.unit and done == {"blocks": 3, "passes of a block": 12, "steps forwards and back": 8}.get(unit):
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    step, model, room = sys.argv[1:]
    asked = json.loads(step)
    unit = {"perplexity": "passes of a block", "gradient": "steps forwards and back"}.get(
        asked.get("importance"), "blocks"
    )
    slim(asked, Path(model), Path(room), Suicidal(unit))
