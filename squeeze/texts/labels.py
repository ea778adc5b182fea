"""Records with a label, which a classifier learns from: what they hold, or what is wrong with them; no torch."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from squeeze.errors import DataUnusable
from squeeze.texts.documents import Row, Wrong, refuse
from squeeze.texts.records import DATA, EVALUATION, Text, record_of

Label = str | int | bool
KINDS: dict[type, str] = {str: "a string", int: "a whole number", bool: "true or false"}
LONGEST_LABEL = 200  # characters; more is no label, but a text
MOST_NAMED = 5  # labels, in a message


@dataclass(frozen=True)
class Labelled:
    """Which label a text has is learned."""

    text: str
    label: Label


def labelled_in(
    rows: Iterable[Row], column: str | None, label: str, wrong: Wrong = refuse
) -> Iterator[tuple[str, Labelled]]:
    """Every record of a file's rows with where it stands.

    column: the field that holds the text; None: the usual one. label: the field that holds the label. wrong: is told
    of a row that is no such record. All labels of a file are of one kind. Raises DataUnusable where it is plain text.
    """
    first: tuple[str, type] | None = None
    for where, row in rows:
        if isinstance(row, str):
            raise DataUnusable(
                f"the file is plain text, which has no labels: give JSONL or parquet with `{column or 'text'}` and "
                f"`{label}`"
            )
        try:
            found = _labelled_of(row, column, label, where)
            if found is None:
                continue
            kind = type(found.label)
            first = first or (where, kind)
            if kind is not first[1]:
                raise DataUnusable(
                    f"{where}: `{label}` is {KINDS[kind]}, and {KINDS[first[1]]} in {first[0]}; let all be of one kind"
                )
        except DataUnusable as error:
            wrong(error)
            continue
        yield where, found


def name_of(label: Label) -> str:
    """What a label is called where only strings can stand: itself, or as JSON has it."""
    return label if isinstance(label, str) else json.dumps(label)


def names_in_order(labels: Iterable[Label]) -> list[str]:
    """The names of labels by their numbers, whatever order they come in: numbers by value, strings sorted.

    labels: of one kind, any number of times.
    """
    return [name_of(label) for label in sorted(set(labels))]


def refuse_one_label(names: Sequence[str]) -> None:
    """Raises where there is nothing to tell apart."""
    if len(names) == 1:
        raise DataUnusable(
            f"all records have the label `{names[0]}`: a classifier learns to tell at least 2 apart. Add records with "
            "another.",
            param=DATA,
        )


def refuse_unknown(found: Iterable[str], known: Iterable[str]) -> None:
    """Raises where the held-out text has a label that nothing to learn from has. found, known: names."""
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise DataUnusable(
            f"the evaluation text has labels that no record to learn from has: {listed(unknown)}", param=EVALUATION
        )


def doubts(train: Mapping[str, int], held_out: Mapping[str, int]) -> list[str]:
    """What of the numbers of records by label the report should warn of."""
    found = []
    if rare := [name for name, count in train.items() if count == 1]:
        found.append(f"seen once only, which is hardly enough to know them by: {listed(rare)}")
    if missing := [name for name in train if not held_out.get(name)]:
        found.append(
            f"not among the held-out records, so that nobody knows whether they were learned: {listed(missing)}"
        )
    return [f"labels {one}" for one in found]


def counted(names: Sequence[str], labels: Counter[str]) -> dict[str, int]:
    """Records of each label, in the order of their numbers."""
    return {name: labels[name] for name in names}


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(f"`{name}`" for name in names[:MOST_NAMED]) + more


def _labelled_of(row: object, column: str | None, label: str, where: str) -> Labelled | None:
    """None where text and label are null. Raises DataUnusable where one of them is missing, or no text or label."""
    fields = dict(row) if isinstance(row, Mapping) else {}
    value, text = fields.get(label), column or "text"
    if label not in fields or text not in fields:
        missing = label if label not in fields else text
        raise DataUnusable(f"{where} has no `{missing}`; a text and its label go together")
    record = record_of({text: fields[text]}, text, where)
    if record is None and value is None:
        return None
    if record is None or value is None:
        raise DataUnusable(f"{where}: `{label if value is None else text}` is null; a text and its label go together")
    if not isinstance(record, Text):
        raise DataUnusable(f"{where}: `{text}` is no text")
    if type(value) not in KINDS:
        raise DataUnusable(f"{where}: `{label}` is to be a string, a whole number or a bool")
    if isinstance(value, str) and not 0 < len(value.strip()) <= LONGEST_LABEL:
        said = (
            "is empty" if not value.strip() else f"has {len(value):,} characters; at most {LONGEST_LABEL} are a label"
        )
        raise DataUnusable(f"{where}: `{label}` {said}")
    return Labelled(record.text, value.encode(errors="replace").decode() if isinstance(value, str) else value)
