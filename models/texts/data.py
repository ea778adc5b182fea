"""From text to token batches: calibration sequences and evaluation windows."""

import hashlib
import heapq
import platform
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.texts.documents import documents_of
from models.texts.generic import HELD_OUT_SHARE, Split, standard_library
from squeeze.errors import DataUnusable
from squeeze.reports.parts import Text
from squeeze.texts.documents import grain_for, passages

LEAST_TOKENS = 16  # a sequence shorter than this tells nothing
CHARACTERS_PER_TOKEN = 6  # first guess of how much text is wanted; raised where a tokenizer packs more
GENERIC_ORIGIN = f"standard library of Python {platform.python_version()}"
EVALUATION_SEED = 0  # the evaluation text does not move with the calibration draw

Documents = Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Windows:
    """ids: (n, T) int64. first_scored: of each window, the first position whose token is scored; 0 never is."""

    ids: Tensor
    first_scored: tuple[int, ...]
    stride: int
    text: Text

    @property
    def scored_tokens(self) -> int:
        return sum(self.ids.shape[1] - first for first in self.first_scored)


@dataclass(frozen=True)
class Calibration:
    """ids: (n, T) int64."""

    ids: Tensor
    text: Text


def calibration_batches(
    tokenizer: Any,
    source: Path | None,
    origin: str | None,
    samples: int,
    length: int,
    seed: int,
    column: str | None = None,
) -> Calibration:
    """`samples` sequences of `length` tokens, drawn by `seed` from a file's training part or the generic text.

    source: a file, or a directory of them; None: the generic text. origin: what the report calls it. column: the field
    of a record that holds the text, where it isn't one of the usual. Gives fewer or shorter sequences where the text
    doesn't have more; raises DataUnusable where it has next to nothing.
    """
    documents = _documents(source, "train", "data.source", column)
    stream = _token_stream(tokenizer, documents, samples * length, length, seed)
    length = min(length, len(stream))
    if length < LEAST_TOKENS:
        raise DataUnusable(
            f"the calibration text has {len(stream)} tokens; at least {LEAST_TOKENS} are needed, some "
            f"{samples * 512:,} do well. Give a longer file.",
            param="data.source",
        )
    count = min(samples, len(stream) // length)
    ids = stream[: count * length].view(count, length)
    return Calibration(ids, text_of(ids, origin or _name(source), generic=source is None))


def evaluation_windows(
    tokenizer: Any,
    source: Path | None,
    origin: str | None,
    held_out: bool,
    samples: int,
    length: int,
    stride: int | None,
    column: str | None = None,
) -> Windows:
    """`samples` windows of `length` tokens, each `stride` after the one before; its last `stride` tokens are scored.

    held_out: take the part of the file that calibration never sees; False: the whole file, given for evaluation alone.
    """
    stride = min(stride or length, length)
    wanted = (samples - 1) * stride + length
    documents = (
        _documents(source, "held_out", "data.source", column)
        if held_out
        else _documents(source, None, "evaluation.source", column)
    )
    stream = _token_stream(tokenizer, documents, wanted, length, EVALUATION_SEED)
    if len(stream) < LEAST_TOKENS:
        what = "the part of the text that is held out for evaluation, a tenth," if held_out else "the evaluation text"
        raise DataUnusable(
            f"{what} has {len(stream)} tokens; at least {LEAST_TOKENS} are needed. Give a longer file, "
            "name another one as evaluation.source, or switch evaluation off.",
            param="evaluation.source",
        )
    length = min(length, len(stream))
    stride = min(stride, length)
    count = min(samples, (len(stream) - length) // stride + 1)
    ids = torch.stack([stream[n * stride : n * stride + length] for n in range(count)])
    first_scored = tuple(1 if n == 0 else max(1, length - stride) for n in range(count))
    return Windows(ids, first_scored, stride, text_of(ids, origin or _name(source), generic=source is None))


def evaluation_passages(source: Path, column: str | None, count: int, length: int) -> list[str]:
    """`count` passages of an evaluation text, if it has so many, each about a sequence of `length` tokens."""
    limit = max(1024, length * 4)
    drawn, _ = _draw(_documents(source, None, "evaluation.source", column), count * limit, limit, EVALUATION_SEED)
    return drawn[:count]


def generic_passages(split: Split, characters: int, length: int, seed: int) -> list[str]:
    """Passages of the generic text, some `characters` together if it has so many, each about a sequence of `length`
    tokens, in an order drawn by `seed`.
    """
    return _draw(_documents(None, split, "data.source", None), characters, max(1024, length * 4), seed)[0]


def digest(ids: Tensor) -> str:
    """SHA-256 of token ids, int64 little-endian."""
    return hashlib.sha256(ids.to(torch.int64).contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def text_of(ids: Tensor, origin: str, *, generic: bool) -> Text:
    """What the report says of token ids (n, T)."""
    return Text(
        origin=origin,
        generic=generic,
        sequences=ids.shape[0],
        sequence_length=ids.shape[1],
        tokens=ids.numel(),
        sha256=digest(ids),
    )


def _name(source: Path | None) -> str:
    return GENERIC_ORIGIN if source is None else source.name


def _token_stream(tokenizer: Any, documents: Documents, wanted: int, length: int, seed: int) -> Tensor:
    """At least `wanted` tokens, if the documents have them, of passages in an order drawn by `seed`: (N,) int64.

    A passage is about one sequence of `length` tokens, so that the sequences come from as many places as there are.
    """
    separator = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    budget = wanted * CHARACTERS_PER_TOKEN
    while True:
        passages, more = _draw(documents, budget, max(1024, length * 4), seed)
        ids: list[int] = []
        for passage in passages:
            if separator is not None:
                ids.append(separator)
            ids.extend(tokenizer(passage, add_special_tokens=False, verbose=False)["input_ids"])
            if len(ids) >= wanted:
                return torch.tensor(ids, dtype=torch.int64)
        if not more:
            return torch.tensor(ids, dtype=torch.int64)
        budget *= 4


def _draw(documents: Documents, budget: int, limit: int, seed: int) -> tuple[list[str], bool]:
    """Passages of up to `limit` characters, some `budget` characters in all, in random order; whether more were left.

    Each passage gets a random priority; those with the least are kept. Memory stays near the budget, whatever the
    size of the source.
    """
    dice = random.Random(seed)
    heap: list[tuple[float, int, str]] = []  # the largest priority on top, hence negated
    characters, dropped = 0, False
    for number, passage in enumerate(passages(documents(), limit)):
        heapq.heappush(heap, (-dice.random(), number, passage))
        characters += len(passage)
        while characters - len(heap[0][2]) >= budget:
            characters -= len(heapq.heappop(heap)[2])
            dropped = True
    return [passage for _, _, passage in sorted(heap, reverse=True)], dropped


def _documents(source: Path | None, split: Split | None, param: str, column: str | None) -> Documents:
    """param: the field of the request that names the source."""
    if source is None:
        return lambda: (text for _, text in standard_library(split or "held_out"))
    if split is None:
        return lambda: documents_of(source, param, column)
    grain = grain_of(source)
    return lambda: (
        passage for passage in passages(documents_of(source, param, column), grain) if _split_of(passage) == split
    )


def grain_of(source: Path) -> int:
    """Characters of the pieces that a file's running text is split by."""
    return grain_for(bytes_of(source))


def bytes_of(source: Path) -> int:
    """Of a file, or of a directory's files."""
    return sum(file.stat().st_size for file in (source.iterdir() if source.is_dir() else (source,)))


def _split_of(passage: str) -> Split:
    """A passage's side of the split, by its own hash, so that calibration and evaluation agree without a list."""
    first = hashlib.sha256(passage.encode()).digest()
    return "held_out" if int.from_bytes(first[:4], "big") % HELD_OUT_SHARE == 0 else "train"
