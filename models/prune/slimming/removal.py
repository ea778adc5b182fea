"""What a text loses when a decoder block is left out, for every block of a model, each loaded once.

The text travels once for each block without it. Where a block comes that could be left out, the text that came so far
is set aside as the one that goes around it; from there on both travel. So B blocks take B · (B + 1) / 2 passes of a
block instead of B², and no block is loaded twice.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from models.measuring.evaluation import LOGIT_BYTES
from models.prune.slimming.looking import WINDOWS, Looked, Looking
from models.resources import available_host_bytes, return_free_memory
from models.streaming.calls import Calls
from models.streaming.frame import Frame
from models.streaming.snapshots import SNAPSHOT_SHARE
from models.streaming.streams import Room, Stream
from models.streaming.walk import Kept
from squeeze.costs.slimming_work import judged_sequences
from squeeze.errors import NotFinite

WHOLE, LOSSES = "whole", "losses"


def looked(looking: Looking, enough: Callable[[Sequence[int]], bool]) -> Looked:
    """Judges the blocks, and those that are left again without the one that is missed least, until enough are gone.

    sums, float64: losses (rounds, blocks), nats a token, infinite of blocks that are gone; whole (rounds,), with all
    that were left. Source: arXiv 2402.02834 §3.1 (one round), 2402.09025 §3 (one for each block that goes). Differs:
    judged on the first sequences of the calibration text, as many as `judged_sequences` says.
    """
    gone: list[int] = []
    tables, wholes = [], []
    some = looking.ids[: judged_sequences(*looking.ids.shape)]
    original: Stream | None = None
    while not gone or not enough(gone):
        left = [number for number in range(looking.frame.count) if number not in gone]
        directory = looking.directory / f"round-{len(gone):04d}"
        windows = None if gone else looking.windows
        if gone:
            looking.notify.event("info", f"judging anew without blocks {', '.join(map(str, sorted(gone)))}")
        found = losses_without(replace(looking, ids=some, windows=windows, directory=directory), left)
        original = original or found.original
        tables.append(found.sums[LOSSES])
        wholes.append(found.sums[WHOLE])
        gone.append(int(found.sums[LOSSES].argmin()))
    return Looked({LOSSES: torch.stack(tables), WHOLE: torch.stack(wholes)}, original)


@torch.no_grad()
def losses_without(looking: Looking, blocks: Sequence[int]) -> Looked:
    """Of a model of some of the blocks, the loss without each of these. Source, units: see `looked`."""
    frame, notify = looking.frame, looking.notify
    kept = Kept(looking.directory, looking.mark)
    limit = available_host_bytes() // 2 if looking.memory_bytes is None else looking.memory_bytes
    room = Room(limit, looking.directory / "activations")
    texts = {WHOLE: looking.ids} | ({} if looking.windows is None else {WINDOWS: looking.windows})
    ended = len(blocks) + 1  # one more than the blocks: when the losses are counted, too
    done = kept.last()
    if done == ended:
        streams = kept.streams(done, room, texts.keys() - {WHOLE})
        return Looked(kept.sums(done, LOSSES), streams.get(WINDOWS))
    calls = Calls(frame, list(texts.values()))
    if done is None:
        done, streams = 0, {name: Stream(room, calls.enter(ids)) for name, ids in texts.items()}
    else:
        streams = kept.streams(done, room, [*texts, *(_without(number) for number in blocks[:done])])
        notify.event("info", f"going on after block {done} of {len(blocks)}, which an earlier attempt finished")
    saved_at, cost = time.monotonic(), 0.0
    passes, whole = _passes(done, len(texts)), _passes(len(blocks), len(texts))
    for place in range(done, len(blocks)):
        aside = Stream(room, (batch.clone() for batch in streams[WHOLE]))
        with frame.block(blocks[place]) as block:
            for stream in streams.values():
                calls.forward(blocks[place], block, stream)
                passes += 1
                notify.advance(passes, whole, "passes of a block")
        streams[_without(blocks[place])] = aside
        return_free_memory()
        now = time.monotonic()
        if place + 1 == len(blocks) or now - saved_at >= min(looking.snapshot_seconds, cost / SNAPSHOT_SHARE):
            kept.save(place + 1, streams, {})
            saved_at, cost = time.monotonic(), time.monotonic() - now
    sums = _losses(frame, looking.ids, streams, blocks)
    for name, stream in streams.items():
        if name != WINDOWS:
            stream.clear()
    kept.save(ended, {name: stream for name, stream in streams.items() if name == WINDOWS}, {LOSSES: sums})
    return Looked(sums, streams.get(WINDOWS))


def _passes(blocks: int, texts: int) -> int:
    """Of the first so many blocks: each by the texts, and by those that went around one before it."""
    return blocks * texts + blocks * (blocks - 1) // 2


def _losses(frame: Frame, ids: Tensor, streams: dict[str, Stream], blocks: Sequence[int]) -> dict[str, Tensor]:
    with frame.surroundings():
        whole = _loss(frame, ids, streams[WHOLE])
        if not whole.isfinite():
            raise NotFinite(
                f"the logits are NaN or infinite in {frame.dtype}: the model is damaged, or too large for it"
            )
        losses = torch.full((frame.count,), torch.inf, dtype=torch.float64)
        for number in blocks:
            # Without some blocks a model's numbers may grow too large for their type; those stay.
            losses[number] = _loss(frame, ids, streams[_without(number)]).nan_to_num(nan=torch.inf)
    return {LOSSES: losses, WHOLE: whole}


def _loss(frame: Frame, ids: Tensor, stream: Stream) -> Tensor:
    """Mean negative log-likelihood of all tokens but each sequence's first, nats, float64. ids: (n, T)."""
    rows = max(16, LOGIT_BYTES // (4 * int(frame.model.config.vocab_size)))
    total, length = torch.zeros((), dtype=torch.float64), ids.shape[1]
    hidden = (one for batch in stream for one in batch)  # (T, C) each
    for one, own in zip(hidden, ids, strict=True):
        for start in range(0, length - 1, rows):
            part = slice(start, min(start + rows, length - 1))
            logits = frame.leave(one[None, part], own[None, part])[0].float()
            targets = own[part.start + 1 : part.stop + 1].to(frame.device)
            total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").cpu()
    return total / (ids.shape[0] * (length - 1))


def _without(number: int) -> str:
    return f"without-{number:05d}"
