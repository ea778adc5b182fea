"""From a user's records to training examples: token ids, and which of them are learned.

Of a text everything is learned, of a prompt and its completion the completion, of a chat what the assistant says, of a
text with a label the label. A tenth of the records, by their own hashes, is held out.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.data import grain_of
from models.documents import rows_of
from models.text import HELD_OUT_SHARE
from models.train.turns import labelled_tokens, pieces_of, tokens_of
from squeeze.documents import Wrong, refuse
from squeeze.errors import DataUnusable
from squeeze.labels import (
    Labelled,
    counted,
    doubts,
    labelled_in,
    name_of,
    names_in_order,
    refuse_one_label,
    refuse_unknown,
)
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
from squeeze.report_training import TrainingData


@dataclass(frozen=True)
class Examples:
    """ids: (N,) int32, all examples one behind the other. scored: (N,) bool, whether a token is learned; the first of
    an example never is. starts: (n + 1,) int64, where each begins.

    Of a text with a label the last id is no token, but the label's number, and it alone is scored: what a classifier
    says of the token before it.
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


def check_records(
    source: Path, evaluation: Path | None, columns: tuple[str | None, str | None], label: str | None = None
) -> None:
    """Looks at every record of the files without a model; raises DataUnusable, naming the lines, where some are none,
    and where there are too few. evaluation: a text of its own to hold out. columns: of either, where not the usual.
    label: the field that holds the label, where labels are learned; these are looked at too.

    The service has looked at the beginning of what was uploaded; all of it, parquet and datasets are looked at here.
    """
    count, known = _looked_through(source, DATA, columns[0], label)
    refuse_too_few(count, apart=evaluation is not None)
    refuse_one_label(known)
    if evaluation is not None:
        count, found = _looked_through(evaluation, EVALUATION, columns[1], label)
        refuse_nothing_held_out(count)
        refuse_unknown(found, known)


def read_examples(
    tokenizer: Any,
    source: Path,
    evaluation: Path | None,
    length: int,
    *,
    origins: tuple[str, str],
    columns: tuple[str | None, str | None] = (None, None),
    label: str | None = None,
) -> Split:
    """The examples of at most `length` tokens each, in the files' order.

    evaluation: a text of its own to hold out; None: a tenth of the source. origins: what the report calls either.
    label: the field that holds the label of a text, where that is learned.
    Longer texts are cut into several examples; prompts, chats and texts with labels lose what is past the end. Raises
    DataUnusable where a record is none, with its line, or where nothing is left to learn on either side.
    """
    names = [] if label is None else _looked_through(source, DATA, columns[0], label)[1]
    refuse_one_label(names)
    train, held_out = _Side(tokenizer, length, names), _Side(tokenizer, length, names)
    for apart, where, record in divided(source, evaluation, columns, label):
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
        labels=None if label is None else counted(names, train.labels),
        held_out_labels=None if label is None else counted(names, held_out.labels),
    )
    return Split(train.examples, held_out.examples, told, _warnings(length, train, held_out))


def divided(
    source: Path,
    evaluation: Path | None,
    columns: tuple[str | None, str | None] = (None, None),
    label: str | None = None,
) -> Iterator[tuple[bool, str, Record | Labelled]]:
    """(whether it is held out, where it stands, itself) of every record; what `evaluation` holds is held out instead
    of a part of the source, and comes last. label: see `read_examples`.
    """
    marks, labels = [], []
    for _, record in _records(source, DATA, columns[0], label):
        marks.append(_mark(record))
        labels.append(name_of(record.label) if isinstance(record, Labelled) else "")
    refuse_too_few(len(marks), apart=evaluation is not None)
    chosen: set[int] = set()
    if evaluation is None:
        chosen = _held_out(marks) if label is None else _held_out_beside_each_label(marks, labels)
    for number, (where, record) in enumerate(_records(source, DATA, columns[0], label)):
        yield number in chosen, where, record
    if evaluation is not None:
        for where, record in _records(evaluation, EVALUATION, columns[1], label):
            yield True, where, record


class _Side:
    """One side of the split while it is read. names: of the labels, by their numbers."""

    def __init__(self, tokenizer: Any, length: int, names: Sequence[str] = ()) -> None:
        self._tokenizer, self._length = tokenizer, length
        self._numbers = {name: number for number, name in enumerate(names)}
        self.labels: Counter[str] = Counter()
        self.ids, self.scored, self.starts = array("i"), bytearray(), [0]
        self.records = self.cut = self.unlearned = 0

    def add(self, record: Record | Labelled, where: str) -> None:
        self.records += 1
        whole = isinstance(record, Text)
        if isinstance(record, Labelled):
            name = name_of(record.label)
            refuse_unknown([name], self._numbers)
            self.labels[name] += 1
            tokens, cut = labelled_tokens(self._tokenizer, record.text, self._numbers[name], self._length)
        else:
            tokens = tokens_of(self._tokenizer, record, where)
            cut = not whole and len(tokens[0]) > self._length
        self.cut += cut
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


def _looked_through(source: Path, param: str, column: str | None, label: str | None) -> tuple[int, list[str]]:
    """(records, names of the labels that they have); raises DataUnusable where some are none."""
    faults, count, labels = Faults(), 0, set()
    for _, record in _records(source, param, column, label, faults):
        count += 1
        if isinstance(record, Labelled):
            labels.add(record.label)
    with blamed(param):
        faults.refuse_any()
    return count, names_in_order(labels)


def _records(
    source: Path, param: str, column: str | None, label: str | None, wrong: Wrong = refuse
) -> Iterator[tuple[str, Record | Labelled]]:
    """Every record with where it stands; running text in pieces, as everywhere."""
    with blamed(param):
        rows = rows_of(source, column, wrong, label)
        if label is None:
            yield from records_in(rows, column, grain_of(source), wrong)
        else:
            yield from labelled_in(rows, column, label, wrong)


def _mark(record: Record | Labelled) -> int:
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


def _held_out_beside_each_label(marks: list[int], labels: list[str]) -> set[int]:
    """As `_held_out`; of each label one record at least stays to be learned. Raises where that leaves nothing."""
    kept: dict[str, int] = {}
    for mark, label in zip(marks, labels, strict=True):
        kept[label] = max(mark, kept.get(label, 0))
    free = [number for number, mark in enumerate(marks) if mark != kept[labels[number]]]
    if not free:
        raise DataUnusable(
            "every label is seen once only, so that none is left to hold out: add records, or name a text of its own "
            "as evaluation.source",
            param=DATA,
        )
    chosen = {number for number in free if marks[number] % HELD_OUT_SHARE == 0}
    return chosen or {min(free, key=lambda number: marks[number])}


def _warnings(length: int, train: _Side, held_out: _Side) -> list[str]:
    found = doubts(train.labels, held_out.labels)
    if cut := train.cut + held_out.cut:
        what, room = ("texts", length - 1) if train.labels else ("prompts or chats", length)
        found.append(f"{cut:,} {what} are longer than {room} tokens and lost what lies past them")
    if unlearned := train.unlearned + held_out.unlearned:
        found.append(f"{unlearned:,} records have nothing to learn within {length} tokens and were left out")
    return found
