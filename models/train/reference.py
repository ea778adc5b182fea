"""The losses that a training's domains are held against: of the model before anything was taken from it."""

from dataclasses import replace

from torch import Tensor

from models.distill.held_out import losses_said, read_held_out
from models.distill.lesson import Lesson
from models.distill.vocabulary import shared_vocabulary
from models.files.checkpoint import open_or_convert
from models.job import Inputs
from models.progress import Notify
from models.streaming.frame import Frame
from models.train.domains import Domains
from models.train.prepare import Prepared
from models.train.task import Task
from squeeze.errors import VocabulariesDiffer
from squeeze.objects import Stage


def reference_losses(
    prepared: Prepared, inputs: Inputs, lesson: Lesson | None, notify: Notify
) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood, number) of the learned tokens of each held-out example, both (n,) float64: of a
    distillation the teacher's; else those of the model before a step pruned it, which reads them one block in memory
    at a time.
    """
    if lesson is not None:
        return lesson.teacher_losses()
    assert inputs.teacher is not None, "something was taken from a model"
    work = inputs.work / "reference"
    before = open_or_convert(inputs.teacher, work / "source")
    if shared_vocabulary(before.path, prepared.source.path) is None:
        raise VocabulariesDiffer(
            "the model that was pruned cut text into other tokens than the one that learns, so that their losses can't "
            "be compared: leave domain_column out",
            param="domain_column",
        )
    notify.stage(Stage.calibrating)
    frame = Frame(before, prepared.dtype, prepared.device)
    held_out = prepared.held_out
    hidden = read_held_out(frame, held_out, work, prepared.mark, notify, inputs.activation_bytes)
    return losses_said(frame, hidden, held_out)


def weighed(prepared: Prepared, task: Task, reference: tuple[Tensor, Tensor]) -> Task:
    """The training with its domains weighed. reference: of `reference_losses`."""
    names = [*(prepared.split.data.domains or ())]
    domains = Domains.of(names, task.plan, task.examples, [0.0] * len(names))
    told = prepared.processes.team.tell([*domains.losses(task.held_out, reference).values()])
    return replace(task, domains=replace(domains, reference=tuple(told)))
