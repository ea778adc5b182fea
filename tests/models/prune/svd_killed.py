"""A job that factors, in a process that kills itself, the hard way, at a place given on the command line.

    python -m tests.models.prune.svd_killed MODEL ROOM PART BLOCKS

PART: `gradients`, `spectra` or `factors`, which go through the blocks one after the other; BLOCKS: after how many.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

from models.pipeline import run
from tests.models.job_parts import Heard, inputs_of
from tests.models.prune.parts import spec_of, zeroing

STEP = zeroing("svd", params_target=0.7)


class Suicidal(Heard):
    def __init__(self, part: str, blocks: int) -> None:
        super().__init__()
        self._part, self._blocks = part, blocks

    def advance(self, done: int, total: int, unit: str) -> None:
        # Gradients go forwards and backwards, the others once.
        now = "gradients" if total == 8 else "factors" if self.messages_say("two factors") else "spectra"
        if unit == "blocks" and now == self._part and done == self._blocks:
            os.kill(os.getpid(), signal.SIGKILL)

    def messages_say(self, words: str) -> bool:
        return any(words in message for message in self.messages)


if __name__ == "__main__":
    model, room = map(Path, sys.argv[1:3])
    shutil.rmtree(room / "out", ignore_errors=True)  # as the worker does before every attempt
    run(inputs_of(spec_of(STEP), model, None, room), Suicidal(sys.argv[3], int(sys.argv[4])))
