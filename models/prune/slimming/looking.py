"""What a method that makes a smaller model looks at, and what it saw: the calibration text on its way through."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from models.progress import Notify
from models.streaming.frame import Frame
from models.streaming.streams import Stream
from models.streaming.walk import Watcher, walk

WINDOWS, CALIBRATION = "windows", "calibration"


@dataclass(frozen=True)
class Looking:
    """frame: of the original. ids: of the calibration text, (n, T) int64. windows: of the evaluation text, which goes
    along; None: of none. directory: kept between attempts, as far as its `mark` is the same. snapshot_seconds,
    memory_bytes: see `walk`.
    """

    frame: Frame
    ids: Tensor
    windows: Tensor | None
    directory: Path
    mark: str
    notify: Notify
    snapshot_seconds: float
    memory_bytes: int | None


@dataclass(frozen=True)
class Looked:
    """sums: what a method decides by. original: the last hidden states of the windows."""

    sums: Mapping[str, Tensor]
    original: Stream | None


def watched(looking: Looking, watcher: Watcher) -> Looked:
    """What a watcher saw, in one pass of the text."""
    ids = {CALIBRATION: looking.ids}
    if looking.windows is not None:
        ids[WINDOWS] = looking.windows
    streams = walk(
        looking.frame,
        ids,
        looking.directory,
        looking.mark,
        looking.notify,
        looking.snapshot_seconds,
        watchers={CALIBRATION: watcher},
        memory_bytes=looking.memory_bytes,
    )
    return Looked(watcher.sums, streams.get(WINDOWS))
