"""A job that prunes and then quantizes, in a process that kills itself, the hard way, at a place given on the command
line.

    python -m tests.models.prune.killed MODEL ROOM KIND BLOCKS

KIND: of the step, or `look` for the first look of one that has to choose how many zeros each block gets; and BLOCKS:
after how many of its blocks.
"""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from models.pipeline import run
from squeeze.objects import Stage
from tests.models.job_parts import Heard, inputs_of
from tests.models.prune.parts import spec_of, zeroing

UNEVEN = zeroing("wanda", distribution="owl", sparsity=0.6)
STEPS = (zeroing("sparsegpt", pattern="2:4"), {"kind": "quantize", "method": "gptq", "group_size": 32})


class Suicidal(Heard):
    def __init__(self, step: int, blocks: int, *, looking: bool = False) -> None:
        super().__init__()
        self._left, self._blocks, self._looking = step, blocks, looking

    def stage(self, stage: Stage) -> None:
        super().stage(stage)
        self._left -= stage == (Stage.calibrating if self._looking else Stage.compressing)

    def advance(self, done: int, total: int, unit: str) -> None:
        if unit == "blocks" and self._left < 0 and done == self._blocks:
            os.kill(os.getpid(), signal.SIGKILL)

    def event(self, kind: str, message: str, **data: Any) -> None:
        sys.stdout.write(message + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    model, room = map(Path, sys.argv[1:3])
    shutil.rmtree(room / "out", ignore_errors=True)  # as the worker does before every attempt
    look = sys.argv[3] == "look"
    place = Suicidal(0 if look else ("prune", "quantize").index(sys.argv[3]), int(sys.argv[4]), looking=look)
    run(inputs_of(spec_of(*([UNEVEN] if look else STEPS)), model, None, room), place)
