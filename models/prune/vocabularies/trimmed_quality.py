"""What a model says once tokens are left out: the same of those that stay, and of text that is told in other tokens."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from models.job import Inputs
from models.measuring.evaluation import LOGIT_BYTES
from models.progress import Notify
from models.prune.vocabularies.keeping import Kept
from models.streaming.frame import Frame
from models.streaming.streams import Stream
from models.streaming.walk import walk
from models.texts.data import Windows
from squeeze.errors import NotFinite
from squeeze.reports.parts import Quality

WINDOWS, PASSAGES = "windows", "passages"
LN2 = math.log(2)
SUMS = ("nll_before", "nll_after", "divergence", "agreements", "left_out")


@dataclass(frozen=True)
class Compared:
    """nll_before, nll_after: mean over the scored tokens, nats. nll_windows: of the result, window by window.
    largest_difference: of two logits of one token. left_out: mean probability of what is left out.
    """

    quality: Quality
    nll_before: float
    nll_after: float
    nll_windows: list[float]
    largest_difference: float
    left_out: float


@dataclass(frozen=True)
class Padded:
    """Texts as sequences of one length, filled up behind, which nothing before sees. ids: (n, T) int64. lengths: of
    each, in tokens; its first is not scored.
    """

    ids: Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Judged:
    """windows: in new numbers. bits: that a byte of them costs either model. passages: the same of the evaluation
    text, with the number of its bytes; None where there is none.
    """

    compared: Compared
    windows: Windows
    bits: tuple[float, float]
    passages: tuple[tuple[float, float], int] | None


def judged(
    inputs: Inputs,
    frames: tuple[Frame, Frame],
    tokenizers: tuple[Any, Any],
    windows: Windows,
    kept: Kept,
    passages: Sequence[str],
    mark: str,
    notify: Notify,
) -> Judged:
    """Sends windows and passages through both models, block by block. windows: of tokens that all stay, old numbers."""
    renumber = kept.renumber(int(frames[0].model.config.vocab_size))
    new = replace(windows, ids=renumber[windows.ids])
    texts, size_bytes = in_both(passages, tokenizers, windows.ids.shape[1])
    streams = []
    for frame, ids, padded, name in zip(frames, (windows.ids, new.ids), texts, ("looked", "measured"), strict=True):
        sent = {WINDOWS: ids} | ({PASSAGES: padded.ids} if size_bytes else {})
        directory, seconds, limit = inputs.work / name, inputs.snapshot_seconds, inputs.activation_bytes
        streams.append(walk(frame, sent, directory, mark, notify, seconds, watchers={}, memory_bytes=limit))
    first, second = streams
    found = compared(frames, windows, renumber, kept.rising, (first[WINDOWS], second[WINDOWS]), notify)
    scored = sum(
        len(tokenizers[0].decode(ids[start:], skip_special_tokens=True).encode())
        for start, ids in zip(windows.first_scored, windows.ids.tolist(), strict=True)
    )
    told = None
    if size_bytes:
        costs = [nats(frame, each, held[PASSAGES]) for frame, each, held in zip(frames, texts, streams, strict=True)]
        told = (costs[0] / LN2 / size_bytes, costs[1] / LN2 / size_bytes), size_bytes
    for stream in (*first.values(), *second.values()):
        stream.clear()
    bits = windows.scored_tokens / LN2 / max(1, scored)
    return Judged(found, new, (found.nll_before * bits, found.nll_after * bits), told)


@torch.no_grad()
def compared(
    frames: tuple[Frame, Frame],
    windows: Windows,
    renumber: Tensor,
    kept: Tensor,
    streams: tuple[Stream, Stream],
    notify: Notify,
) -> Compared:
    """Both models on the same tokens. Perplexity is each model's own; the divergence is KL(original ‖ result) with the
    original's probabilities shared out over the tokens that stay, which is all that the result can say.

    frames: of the original and the result. windows: in old numbers. renumber: new numbers of old ones, (numbers,).
    kept: old numbers, in order, (rows,). streams: last hidden states of either, (B, T, C).
    """
    before, after = frames
    kept = kept.to(before.device)
    rows = max(16, LOGIT_BYTES // (4 * int(before.model.config.vocab_size)))
    sums, largest, nll_windows = torch.zeros(len(SUMS), dtype=torch.float64), 0.0, []
    pairs = (pair for batches in zip(*streams, strict=True) for pair in zip(*batches, strict=True))
    with before.surroundings(), after.surroundings():
        for n, (first, (old, new)) in enumerate(zip(windows.first_scored, pairs, strict=True)):
            ids = windows.ids[n]
            own = torch.zeros(len(SUMS), dtype=torch.float64)
            for start in range(first - 1, len(ids) - 1, rows):
                part = slice(start, min(start + rows, len(ids) - 1))
                said = before.leave(old[None, part], ids[None, part])[0].float()
                says = after.leave(new[None, part], renumber[ids[None, part]])[0].float()
                largest = max(largest, float((said[:, kept] - says).abs().max()))
                targets = ids[part.start + 1 : part.stop + 1]
                own += _sums(said, says, kept, targets.to(said.device), renumber[targets].to(said.device))
            nll_windows.append(float(own[1]) / (len(ids) - first))
            sums += own
            notify.advance(n + 1, len(windows.first_scored), "windows")
    if not torch.isfinite(sums).all():
        raise NotFinite(f"the logits are NaN or infinite in {before.dtype}: the final norm or the head is damaged")
    means = dict(zip(SUMS, (sums / windows.scored_tokens).tolist(), strict=True))
    quality = Quality(
        text=windows.text,
        stride=windows.stride,
        protocol=f"windows of {windows.ids.shape[1]} tokens every {windows.stride}, of which both models get the same; "
        f"a window's very first token is never scored; perplexities over each model's own tokens, divergence over "
        f"those that stayed; {before.dtype} on {before.device.type}".replace("torch.", ""),
        scored_tokens=windows.scored_tokens,
        perplexity_before=math.exp(min(means["nll_before"], 700.0)),
        perplexity_after=math.exp(min(means["nll_after"], 700.0)),
        divergence_nats=max(means["divergence"], 0.0),
        top1_agreement=means["agreements"],
    )
    return Compared(quality, means["nll_before"], means["nll_after"], nll_windows, largest, means["left_out"])


@torch.no_grad()
def nats(frame: Frame, texts: Padded, stream: Stream) -> float:
    """What all scored tokens of texts cost a model together. stream: their last hidden states (B, T, C)."""
    rows, total = max(16, LOGIT_BYTES // (4 * int(frame.model.config.vocab_size))), 0.0
    with frame.surroundings():
        for hidden, ids, length in zip(_each(stream), texts.ids, texts.lengths, strict=True):
            for start in range(0, length - 1, rows):
                part = slice(start, min(start + rows, length - 1))
                logits = frame.leave(hidden[None, part], ids[None, part])[0].float()
                targets = ids[part.start + 1 : part.stop + 1].to(logits.device)
                total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    return total


def in_both(texts: Sequence[str], tokenizers: Sequence[Any], length: int) -> tuple[list[Padded], int]:
    """(texts by each of two tokenizers, bytes that are scored of each): a text that has more than `length` tokens by
    either ends where both have it. Behind the token that begins a text, or else the one that ends it.
    """
    sequences: list[list[list[int]]] = [[] for _ in tokenizers]
    size_bytes = 0
    for text in texts:
        part, starts = text, [_start(one) for one in tokenizers]
        encoded = [_ids(one, part) for one in tokenizers]
        while (most := max(map(len, encoded))) >= length:
            part = part[: len(part) * (length - 1) // (most + 1)]
            encoded = [_ids(one, part) for one in tokenizers]
        if not part or None in starts:
            continue
        size_bytes += len(part.encode())
        for place, (start, ids) in enumerate(zip(starts, encoded, strict=True)):
            sequences[place].append([int(start or 0), *ids])
    return [_padded(each) for each in sequences], size_bytes


def _sums(said: Tensor, says: Tensor, kept: Tensor, targets: Tensor, renumbered: Tensor) -> Tensor:
    """SUMS over positions. said: logits (t, V). says: (t, rows). targets, renumbered: (t,)."""
    p, q = torch.log_softmax(said, dim=-1), torch.log_softmax(says, dim=-1)
    shared = torch.log_softmax(said[:, kept], dim=-1)
    return torch.stack(
        [
            -p.gather(-1, targets[:, None]).sum(dtype=torch.float64),
            -q.gather(-1, renumbered[:, None]).sum(dtype=torch.float64),
            (shared.exp() * (shared - q)).sum(dtype=torch.float64),
            (p.argmax(dim=-1) == kept[q.argmax(dim=-1)]).sum().double(),
            (1 - p[:, kept].exp().sum(dim=-1, dtype=torch.float64)).clamp_min(0).sum(),
        ]
    ).cpu()


def _each(stream: Stream) -> Iterator[Tensor]:
    for batch in stream:
        yield from batch


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _start(tokenizer: Any) -> int | None:
    begins: int | None = tokenizer.bos_token_id
    ends: int | None = tokenizer.eos_token_id
    return ends if begins is None else begins


def _padded(sequences: Sequence[list[int]]) -> Padded:
    longest = max(map(len, sequences), default=0)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    for row, each in enumerate(sequences):
        ids[row, : len(each)] = torch.tensor(each)
    return Padded(ids, tuple(map(len, sequences)))
