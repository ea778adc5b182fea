"""Leaves out decoder blocks: those that change least of what comes to them, or that the text misses least."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from models.checkpoint import SourceModel
from models.distill.cutting import cut, refuse_uneven
from models.frame import Frame
from models.progress import Notify
from models.prune import removal
from models.prune.looking import Looked, Looking, watched
from squeeze.slim_shapes import Sides, blocks_left, carried
from squeeze.slim_work import judged_sequences
from squeeze.slimming import Depth

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


def look(step: Depth, looking: Looking) -> Looked:
    """What the blocks are judged by."""
    if step.importance == "influence":
        return watched(looking, Influence(looking.frame))
    sides = carried(looking.frame.source.config, looking.frame.sides())
    rounds = looking.frame.count - blocks_left(step, sides) if step.iterative else 1
    found = removal.looked(looking, rounds)
    tokens = judged_sequences(*looking.ids.shape) * looking.ids.shape[1]
    return Looked({**found.sums, "tokens": torch.tensor(tokens)}, found.original)


def smaller(
    step: Depth, source: SourceModel, sides: Sides, sums: Mapping[str, Tensor], out: Path, notify: Notify
) -> tuple[SourceModel, dict[str, object]]:
    """The smaller model on disk, and what the report says of it."""
    if step.importance == "influence":
        importance, told = sums["changed"] / sums["tokens"], INFLUENCE
        kept = prune(importance, blocks_left(step, sides))
    else:
        losses = sums[removal.LOSSES].clamp_max(LARGEST_LOSS)
        importance, whole = losses[0].exp(), float(sums[removal.WHOLE][0].exp())
        told = PERPLEXITY.format(tokens=int(sums["tokens"]), whole=whole)
        kept = prune(importance, blocks_left(step, sides))
        if step.iterative:
            gone = sums[removal.LOSSES].argmin(dim=-1).tolist()
            kept, told = tuple(n for n in range(len(importance)) if n not in gone), told + ANEW.format(gone)
    removed = [number for number in range(len(importance)) if number not in kept]
    model = cut(source, kept, out, notify, param=None, instead=INSTEAD)
    return model, {"importance": told, "blocks": importance.tolist(), "removed": removed}
