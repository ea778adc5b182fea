"""A training in a process of its own that is ended while it learns.

    python -m tests.models.train.killed MODEL ROOM STEP SIGNAL

After so many steps it sends itself the signal. It saves a checkpoint after every step where that is 9, else none.
"""

import dataclasses
import os
import sys
from pathlib import Path

from tests.models.job_parts import Heard
from tests.models.train.parts import go_on, inputs_for, spec_of

RESTLESS = {"dropout": 0.1, "evaluate_every": 5}


class Suicidal(Heard):
    def __init__(self, step: int, number: int) -> None:
        super().__init__()
        self._step, self._number = step, number

    def advance(self, done: int, total: int, unit: str) -> None:
        if unit == "steps" and done == self._step:
            os.kill(os.getpid(), self._number)


if __name__ == "__main__":
    number = int(sys.argv[4])
    inputs = inputs_for(spec_of(RESTLESS), Path(sys.argv[1]), Path(sys.argv[2]))
    seconds = 0.0 if number == 9 else 1e9
    go_on(dataclasses.replace(inputs, snapshot_seconds=seconds), Suicidal(int(sys.argv[3]), number))
