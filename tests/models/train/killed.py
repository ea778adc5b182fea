"""A training in a process of its own that kills itself, the hard way, after so many steps.

    python -m tests.models.train.killed MODEL ROOM STEP

It saves a checkpoint at every step.
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path

from tests.models.job_parts import Heard
from tests.models.train.parts import go_on, inputs_for, spec_of

RESTLESS = {"dropout": 0.1, "evaluate_every": 5}


class Suicidal(Heard):
    """Sends its own process a signal after a step."""

    def __init__(self, step: int, number: int) -> None:
        super().__init__()
        self._step, self._number = step, number

    def advance(self, done: int, total: int, unit: str) -> None:
        if unit == "steps" and done == self._step:
            os.kill(os.getpid(), self._number)


if __name__ == "__main__":
    inputs = inputs_for(spec_of(RESTLESS), Path(sys.argv[1]), Path(sys.argv[2]))
    go_on(dataclasses.replace(inputs, snapshot_seconds=0.0), Suicidal(int(sys.argv[3]), signal.SIGKILL))
