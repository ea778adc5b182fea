"""What there is to do, counted from the models that are there: told as soon as it is known, kept for later plans."""

from collections.abc import Collection

from models.files.checkpoint import SourceModel
from squeeze.costs.distillation_work import Lessons, counted_distillation
from squeeze.costs.trainable import learned
from squeeze.costs.work import counted
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.compressing import Compress
from squeeze.steps.distillation import Distill

# Before a training; the last two of a base that is rounded first.
BEFORE_TRAINING = ("loading", "teaching", "compressing", "evaluating")


def work_of_distilling(
    teacher: SourceModel, student: SourceModel, spec: JobSpec, step: Distill, told: Lessons, steps: int | None = None
) -> dict[str, float]:
    """Operations by stage. steps: of the optimizer; None: as many as there are where sequences are full."""
    known = learned(step, student.config, {name: entry.shape for name, entry in student.entries.items()})
    last = step is spec.steps[-1]
    counts = counted_distillation(teacher.shape(), student.shape(), spec, step, known, told, last=last, steps=steps)
    return {stage: count.whole for stage, count in counts.items()}


def work_of(source: SourceModel, spec: JobSpec, step: Compress) -> dict[str, float]:
    """Operations by stage of one step that compresses, as if it ended the job."""
    alone = spec.model_copy(update={"steps": (step,)})
    return {name: count.whole for name, count in counted(source.shape(step.ignore), alone).items()}


def ahead(
    work: dict[str, float], source: SourceModel, spec: JobSpec, done: Collection[str] = BEFORE_TRAINING
) -> dict[str, float]:
    """The same for what is left, with the step that follows. work: of a step that trains. source: the model that
    learns. done: stages that are behind.
    """
    left = {stage: each for stage, each in work.items() if stage not in done}
    for step in spec.steps:
        if step is spec.steps[-1] and isinstance(step, Compress):
            left = summed(left, {name: count.whole for name, count in counted(source.shape(step.ignore), spec).items()})
    return left


def summed(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    """Work by stage of two steps together."""
    return {stage: first.get(stage, 0.0) + second.get(stage, 0.0) for stage in {**first, **second}}
