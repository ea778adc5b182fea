"""How quickly two models run on this machine: measured in turn, one block of each in memory at a time."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from models.resources import return_free_memory
from models.streaming.calls import run
from models.streaming.frame import Call, Frame
from squeeze.reports.report import Speed

PROMPT_TOKENS = 128
LEAST_ROUNDS, PART_SECONDS = 5, 0.1  # of a part: as many rounds as take so long
PARTS = ("prompt", "writing")


@dataclass(frozen=True)
class Seconds:
    """Of one model and part. around: what lies around the blocks, with the head of one token. blocks: of those that
    were timed, in their order.
    """

    around: float
    blocks: list[float]

    @property
    def whole(self) -> float:
        return self.around + sum(self.blocks)


def speeds(frames: Sequence[Frame], prompt: Tensor) -> list[Speed]:
    """Of each model. prompt: (T,) int64, whose first PROMPT_TOKENS are read."""
    seconds = timed(frames, prompt)
    tokens = min(len(prompt), PROMPT_TOKENS)
    return [
        Speed(prompt_tokens=tokens, prompt=tokens / reading.whole, writing=1 / writing.whole)
        for reading, writing in zip(seconds["prompt"], seconds["writing"], strict=True)
    ]


@torch.no_grad()
def timed(
    frames: Sequence[Frame], prompt: Tensor, blocks: Sequence[int] | None = None, parts: Sequence[str] = PARTS
) -> dict[str, list[Seconds]]:
    """Of each part, for each model. prompt: as of `speeds`. blocks: that are timed; None: all.

    Each block is timed, and what lies around the blocks with the head of one token; loading is not. Models take turns,
    so that what else the machine does meets all of them; a time is that of the quickest round.
    """
    prompt = prompt[:PROMPT_TOKENS]
    ids = {"prompt": prompt[None], "writing": prompt[None, :1]}
    found: dict[str, list[Seconds]] = {}
    states: dict[str, list[Tensor]] = {}
    calls: dict[str, list[list[Call]]] = {}
    with ExitStack() as loaded:
        for frame in frames:
            loaded.enter_context(frame.surroundings())
        for part in parts:
            entered = [frame.enter(ids[part]) for frame in frames]
            states[part], calls[part] = [one[0] for one in entered], [one[1] for one in entered]
        ends = [_ending(frame, hidden, ids["writing"]) for frame, hidden in zip(frames, states[parts[0]], strict=True)]
        around = _timed(frames, ends)
        for part in parts:
            found[part] = [Seconds(one, []) for one in around]
    for index in range(max(frame.count for frame in frames)) if blocks is None else blocks:
        with ExitStack() as loaded:
            those = [n for n, frame in enumerate(frames) if index < frame.count]
            at = {n: loaded.enter_context(frames[n].block(index)) for n in those}
            for part in parts:
                held = states[part]
                works = [_running(at[n], held, n, calls[part][n][index]) for n in those]
                for n, taken in zip(those, _timed([frames[n] for n in those], works), strict=True):
                    found[part][n].blocks.append(taken)
                for n in those:
                    hidden, (args, kwargs) = held[n].clone(), calls[part][n][index]
                    held[n] = run(at[n], (hidden, args, kwargs))
        at.clear()
        works.clear()
        return_free_memory()  # a few megabytes a block would stay otherwise, of every block
    return found


def _ending(frame: Frame, hidden: Tensor, ids: Tensor) -> Callable[[], object]:
    return lambda: frame.leave(hidden[:, -1:], ids)


def _running(block: torch.nn.Module, held: list[Tensor], n: int, call: Call) -> Callable[[], object]:
    return lambda: run(block, (held[n], *call))


def _timed(frames: Sequence[Frame], works: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds of each, taking turns; the very first turn is not counted."""
    taken: list[list[float]] = [[] for _ in works]
    begun = time.monotonic()
    for number in count():
        for n, work in enumerate(works):
            start = time.perf_counter()
            work()
            if frames[n].device.type == "cuda":
                torch.cuda.synchronize(frames[n].device)
            if number:
                taken[n].append(time.perf_counter() - start)
        if number >= LEAST_ROUNDS and time.monotonic() - begun > PART_SECONDS:
            break
    return [min(one) for one in taken]
