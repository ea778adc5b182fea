"""A vocabulary trimmed in a process of its own that kills itself, the hard way: while it reads, or while it measures.

python -m tests.models.prune.trim_killed UNIT DONE MODEL ROOM
"""

import os
import signal
import sys
from pathlib import Path

from tests.models.job_parts import Heard
from tests.models.prune.tokenizers_of import words
from tests.models.prune.trim_parts import trim

LINES = list(words(8, 9000))  # three parts


class Suicidal(Heard):
    """Sends its own process a signal after so many parts of the text, or blocks, in all."""

    def __init__(self, unit: str, left: int) -> None:
        super().__init__()
        self.unit, self.left = unit, left

    def advance(self, done: int, total: int, unit: str) -> None:
        self.left -= unit == self.unit
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    unit, left, model, room = sys.argv[1:]
    trim({}, Path(model), Path(room), LINES, Suicidal(unit, int(left)))
