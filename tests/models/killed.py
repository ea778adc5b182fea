"""A job in a process of its own that kills itself, the hard way, at a place given on the command line.

    python -m tests.models.killed MODEL TEXT ROOM PLACE

PLACE: `blocks N`, once N blocks are done; `exporting FORMAT`, in the middle of writing it; `certifying`.
"""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from models.pipeline import run
from squeeze.objects import Stage
from tests.models.job_parts import BOTH, Heard, inputs_of, spec_of


class Suicidal(Heard):
    def __init__(self, place: str) -> None:
        super().__init__()
        self._kind, _, self._detail = place.partition(" ")
        self._written = 0

    def stage(self, stage: Stage) -> None:
        super().stage(stage)
        if stage == self._kind and not self._detail:
            die()

    def advance(self, done: int, total: int, unit: str) -> None:
        if unit == self._kind == "blocks" and done == int(self._detail):
            die()
        if unit == "bytes" and self._kind == "exporting":
            if BOTH[self._written] == self._detail and 2 * done > total:
                die()
            self._written += done == total

    def event(self, kind: str, message: str, **data: Any) -> None:
        sys.stdout.write(message + "\n")
        sys.stdout.flush()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    model, text, room = map(Path, sys.argv[1:4])
    shutil.rmtree(room / "out", ignore_errors=True)  # as the worker does before every attempt
    run(inputs_of(spec_of(), model, text, room), Suicidal(sys.argv[4]))
