"""From a user's records to training examples: token ids, and which of them are learned.

Of a text everything is learned, of a prompt and its completion the completion, of a chat what the assistant says, of a
text with a label the label. A tenth of the records, by their own hashes, is held out.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.train.division import Known, Read, divided, looked_through
from models.train.turns import labelled_tokens, pieces_of, tokens_of
from squeeze.errors import DataUnusable
from squeeze.reports.training import TrainingData
from squeeze.texts.domains import Domained, counted_domains, refuse_few_domains, refuse_unknown_domains
from squeeze.texts.labels import Labelled, counted, doubts, listed, name_of, refuse_one_label, refuse_unknown
from squeeze.texts.records import DATA, EVALUATION, Text, blamed


@dataclass(frozen=True)
class Examples:
    """ids: (N,) int32, all examples one behind the other. scored: (N,) bool, whether a token is learned; the first of
    an example never is. starts: (n + 1,) int64, where each begins. domains: (n,) int64, the number of the domain that
    each is of; None where nobody asked.

    Of a text with a label the last id is no token, but the label's number, and it alone is scored: what a classifier
    says of the token before it.
    """

    ids: Tensor
    scored: Tensor
    starts: Tensor
    domains: Tensor | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> list[int]:
        return [int(length) for length in self.starts.diff()]

    def one(self, number: int) -> tuple[Tensor, Tensor]:
        """(ids, scored) of an example, both (t,)."""
        part = slice(int(self.starts[number]), int(self.starts[number + 1]))
        return self.ids[part], self.scored[part]

    def chosen(self, numbers: Sequence[int]) -> "Examples":
        """Some of them, in that order; at least one."""
        pairs = [self.one(number) for number in numbers]
        starts = torch.tensor([0, *(len(ids) for ids, _ in pairs)]).cumsum(0)
        domains = None if self.domains is None else self.domains[list(numbers)]
        return Examples(torch.cat([ids for ids, _ in pairs]), torch.cat([one for _, one in pairs]), starts, domains)

    @property
    def digest(self) -> str:
        """SHA-256 of ids (int32 little-endian), of what is learned (a byte each), of the starts and, where they are
        told apart, of the domains (int64 both).
        """
        whole = hashlib.sha256()
        parts = [(self.ids, "<i4"), (self.scored, "u1"), (self.starts, "<i8")]
        for part, kind in parts if self.domains is None else [*parts, (self.domains, "<i8")]:
            whole.update(part.numpy().astype(kind).tobytes())
        return whole.hexdigest()


@dataclass(frozen=True)
class Split:
    """What is trained on, and what the loss is measured on. warnings: of what was cut or left out."""

    train: Examples
    held_out: Examples
    data: TrainingData
    warnings: list[str]


def read_examples(
    tokenizer: Any,
    source: Path,
    evaluation: Path | None,
    length: int,
    *,
    origins: tuple[str, str],
    columns: tuple[str | None, str | None] = (None, None),
    label: str | None = None,
    domain: str | None = None,
) -> Split:
    """The examples of at most `length` tokens each, in the files' order.

    evaluation: a text of its own to hold out; None: a tenth of the source. origins: what the report calls either.
    label: the field that holds the label of a text, where that is learned. domain: the field that names the domain of a
    record, where domains are weighed; something of each is on either side then.
    Longer texts are cut into several examples; prompts, chats and texts with labels lose what is past the end. Raises
    DataUnusable where a record is none, with its line, or where nothing is left to learn on either side.
    """
    known = looked_through(source, DATA, columns[0], label, domain) if label or domain else Known()
    refuse_one_label(known.labels)
    if domain is not None:
        refuse_few_domains(known.domains, domain, apart=evaluation is not None)
    train, held_out = (_Side(tokenizer, length, known.labels, sorted(known.domains)) for _ in range(2))
    for apart, where, record in divided(source, evaluation, columns, label, domain):
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
        labels=None if label is None else counted(known.labels, train.labels),
        held_out_labels=None if label is None else counted(known.labels, held_out.labels),
        domains=None if domain is None else counted_domains(train.domains),
        held_out_domains=None if domain is None else counted_domains(held_out.domains),
    )
    return Split(train.examples, held_out.examples, told, _warnings(length, train, held_out))


class _Side:
    """One side of the split while it is read. labels, domains: their names, by their numbers."""

    def __init__(self, tokenizer: Any, length: int, labels: Sequence[str], domains: Sequence[str]) -> None:
        self._tokenizer, self._length = tokenizer, length
        self._labels = {name: number for number, name in enumerate(labels)}
        self._domains = {name: number for number, name in enumerate(domains)}
        self.labels: Counter[str] = Counter()
        self.domains: Counter[str] = Counter()
        self.of_domains = array("q")
        self.ids, self.scored, self.starts = array("i"), bytearray(), [0]
        self.records = self.cut = self.unlearned = 0

    def add(self, record: Read, where: str) -> None:
        self.records += 1
        domain: int | None = None
        if isinstance(record, Domained):
            refuse_unknown_domains([record.domain], self._domains)
            self.domains[record.domain] += 1
            domain, record = self._domains[record.domain], record.record
        whole = isinstance(record, Text)
        if isinstance(record, Labelled):
            name = name_of(record.label)
            refuse_unknown([name], self._labels)
            self.labels[name] += 1
            tokens, cut = labelled_tokens(self._tokenizer, record.text, self._labels[name], self._length)
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
                self.of_domains.extend([] if domain is None else [domain])
                learned = True
        self.unlearned += not learned

    @property
    def examples(self) -> Examples:
        return Examples(
            torch.frombuffer(self.ids, dtype=torch.int32).clone(),
            torch.frombuffer(self.scored, dtype=torch.uint8).bool(),
            torch.tensor(self.starts, dtype=torch.int64),
            torch.tensor(self.of_domains, dtype=torch.int64) if self._domains else None,
        )

    def refuse_nothing(self, param: str) -> None:
        side = "training" if param == DATA else "evaluation"
        known = set(self.of_domains)
        empty = [name for name, number in self._domains.items() if number not in known]
        if len(self.starts) > 1 and not empty:
            return
        what = f"the {side} data" if not empty else f"{listed(empty)} in the {side} data"
        records = f"{self.records} records" if not empty else "records"
        raise DataUnusable(
            f"nothing of {what} is left to learn: of all {records} the part that would be "
            f"learned is empty or lies past {self._length} tokens. Take a longer data.sequence_length, or shorter "
            "prompts.",
            param=param,
        )


def _warnings(length: int, train: _Side, held_out: _Side) -> list[str]:
    found = doubts(train.labels, held_out.labels)
    if cut := train.cut + held_out.cut:
        what, room = ("texts", length - 1) if train.labels else ("prompts or chats", length)
        found.append(f"{cut:,} {what} are longer than {room} tokens and lost what lies past them")
    if unlearned := train.unlearned + held_out.unlearned:
        found.append(f"{unlearned:,} records have nothing to learn within {length} tokens and were left out")
    return found
