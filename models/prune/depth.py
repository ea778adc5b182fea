"""Leaves out decoder blocks: those that change least of what comes to them."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from models.checkpoint import SourceModel
from models.distill.cutting import cut, refuse_uneven
from models.frame import Frame
from models.progress import Notify
from squeeze.slim_shapes import Sides, blocks_left
from squeeze.slimming import Depth

IMPORTANCE = "1 less the cosine of what a block is given and what it hands on, mean over tokens"
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


def prune(importance: Tensor, left: int) -> tuple[int, ...]:
    """Numbers of the blocks that stay, in order: the `left` most important ones; of equal ones the earlier.

    importance: (blocks,). Source: arXiv 2403.03853 §3.2, all judged in the whole model and removed at once.
    """
    order = torch.argsort(importance, descending=True, stable=True)
    return tuple(sorted(order[:left].tolist()))


def planned(step: Depth, frame: Frame, sides: Sides) -> int:
    """Decoder blocks that stay; raises where that can't be. sides: of the model's tensors; needs its config alone."""
    refuse_uneven(frame.source, None, INSTEAD)
    return blocks_left(step, sides)


def watcher(frame: Frame) -> Influence:
    return Influence(frame)


def smaller(
    step: Depth, source: SourceModel, sides: Sides, sums: Mapping[str, Tensor], out: Path, notify: Notify
) -> tuple[SourceModel, dict[str, object]]:
    """The smaller model on disk, and what the report says of it."""
    influences = sums["changed"] / sums["tokens"]
    kept = prune(influences, blocks_left(step, sides))
    removed = [number for number in range(len(influences)) if number not in kept]
    model = cut(source, kept, out, notify, param=None, instead=INSTEAD)
    return model, {"importance": IMPORTANCE, "blocks": influences.tolist(), "removed": removed}
