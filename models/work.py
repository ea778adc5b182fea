"""What there is to do, counted from the models that are there: told as soon as it is known, kept for later plans."""

from collections.abc import Collection, Mapping
from pathlib import Path

from models.files.checkpoint import SourceModel
from models.texts.data import bytes_of
from squeeze.costs.distillation_work import Lessons, counted_distillation, lessons
from squeeze.costs.trainable import learned
from squeeze.costs.training_work import counted_training, tokens_to_train
from squeeze.costs.work import counted
from squeeze.specs.choosing import supposed
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.compressing import Compress
from squeeze.steps.distillation import Distill
from squeeze.steps.every import Step
from squeeze.steps.finetuning import Finetune
from squeeze.steps.training import Train

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


def with_what_follows(
    work: Mapping[str, float], source: SourceModel, spec: JobSpec, step: Step, text: Path | None
) -> dict[str, float]:
    """The same of a step before others, with what these will likely take, as what comes last until they tell of
    themselves. source: the model before the step, which they are supposed to find. text: of the job, on disk.
    """
    behind = spec.steps[spec.steps.index(step) + 1 :]
    text_bytes = None if text is None else bytes_of(text)
    rest = sum(sum(_likely(source, spec, one, text_bytes).values()) for one in behind)
    return {**work, "certifying": work.get("certifying", 0.0) + rest}


def _likely(source: SourceModel, spec: JobSpec, step: Step, text_bytes: int | None) -> dict[str, float]:
    """Operations by stage; none where nothing tells how long a training goes on."""
    if isinstance(step, Compress):
        return work_of(source, spec, step)
    if not isinstance(step, Train):
        return {}
    shape = source.shape()
    length = min(spec.data.length, shape.positions or spec.data.length)
    if isinstance(step, Distill):
        told = lessons(spec, step, length, text_bytes, None)
        return {} if told is None else work_of_distilling(source, source, spec, step, told, step.steps)
    if isinstance(step, Finetune):
        spec, step, _ = supposed(spec, step, source.parameters, shape.positions)
    tokens = tokens_to_train(spec, step, length, text_bytes)
    if tokens is None:
        return {}
    known = learned(step, source.config, {name: entry.shape for name, entry in source.entries.items()})
    counts = counted_training(shape, spec, step, known, tokens, last=step is spec.steps[-1], steps=step.steps)
    return {stage: count.whole for stage, count in counts.items()}


def summed(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    """Work by stage of two steps together."""
    return {stage: first.get(stage, 0.0) + second.get(stage, 0.0) for stage in {**first, **second}}
