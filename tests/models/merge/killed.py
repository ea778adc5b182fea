"""A merge in a process of its own that kills itself, the hard way, after so many bytes.

python -m tests.models.merge.killed METHOD BASE ROOM SHARE ENTRY...
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path

from models.merge.job import merged
from models.resources import Clock
from squeeze.steps.merging import Merge
from tests.models.job_parts import Heard
from tests.models.merge.parts import merging_inputs, spec_of


class Suicidal(Heard):
    """Sends its own process a signal once it has written its share."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self._share = share

    def advance(self, done: int, total: int, unit: str) -> None:
        if unit == "bytes" and done >= self._share * total:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    method, base, room, share, *entries = sys.argv[1:]
    paths = [Path(entry) for entry in entries]
    inputs = merging_inputs(
        spec_of({"method": method}, paths, evaluation={"perplexity": False, "divergence": False}),
        Path(base),
        paths,
        Path(room),
    )
    step = inputs.spec.steps[0]
    assert isinstance(step, Merge)
    merged(dataclasses.replace(inputs, snapshot_seconds=0.0), step, Clock(), Suicidal(float(share)))
