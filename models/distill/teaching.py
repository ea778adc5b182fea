"""What a method of distillation is given, and what it makes of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from models.progress import Notify
from models.streaming.frame import Frame
from models.train.examples import Examples
from models.train.scoring import Objective


@dataclass(frozen=True)
class Teaching:
    """What a method is given. frame: the teacher, block by block. student: the same of the student. ends: tokens that
    end what either writes. load: the teacher whole, on the device, nothing of it
    to learn. vocabulary: ids that both models know. directory: kept between attempts. mark: of all that decides what
    the teacher says. memory_bytes: see `read_chunk`. read: tokens that the teacher has read already.
    """

    frame: Frame
    student: Frame
    ends: tuple[int, ...]
    load: Callable[[], Any]
    examples: Examples
    vocabulary: int
    directory: Path
    mark: str
    notify: Notify
    memory_bytes: int | None
    read: int = 0


@dataclass(frozen=True)
class Taught:
    """What a method makes of it. beside: learns with the student. bytes_per_token: that are kept of what the teacher
    says.
    """

    objective: Objective
    beside: nn.Module | None = None
    bytes_per_token: int | None = None
