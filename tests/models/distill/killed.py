"""A distillation in a process of its own that kills itself, the hard way, after so many steps.

python -m tests.models.distill.killed MODEL ROOM STEP
"""

import dataclasses
import signal
import sys
from pathlib import Path

from tests.models.distill.parts import inputs_of
from tests.models.train.killed import Suicidal
from tests.models.train.parts import go_on

if __name__ == "__main__":
    inputs = inputs_of({"evaluate_every": 5}, Path(sys.argv[1]), Path(sys.argv[2]))
    go_on(dataclasses.replace(inputs, snapshot_seconds=0.0), Suicidal(int(sys.argv[3]), signal.SIGKILL))
