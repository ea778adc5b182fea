"""Which of a user's records are learned from, and which are held out: a tenth, by the records' own hashes."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from models.texts.data import grain_of
from models.texts.documents import rows_of
from models.texts.generic import HELD_OUT_SHARE
from squeeze.errors import DataUnusable
from squeeze.texts.documents import Wrong, refuse
from squeeze.texts.domains import (
    Domained,
    domained_in,
    refuse_few_domains,
    refuse_many_domains,
    refuse_missing_domains,
    refuse_unknown_domains,
)
from squeeze.texts.labels import Labelled, labelled_in, name_of, names_in_order, refuse_one_label, refuse_unknown
from squeeze.texts.records import (
    DATA,
    EVALUATION,
    Faults,
    Record,
    blamed,
    records_in,
    refuse_nothing_held_out,
    refuse_too_few,
)

Read = Record | Labelled | Domained


@dataclass
class Known:
    """Of a file's records: how many there are, the names of their labels, by number, and how many each domain has."""

    records: int = 0
    labels: list[str] = field(default_factory=list)
    domains: Counter[str] = field(default_factory=Counter)


def check_records(
    source: Path,
    evaluation: Path | None,
    columns: tuple[str | None, str | None],
    label: str | None = None,
    domain: str | None = None,
) -> None:
    """Looks at every record of the files without a model; raises DataUnusable, naming the lines, where some are none,
    and where there are too few. evaluation: a text of its own to hold out. columns: of either, where not the usual.
    label, domain: the fields that hold the label, where labels are learned, or name the domain, where domains are
    weighed; these are looked at too.

    The service has looked at the beginning of what was uploaded; all of it, parquet and datasets are looked at here.
    """
    known = looked_through(source, DATA, columns[0], label, domain)
    refuse_too_few(known.records, apart=evaluation is not None)
    refuse_one_label(known.labels)
    if domain is not None:
        refuse_few_domains(known.domains, domain, apart=evaluation is not None)
    if evaluation is not None:
        found = looked_through(evaluation, EVALUATION, columns[1], label, domain)
        refuse_nothing_held_out(found.records)
        refuse_unknown(found.labels, known.labels)
        refuse_unknown_domains(found.domains, known.domains)
        refuse_missing_domains(found.domains, known.domains)


def looked_through(source: Path, param: str, column: str | None, label: str | None, domain: str | None) -> Known:
    """Raises DataUnusable where some are none."""
    faults, known, labels = Faults(), Known(), set()
    for _, record in _records(source, param, column, label, domain, faults):
        known.records += 1
        if isinstance(record, Labelled):
            labels.add(record.label)
        if isinstance(record, Domained):
            known.domains[record.domain] += 1
            if domain is not None:
                refuse_many_domains(known.domains, domain)
    with blamed(param):
        faults.refuse_any()
    known.labels = names_in_order(labels)
    return known


def divided(
    source: Path,
    evaluation: Path | None,
    columns: tuple[str | None, str | None] = (None, None),
    label: str | None = None,
    domain: str | None = None,
) -> Iterator[tuple[bool, str, Read]]:
    """(whether it is held out, where it stands, itself) of every record; what `evaluation` holds is held out instead
    of a part of the source, and comes last. label, domain: see `read_examples`.
    """
    marks, kinds = [], []
    for _, record in _records(source, DATA, columns[0], label, domain):
        marks.append(_mark(record))
        kinds.append(_kind(record))
    refuse_too_few(len(marks), apart=evaluation is not None)
    chosen: set[int] = set()
    if evaluation is None and label is not None:
        chosen = _held_out_beside_each_label(marks, kinds)
    elif evaluation is None:
        chosen = _held_out_of_each(marks, kinds)
    for number, (where, record) in enumerate(_records(source, DATA, columns[0], label, domain)):
        yield number in chosen, where, record
    if evaluation is not None:
        for where, record in _records(evaluation, EVALUATION, columns[1], label, domain):
            yield True, where, record


def _records(
    source: Path, param: str, column: str | None, label: str | None, domain: str | None, wrong: Wrong = refuse
) -> Iterator[tuple[str, Read]]:
    """Every record with where it stands; running text in pieces, as everywhere."""
    with blamed(param):
        rows = rows_of(source, column, wrong, label or domain)
        if label is not None:
            yield from labelled_in(rows, column, label, wrong)
        elif domain is not None:
            yield from domained_in(rows, column, domain, wrong)
        else:
            yield from records_in(rows, column, grain_of(source), wrong)


def _mark(record: Read) -> int:
    """Of its content alone: the same record is on the same side wherever it stands."""
    if isinstance(record, Domained):
        record = record.record
    content = json.dumps([type(record).__name__, vars(record)], sort_keys=True)
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big")


def _kind(record: Read) -> str:
    """What of each must be on either side of a split."""
    if isinstance(record, Labelled):
        return name_of(record.label)
    return record.domain if isinstance(record, Domained) else ""


def _held_out_of_each(marks: list[int], kinds: list[str]) -> set[int]:
    """Of each kind by itself, as `_held_out`."""
    members: dict[str, list[int]] = {}
    for number, kind in enumerate(kinds):
        members.setdefault(kind, []).append(number)
    return {own[n] for own in members.values() for n in _held_out([marks[number] for number in own])}


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
