"""How small a model must be to run so many times as fast on this machine: found by timing parts of both models."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from models.distill.cutting import settings_of
from models.files.checkpoint import SourceModel
from models.formats.directory import without_private, write_json
from models.measuring.speed import Seconds, timed
from models.prune.slimming.looking import Looking
from models.streaming.frame import Frame
from models.streaming.walk import Kept
from squeeze.errors import SpecInvalid
from squeeze.reports.report import Speed
from squeeze.reports.speed import SpeedTarget
from squeeze.shapes.slimmed import Sides, carried
from squeeze.shapes.widths import Widths, fuller, narrowing, sides_at, widths_of
from squeeze.steps.slimming import Paced

TOLERANCE = 0.1  # by which two measurements of one model differ on a machine that does other things too
TIMED_BLOCKS = 3  # of those that are alike
TURNS = 3  # that everything is timed in, some time apart
SECONDS, WIDTHS, TIMES = "seconds", "paced_widths", "paced_times"


def of_blocks(step: Paced, looking: Looking) -> dict[str, Tensor]:
    """`seconds`, (1 + blocks,) float64: what lies around the blocks, and each block; those that are alike are as quick.

    Raises SpecInvalid, with what can be, where even the quickest block alone misses the target.
    """
    frame = looking.frame

    def find() -> dict[str, Tensor]:
        alike: dict[str, list[int]] = {}
        for index in range(frame.count):
            alike.setdefault(repr(settings_of(frame.skeleton(index))), []).append(index)
        chosen = {kind: [own[len(own) * n // TIMED_BLOCKS] for n in range(TIMED_BLOCKS)] for kind, own in alike.items()}
        some = sorted({index for own in chosen.values() for index in own})
        turns = [timed([frame], looking.ids[0], some, [step.speed_of])[step.speed_of][0] for _ in range(TURNS)]
        times = {index: min(turn.blocks[place] for turn in turns) for place, index in enumerate(some)}
        each = {index: median(times[one] for one in chosen[kind]) for kind, own in alike.items() for index in own}
        around = min(turn.around for turn in turns)
        return {SECONDS: torch.tensor([around, *(each[index] for index in range(frame.count))]).double()}

    paced = _kept(looking, find)
    quickest = int(paced[SECONDS][1:].argmin())
    most = _quicker(paced, [index for index in range(frame.count) if index != quickest])
    _refuse_missed(step, most, "with one decoder block left")
    return paced


def quick_enough(step: Paced, paced: Mapping[str, Tensor], gone: Sequence[int]) -> bool:
    """Whether a model without these blocks meets the target; one that has a single block left is no smaller."""
    assert step.speed_target is not None, "asked for where there is one"
    return _quicker(paced, gone) >= step.speed_target or len(gone) == len(paced[SECONDS]) - 2


def with_blocks(paced: Mapping[str, Tensor], gone: Sequence[int]) -> dict[str, Tensor]:
    """How many times as fast a model without these blocks is, and without the last of them; for `told`."""
    larger = _quicker(paced, gone[:-1]) if len(gone) > 1 else math.nan
    return {TIMES: torch.tensor([_quicker(paced, gone), larger], dtype=torch.float64)}


def of_widths(step: Paced, looking: Looking) -> dict[str, Tensor]:
    """The widest size that is quick enough, and how quick it and the next wider one are.

    Sizes are tried along the way that a share of the parameters takes (`squeeze.shapes.widths.narrowing`), halving what
    is left of it each time: a model is supposed to be the quicker the narrower it is. Each is timed by its first block,
    of weights that the original's block begins with, in turn with that block; all blocks are alike.

    Raises SpecInvalid, with what can be, where half of everything misses the target.
    """
    frame, target = looking.frame, step.speed_target
    assert target is not None, "asked for where there is one"
    sides = carried(frame.source.config, {name: one.shape for name, one in frame.source.entries.items()})
    whole = widths_of(frame.source.config, sides)
    times: dict[Widths, float] = {whole: 1.0}

    def quick(widths: Widths) -> bool:
        if widths not in times:
            times[widths] = _times(step, frame, looking.ids[0], widths, sides)
            size = f"{widths.inner:,} neurons, {widths.heads} heads, {widths.hidden:,} channels"
            looking.notify.event("info", f"{size}: {times[widths]:.3g} times as fast")
        return times[widths] >= target

    def find() -> dict[str, Tensor]:
        path = narrowing(whole)
        if not quick(path[-1]):
            _refuse_missed(step, times[path[-1]], "with half of the neurons, heads and channels")
        place = _first(path, quick)
        found, larger = path[place], times[path[place - 1]]
        if found.groups < whole.groups or found.hidden < whole.hidden:
            wider = fuller(found, whole)
            place = _first(wider, quick)
            found, larger = wider[place], times[wider[place - 1]] if place else larger
        return {
            WIDTHS: torch.tensor([found.hidden, found.inner, found.groups]),
            TIMES: torch.tensor([times[found], larger if larger != times[whole] else math.nan], dtype=torch.float64),
        }

    return _kept(looking, find)


def paced_widths(whole: Widths, paced: Mapping[str, Tensor]) -> Widths:
    """The size that was found."""
    hidden, inner, groups = paced[WIDTHS].tolist()
    return replace(whole, hidden=hidden, inner=inner, groups=groups)


def told(step: Paced, paced: Mapping[str, Tensor]) -> SpeedTarget:
    """What the report says of it."""
    assert step.speed_target is not None, "asked for where there is one"
    found, larger = paced[TIMES].tolist()
    return SpeedTarget(
        asked=step.speed_target,
        speed_of=step.speed_of,
        timed=found,
        next_larger=None if math.isnan(larger) else larger,
    )


def measured(target: SpeedTarget, before: Speed, after: Speed) -> tuple[SpeedTarget, list[str]]:
    """The same with what the result was measured to be, and a warning where that misses it by more than TOLERANCE."""
    times = getattr(after, target.speed_of) / getattr(before, target.speed_of)
    warnings = []
    if times < target.asked * (1 - TOLERANCE):
        warnings.append(
            f"the model is {times:.3g} times as fast as the original, measured as it was written; when its size was "
            f"chosen it was {target.timed:.3g} times, and {target.asked:g} were asked for: the machine did other "
            "things too. Ask for a little more, or give the worker a machine of its own"
        )
    return target.model_copy(update={"measured": times}), warnings


def _kept(looking: Looking, find: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What is found, kept for the next attempt: it would find other times, and another size."""
    kept = Kept(looking.directory.with_name("timed"), looking.mark)
    if kept.last() is not None:
        return kept.sums(1, "paced")
    found = find()
    kept.save(1, {}, {"paced": found})
    return found


def _quicker(paced: Mapping[str, Tensor], gone: Sequence[int]) -> float:
    seconds = paced[SECONDS]
    return float(seconds.sum() / (seconds.sum() - seconds[[index + 1 for index in gone]].sum()))


def _refuse_missed(step: Paced, most: float, how: str) -> None:
    assert step.speed_target is not None, "asked for where there is one"
    if most < step.speed_target:
        raise SpecInvalid(
            f"{how} the model is {most:.3g} times as fast on this machine ({step.speed_of}): speed_target can be at "
            f"most {math.floor(100 * most) / 100:g}, not {step.speed_target:g}",
            param="speed_target",
        )


def _first(path: Sequence[Widths], quick: Callable[[Widths], bool]) -> int:
    """The first place that is quick enough, where the last one is, and all behind the first one are."""
    below, above = -1, len(path) - 1
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if quick(path[middle]) else (middle, above)
    return above


@dataclass(frozen=True)
class _Corner(SourceModel):
    """A model whose tensors are what those of another begin with, along all sides. corners: their sides."""

    corners: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        return super().tensor(name)[tuple(map(slice, self.corners[name]))].contiguous()


def _times(step: Paced, frame: Frame, prompt: Tensor, widths: Widths, sides: Sides) -> float:
    """How many times as fast a model of these widths is."""
    source = frame.source
    with TemporaryDirectory() as name:
        write_json(Path(name) / "config.json", without_private(source.config) | widths.settings)
        corner = _Corner(Path(name), source.config, source.entries, source.row, sides_at(widths, sides))
        other = Frame(corner, frame.dtype, frame.device)
        turns = [timed([frame, other], prompt, [0], [step.speed_of])[step.speed_of] for _ in range(TURNS)]
    return median(_whole(first, frame.count) / _whole(second, frame.count) for first, second in turns)


def _whole(seconds: Seconds, count: int) -> float:
    return seconds.around + count * seconds.blocks[0]
