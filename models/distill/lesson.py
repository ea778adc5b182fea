"""What a distillation has beside a training: a teacher, what it says, and how far the student is from it."""

from dataclasses import replace
from importlib import import_module

from accelerate import Accelerator
from torch import Tensor

from models.distill.held_out import Apart, apart, losses_said, read_held_out
from models.distill.teaching import Taught, Teaching
from models.distill.writing import ends_of
from models.job import Inputs
from models.progress import Notify
from models.streaming.frame import Frame
from models.texts.material import read_tokenizer
from models.train.prepare import Prepared
from models.train.task import Task
from squeeze.objects import Stage
from squeeze.reports.training import Distillation
from squeeze.steps.distillation import Distill


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
        self._hidden: Tensor | None = None
        if prepared.comparable:
            later = len(prepared.split.train.ids) * step.keeps_answers
            self._hidden = read_held_out(
                self._frame, prepared.held_out, directory, mark, notify, inputs.activation_bytes, later
            )
        self._taught: Taught = import_module(f"models.{step.kind}.{step.method}").distill(
            step,
            Teaching(
                frame=self._frame,
                student=Frame(prepared.source, prepared.dtype, prepared.device),
                ends=tuple(ends_of(read_tokenizer(prepared.source.path), self._frame.model.config)),
                load=lambda: prepared.load(teacher.path),
                examples=prepared.split.train,
                vocabulary=self._vocabulary,
                directory=directory,
                mark=mark,
                notify=notify,
                memory_bytes=inputs.activation_bytes,
                read=len(prepared.held_out.ids) * prepared.comparable,
            ),
        )

    def given(self, task: Task) -> Task:
        """The training with what it is to learn."""
        return replace(task, objective=self._taught.objective, beside=self._taught.beside)

    def apart(self, task: Task, accelerator: Accelerator) -> Apart | None:
        """None where they have no vocabulary in common."""
        if self._hidden is None:
            return None
        return apart(task, accelerator, self._frame, self._hidden, self._vocabulary)

    def teacher_losses(self) -> tuple[Tensor, Tensor]:
        """As `losses_said`, of the held-out examples. They have a vocabulary in common."""
        assert self._hidden is not None, "the teacher read them"
        return losses_said(self._frame, self._hidden, self._prepared.held_out)

    def told(self, before: Apart | None, after: Apart | None) -> Distillation:
        """before, after: of the student, on the held-out examples."""
        prepared, teacher, taught = self._prepared, self._frame.source, self._taught
        learned = int(prepared.split.train.scored.sum())
        factors = None if prepared.factors is None else prepared.factors.told
        return Distillation(
            student=prepared.student,
            student_parameters=factors.parameters_after if factors else prepared.source.parameters,
            student_bytes=factors.factor_bytes if factors else prepared.source.weight_bytes,
            teacher_parameters=teacher.parameters,
            vocabulary=self._vocabulary if prepared.comparable else None,
            stored_bytes_per_token=taught.bytes_per_token,
            stored_bytes=None if taught.bytes_per_token is None else taught.bytes_per_token * learned,
            loss_teacher=after.teacher_loss if after else None,
            divergence_before=before.divergence if before else None,
            divergence_after=after.divergence if after else None,
            agreement_before=before.agreement if before else None,
            agreement_after=after.agreement if after else None,
        )
