"""What a distillation has beside a training: a teacher, what it says, and how far the student is from it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from models.distill.held_out import Apart, apart, read_held_out
from models.frame import Frame
from models.job import Inputs
from models.progress import Notify
from models.train.examples import Examples
from models.train.loop import Task
from models.train.prepare import Prepared
from models.train.scoring import Objective
from squeeze.distillation import Distill
from squeeze.objects import Stage
from squeeze.report import Distillation


@dataclass(frozen=True)
class Teaching:
    """What a method is given. frame: the teacher, block by block. load: the teacher whole, on the device, nothing of it
    to learn. vocabulary: ids that both models know. directory: kept between attempts. mark: of all that decides what
    the teacher says. memory_bytes: see `read_chunk`.
    """

    frame: Frame
    load: Callable[[], Any]
    examples: Examples
    vocabulary: int
    directory: Path
    mark: str
    notify: Notify
    memory_bytes: int | None


@dataclass(frozen=True)
class Taught:
    """What a method makes of it. beside: learns with the student. bytes_per_token: that are kept of what the teacher
    says.
    """

    objective: Objective
    beside: nn.Module | None = None
    bytes_per_token: int | None = None


class Lesson:
    """One distillation, once the teacher has read the text."""

    def __init__(self, prepared: Prepared, inputs: Inputs, notify: Notify) -> None:
        step, teacher = prepared.step, prepared.teacher
        assert isinstance(step, Distill) and teacher is not None, "a distillation has a teacher"
        notify.stage(Stage.calibrating)
        self._prepared, self._step = prepared, step
        self._frame = Frame(teacher, prepared.dtype, prepared.device)
        self._vocabulary = min(int(self._frame.model.config.vocab_size), prepared.vocabulary)
        directory, mark = inputs.work / "teacher", prepared.mark
        self._hidden: Tensor = read_held_out(
            self._frame, prepared.held_out, directory, mark, notify, inputs.activation_bytes
        )
        self._taught: Taught = import_module(f"models.{step.kind}.{step.method}").distill(
            step,
            Teaching(
                frame=self._frame,
                load=lambda: prepared.load(teacher.path),
                examples=prepared.split.train,
                vocabulary=self._vocabulary,
                directory=directory,
                mark=mark,
                notify=notify,
                memory_bytes=inputs.activation_bytes,
            ),
        )

    def given(self, task: Task) -> Task:
        """The training with what it is to learn."""
        return replace(task, objective=self._taught.objective, beside=self._taught.beside)

    def apart(self, task: Task, accelerator: Accelerator) -> Apart:
        return apart(task, accelerator, self._frame, self._hidden, self._vocabulary)

    def told(self, before: Apart, after: Apart) -> Distillation:
        """before, after: of the student, on the held-out examples."""
        prepared, teacher, taught = self._prepared, self._frame.source, self._taught
        learned = int(prepared.split.train.scored.sum())
        return Distillation(
            student=prepared.student,
            student_parameters=prepared.source.parameters,
            student_bytes=prepared.source.weight_bytes,
            teacher_parameters=teacher.parameters,
            vocabulary=self._vocabulary,
            stored_bytes_per_token=taught.bytes_per_token,
            stored_bytes=None if taught.bytes_per_token is None else taught.bytes_per_token * learned,
            loss_teacher=after.teacher_loss,
            divergence_before=before.divergence,
            divergence_after=after.divergence,
            agreement_before=before.agreement,
            agreement_after=after.agreement,
        )
