"""Leaves out decoder blocks: those that change least of what comes to them, or that the text misses least."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from models.distill.cutting import cut, refuse_uneven
from models.files.checkpoint import SourceModel
from models.progress import Notify
from models.prune.slimming import pacing, removal
from models.prune.slimming.looking import Looked, Looking, watched
from models.streaming.frame import Frame
from squeeze.costs.slimming_work import judged_sequences
from squeeze.shapes.slimmed import Sides, blocks_left, carried
from squeeze.steps.slimming import Depth

INFLUENCE = "1 less the cosine of what a block is given and what it hands on, mean over tokens"
PERPLEXITY = "perplexity without the block of {tokens:,} tokens of the calibration text; with all of them {whole:.5g}"
ANEW = "; judged anew after each block that went: {}"
LARGEST_LOSS = 700.0  # nats a token, so that a perplexity stays a number
INSTEAD = "take another model"


class Influence:
    """Adds up 1 − cos(x, y) of what a block is given, x, and hands on, y, over all tokens (arXiv 2403.03853 §3.1)."""

    def __init__(self, frame: Frame) -> None:
        self.sums = {name: torch.zeros(frame.count, dtype=torch.float64) for name in ("changed", "tokens")}

    def watching(self, index: int, block: nn.Module) -> AbstractContextManager[object]:  # noqa: ARG002 - a Watcher's
        return nullcontext()

    def seen(self, index: int, before: Tensor, after: Tensor) -> None:
        cosines = torch.cosine_similarity(before.float(), after.float(), dim=-1)  # (B, T, C) -> (B, T)
        self.sums["changed"][index] += float((1 - cosines).sum(dtype=torch.float64))
        self.sums["tokens"][index] += cosines.numel()


def prune(importance: Tensor, left: int) -> list[int]:
    """Numbers of the blocks that go, the least important first, so that `left` stay; of equal ones the later.

    importance: (blocks,). Source: arXiv 2403.03853 §3.2, all judged in the whole model and removed at once.
    """
    order: list[int] = torch.argsort(importance, descending=True, stable=True).tolist()
    return order[left:][::-1]


def planned(step: Depth, frame: Frame, sides: Sides) -> int:
    """Decoder blocks that stay; raises where that can't be. sides: of the model's tensors; needs its config alone."""
    refuse_uneven(frame.source, None, INSTEAD)
    return blocks_left(step, frame.source.config, sides)


def look(step: Depth, looking: Looking) -> Looked:
    """What the blocks are judged by, and how long each takes where that decides how many stay."""
    paced = pacing.of_blocks(step, looking) if step.speed_target is not None else {}
    if step.importance == "influence":
        found = watched(looking, Influence(looking.frame))
        return Looked({**found.sums, **paced}, found.original)
    config = looking.frame.source.config
    sides = carried(config, looking.frame.sides())

    def enough(gone: Sequence[int]) -> bool:
        if not step.iterative:
            return len(gone) == 1
        if step.speed_target is not None:
            return pacing.quick_enough(step, paced, gone)
        return len(gone) == looking.frame.count - blocks_left(step, config, sides)

    found = removal.looked(looking, enough)
    tokens = judged_sequences(*looking.ids.shape) * looking.ids.shape[1]
    return Looked({**found.sums, **paced, "tokens": torch.tensor(tokens)}, found.original)


def smaller(
    step: Depth, source: SourceModel, sides: Sides, sums: Mapping[str, Tensor], out: Path, notify: Notify
) -> tuple[SourceModel, dict[str, object]]:
    """The smaller model on disk, and what the report says of it."""
    if step.importance == "influence":
        importance, told = sums["changed"] / sums["tokens"], INFLUENCE
    else:
        importance = sums[removal.LOSSES][0].clamp_max(LARGEST_LOSS).exp()
        told = PERPLEXITY.format(tokens=int(sums["tokens"]), whole=float(sums[removal.WHOLE][0].exp()))
    if step.iterative:
        gone: list[int] = sums[removal.LOSSES].argmin(dim=-1).tolist()
        told += ANEW.format(", ".join(map(str, gone)))
    else:
        order = prune(importance, 0)
        gone = order[: _going(step, source, sides, sums, order)]
    found: dict[str, object] = {"importance": told, "blocks": importance.tolist(), "removed": sorted(gone)}
    if step.speed_target is not None:
        found["speed_target"] = pacing.told(step, pacing.with_blocks(sums, gone))
    kept = [number for number in range(len(importance)) if number not in gone]
    return cut(source, kept, out, notify, param=None, instead=INSTEAD), found


def _going(step: Depth, source: SourceModel, sides: Sides, sums: Mapping[str, Tensor], order: Sequence[int]) -> int:
    """How many blocks go. order: of all, the least important first."""
    if step.speed_target is None:
        return len(order) - blocks_left(step, source.config, sides)
    return next(count for count in range(1, len(order)) if pacing.quick_enough(step, sums, order[:count]))
