"""A training that finds its own numbers, in a process of its own that kills itself, the hard way, after so many steps.

    python -m tests.models.train.killed_choosing MODEL ROOM STEP

It saves a checkpoint at every step.
"""

import dataclasses
import signal
import sys
from pathlib import Path

from models.pipeline import run
from squeeze.specs.job_spec import JobSpec
from tests.models.train.killed import Suicidal
from tests.models.train.parts import inputs_for, spec_of

AUTO = {"learning_rate": "auto", "batch_size": "auto", "micro_batch_size": "auto", "steps": 12, "dropout": 0.1}


def asked() -> JobSpec:
    return spec_of(AUTO, data={"source": "file-abcdefgh", "sequence_length": "auto"})


if __name__ == "__main__":
    inputs = inputs_for(asked(), Path(sys.argv[1]), Path(sys.argv[2]))
    run(dataclasses.replace(inputs, snapshot_seconds=0.0), Suicidal(int(sys.argv[3]), signal.SIGKILL))
