"""A training of rounded weights in a process of its own that kills itself, the hard way, after so many steps.

    python -m tests.models.train.killed_rounded MODEL ROOM STEP

It saves a checkpoint at every step.
"""

import signal
import sys
from pathlib import Path
from typing import Any

import torch

from models.files.checkpoint import open_model
from models.fingerprint import fingerprint
from models.progress import Notify, Silent
from models.streaming.team import SOLO
from models.streaming.teamwork import frames_of, lead
from models.texts.material import Material, read_tokenizer
from models.train.rounded import Begun, learned_codes
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.quantization import QAT
from tests.models import job_parts
from tests.models.train.killed import Suicidal


def spec_of(step: dict[str, Any] | None = None) -> JobSpec:
    quick = {"method": "qat", "bits": 2, "steps": 8, "batch_size": 4, "learning_rate": 0.1}
    return job_parts.spec_of(quick | (step or {}))


def begun_of(spec: JobSpec, model: Path, room: Path, notify: Notify | None = None) -> Begun:
    """The first pass, from where an earlier process of the same room stopped."""
    inputs, step = job_parts.inputs_of(spec, model, None, room), spec.steps[0]
    assert isinstance(step, QAT)
    source = open_model(model)
    frames = frames_of(source, step, torch.device("cpu"))
    texts = Material(spec, step, read_tokenizer(model), frames.reference, None, None)
    assert texts.calibration is not None
    mark = fingerprint(spec, inputs.revision, inputs.device, source, texts)
    ids = texts.calibration.ids if step.reads_inputs else None
    directory, notify = inputs.work / "quantize", notify or Silent()
    done = lead(SOLO, frames, step.begun, ids, texts.windows, directory, mark, notify, snapshot_seconds=0.0)
    rest = inputs.work / "rounded", mark, spec.seed, None, 0.0
    return Begun(step, frames, texts.calibration.ids, texts.windows, done, *rest)


if __name__ == "__main__":
    learned_codes(begun_of(spec_of(), Path(sys.argv[1]), Path(sys.argv[2])), Suicidal(int(sys.argv[3]), signal.SIGKILL))
