"""Who learns: a shape that the teacher is cut to, or a model of its own."""

import torch

from models.distill.cutting import cut, refuse_uncuttable
from models.files.checkpoint import SourceModel, open_or_convert
from models.formats.directory import refuse_broken_companions
from models.job import Inputs
from models.streaming.frame import Frame
from squeeze.steps.distillation import Distill, evenly


def refuse_unteachable(step: Distill, teacher: Frame) -> None:
    """Raises where the teacher can't be cut to what the step asks for; needs its config alone."""
    if step.student.layers is not None:
        refuse_uncuttable(teacher, step.student.layers)


def student_of(inputs: Inputs, step: Distill, teacher: SourceModel) -> tuple[SourceModel, str]:
    """The student before it has learned anything, and what the report calls it."""
    if step.student.layers is None:
        assert inputs.student is not None, "a student that is no shape is a model"
        student = open_or_convert(inputs.student, inputs.work / "student")
        refuse_broken_companions(student)
        return student, "@".join(filter(None, (inputs.student_name, inputs.student_revision)))
    count = Frame(teacher, torch.float32, torch.device("cpu")).count
    kept = evenly(count, step.student.layers)
    name = f"blocks {', '.join(map(str, kept))} of the teacher's {count}, counted from 0"
    return cut(teacher, kept, inputs.work / "student"), name
