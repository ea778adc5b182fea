"""A small distillation: a teacher that was taught a little itself, and jobs with it."""

from pathlib import Path
from typing import Any

from models.job import Inputs
from models.progress import Silent
from models.train.checkpoints import Checkpoints
from models.train.loop import train
from models.train.task import accelerator_of
from models.train.whole import write_trained
from squeeze.specs.job_spec import JobSpec
from tests.models.tiny import FAMILIES
from tests.models.train.parts import begin, inputs_for, spec_of


def teacher(room: Path) -> Path:
    """A tiny Llama of four blocks that can do the sums of `tests.models.train.parts` a little."""
    model = FAMILIES["llama"](room / "random", num_hidden_layers=4)
    step = {"method": "full", "steps": 30, "learning_rate": 0.003}
    inputs = inputs_for(spec_of(step), model, room / "taught")
    prepared, task = begin(inputs)
    accelerator = accelerator_of(prepared.precision, prepared.device)
    train(task, accelerator, Checkpoints(inputs.work / "train", prepared.mark), Silent(), 1e9)
    write_trained(task.model, prepared.source, room / "teacher")
    return room / "teacher"


def distilling(step: dict[str, Any] | None = None, **changes: Any) -> JobSpec:
    asked = {"kind": "distill", "method": "logits", "student": {"layers": 2}, "learning_rate": 0.003} | (step or {})
    return spec_of(asked, **changes)


def inputs_of(step: dict[str, Any] | None, model: Path, room: Path, **changes: Any) -> Inputs:
    return inputs_for(distilling(step, **changes), model, room)
