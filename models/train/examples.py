"""From a user's records to training examples: token ids, and which of them are learned.

Of a text everything is learned, of a prompt and its completion the completion, of a chat what the assistant says. A
tenth of the records, by their own hashes, is held out.
"""

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.data import grain_of
from models.documents import rows_of
from models.text import HELD_OUT_SHARE
from models.train.turns import pieces_of, tokens_of
from squeeze.documents import Wrong, refuse
from squeeze.errors import DataUnusable
from squeeze.records import (
    DATA,
    EVALUATION,
    Faults,
    Record,
    Text,
    blamed,
    records_in,
    refuse_nothing_held_out,
    refuse_too_few,
)
from squeeze.report import TrainingData


@dataclass(frozen=True)
class Examples:
    """ids: (N,) int32, all examples one behind the other. scored: (N,) bool, whether a token is learned; the first of
    an example never is. starts: (n + 1,) int64, where each begins.
    """

    ids: Tensor
    scored: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> list[int]:
        return [int(length) for length in self.starts.diff()]

    def one(self, number: int) -> tuple[Tensor, Tensor]:
        """(ids, scored) of an example, both (t,)."""
        part = slice(int(self.starts[number]), int(self.starts[number + 1]))
        return self.ids[part], self.scored[part]

    @property
    def digest(self) -> str:
        """SHA-256 of ids (int32 little-endian), of what is learned (a byte each) and of the starts (int64)."""
        whole = hashlib.sha256()
        for part, kind in ((self.ids, "<i4"), (self.scored, "u1"), (self.starts, "<i8")):
            whole.update(part.numpy().astype(kind).tobytes())
        return whole.hexdigest()


@dataclass(frozen=True)
class Split:
    """What is trained on, and what the loss is measured on. warnings: of what was cut or left out."""

    train: Examples
    held_out: Examples
    data: TrainingData
    warnings: list[str]


def check_records(source: Path, evaluation: Path | None, columns: tuple[str | None, str | None]) -> None:
    """Looks at every record of the files without a model; raises DataUnusable, naming the lines, where some are none,
    and where there are too few. evaluation: a text of its own to hold out. columns: of either, where not the usual.

    The service has looked at the beginning of what was uploaded; all of it, parquet and datasets are looked at here.
    """
    refuse_too_few(_counted(source, DATA, columns[0]), apart=evaluation is not None)
    if evaluation is not None:
        refuse_nothing_held_out(_counted(evaluation, EVALUATION, columns[1]))


def read_examples(
    tokenizer: Any,
    source: Path,
    evaluation: Path | None,
    length: int,
    *,
    origins: tuple[str, str],
    columns: tuple[str | None, str | None] = (None, None),
) -> Split:
    """The examples of at most `length` tokens each, in the files' order.

    evaluation: a text of its own to hold out; None: a tenth of the source. origins: what the report calls either.
    Longer texts are cut into several examples; prompts and chats lose what is past the end. Raises DataUnusable where a
    record is none, with its line, or where nothing is left to learn on either side.
    """
    train, held_out = _Side(tokenizer, length), _Side(tokenizer, length)
    for apart, where, record in divided(source, evaluation, columns):
        with blamed(DATA if evaluation is None or not apart else EVALUATION):
            (held_out if apart else train).add(record, where)
    for side, param in ((train, DATA), (held_out, DATA if evaluation is None else EVALUATION)):
        side.refuse_nothing(param)
    told = TrainingData(
        origin=origins[0],
        held_out_origin=origins[1],
        records=train.records,
        held_out_records=held_out.records,
        examples=len(train.starts) - 1,
        held_out_examples=len(held_out.starts) - 1,
        tokens=len(train.ids),
        learned_tokens=sum(train.scored),
        sha256=train.examples.digest,
        held_out_sha256=held_out.examples.digest,
    )
    return Split(train.examples, held_out.examples, told, _warnings(length, train, held_out))


def divided(
    source: Path, evaluation: Path | None, columns: tuple[str | None, str | None] = (None, None)
) -> Iterator[tuple[bool, str, Record]]:
    """(whether it is held out, where it stands, itself) of every record; what `evaluation` holds is held out instead
    of a part of the source, and comes last.
    """
    marks = [_mark(record) for _, record in _records(source, DATA, columns[0])]
    refuse_too_few(len(marks), apart=evaluation is not None)
    chosen = set() if evaluation is not None else _held_out(marks)
    for number, (where, record) in enumerate(_records(source, DATA, columns[0])):
        yield number in chosen, where, record
    if evaluation is not None:
        for where, record in _records(evaluation, EVALUATION, columns[1]):
            yield True, where, record


class _Side:
    """One side of the split while it is read."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        self._tokenizer, self._length = tokenizer, length
        self.ids, self.scored, self.starts = array("i"), bytearray(), [0]
        self.records = self.cut = self.unlearned = 0

    def add(self, record: Record, where: str) -> None:
        self.records += 1
        whole = isinstance(record, Text)
        tokens = tokens_of(self._tokenizer, record, where)
        self.cut += not whole and len(tokens[0]) > self._length
        learned = False
        for ids, scored in pieces_of(tokens, self._length, cut=whole):
            if any(scored[1:]):
                self.ids.extend(ids)
                self.scored.extend([False, *scored[1:]])
                self.starts.append(len(self.ids))
                learned = True
        self.unlearned += not learned

    @property
    def examples(self) -> Examples:
        return Examples(
            torch.frombuffer(self.ids, dtype=torch.int32).clone(),
            torch.frombuffer(self.scored, dtype=torch.uint8).bool(),
            torch.tensor(self.starts, dtype=torch.int64),
        )

    def refuse_nothing(self, param: str) -> None:
        if len(self.starts) > 1:
            return
        side = "training" if param == DATA else "evaluation"
        raise DataUnusable(
            f"nothing of the {side} data is left to learn: of all {self.records} records the part that would be "
            f"learned is empty or lies past {self._length} tokens. Take a longer data.sequence_length, or shorter "
            "prompts.",
            param=param,
        )


def _counted(source: Path, param: str, column: str | None) -> int:
    faults = Faults()
    count = sum(1 for _ in _records(source, param, column, faults))
    with blamed(param):
        faults.refuse_any()
    return count


def _records(source: Path, param: str, column: str | None, wrong: Wrong = refuse) -> Iterator[tuple[str, Record]]:
    """Every record with where it stands; running text in pieces, as everywhere."""
    with blamed(param):
        yield from records_in(rows_of(source, column, wrong), column, grain_of(source), wrong)


def _mark(record: Record) -> int:
    """Of its content alone: the same record is on the same side wherever it stands."""
    content = json.dumps([type(record).__name__, vars(record)], sort_keys=True)
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big")


def _held_out(marks: list[int]) -> set[int]:
    """Numbers of the records that are held out: about a tenth, at least one, never all."""
    chosen = {number for number, mark in enumerate(marks) if mark % HELD_OUT_SHARE == 0}
    least = min(range(len(marks)), key=lambda number: marks[number])
    if not chosen:
        return {least}
    return chosen - {least} if len(chosen) == len(marks) else chosen


def _warnings(length: int, train: _Side, held_out: _Side) -> list[str]:
    found = []
    if cut := train.cut + held_out.cut:
        found.append(f"{cut:,} prompts or chats are longer than {length} tokens and lost what lies past them")
    if unlearned := train.unlearned + held_out.unlearned:
        found.append(f"{unlearned:,} records have nothing to learn within {length} tokens and were left out")
    return found
