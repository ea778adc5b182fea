"""Who learns: a shape that the teacher is cut to."""

from pathlib import Path

import torch

from models.checkpoint import SourceModel
from models.distill.cutting import cut, evenly, refuse_uncuttable
from models.frame import Frame
from squeeze.distillation import Distill


def refuse_unteachable(step: Distill, teacher: Frame) -> None:
    """Raises where the teacher can't be cut to what the step asks for; needs its config alone."""
    if step.student.layers is not None:
        refuse_uncuttable(teacher, step.student.layers)


def student_of(step: Distill, teacher: SourceModel, work: Path) -> tuple[SourceModel, str]:
    """The student before it has learned anything, and what the report calls it. work: kept between attempts."""
    assert step.student.layers is not None, "a student is a shape"
    count = Frame(teacher, torch.float32, torch.device("cpu")).count
    kept = evenly(count, step.student.layers)
    name = f"blocks {', '.join(map(str, kept))} of the teacher's {count}, counted from 0"
    return cut(teacher, kept, work / "student"), name
