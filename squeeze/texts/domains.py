"""Records that name their domain, and steps that weigh domains; what is wrong with either."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from squeeze.errors import DataUnusable
from squeeze.steps.compressing import Compress
from squeeze.steps.distillation import Distill
from squeeze.steps.slimming import Slim, Vocabulary
from squeeze.steps.sparsifying import Zeroes
from squeeze.steps.training import Train
from squeeze.texts.documents import Row, Wrong, refuse
from squeeze.texts.labels import KINDS, LONGEST_LABEL, listed, name_of
from squeeze.texts.records import DATA, EVALUATION, Record, record_of

MOST_DOMAINS = 64  # of which a look measures each by itself
LEAST_RECORDS = 2  # of a domain: one to learn, one to hold out


@dataclass(frozen=True)
class Domained:
    """A record, and the name of the domain that it is of."""

    record: Record
    domain: str


def takes_something(step: object) -> bool:
    """Whether what a step makes is to be as good as what it began with, and is less."""
    return isinstance(step, Compress | Zeroes | Distill) or (isinstance(step, Slim) and not step.equivalent)


def refuse_unweighable(steps: Sequence[object], *, named: bool) -> None:
    """Raises ValueError where a step is to weigh domains that can't be weighed. named: the data names a file or a
    dataset.
    """
    training = [(number, step) for number, step in enumerate(steps) if isinstance(step, Train)]
    columns = {step.domain_column for _, step in training}
    if columns == {None} or not training:
        return
    if len(columns) > 1:
        raise ValueError(
            "the steps that train divide one text into what is learned and what is held out, and with domains it is "
            "divided otherwise: let all of them name the same domain_column"
        )
    for number, step in training:
        taken = next((first for first, one in enumerate(steps[:number]) if takes_something(one)), None)
        if taken is None and not isinstance(step, Distill):
            raise ValueError(
                f"steps.{number}.domain_column: domains are weighed by what was lost in each, and nothing was taken "
                "from the model that could be missed: let a step before prune it, or leave domain_column out"
            )
        if taken is not None and any(isinstance(one, Vocabulary) for one in steps[taken:number]):
            raise ValueError(
                f"steps.{number}.domain_column: the model that was pruned has other tokens, so that losses can't be "
                "compared: let vocabulary be the first step"
            )
    if not named:
        raise ValueError(
            "domain_column names a field of records, but data.source names no file or dataset that would have some"
        )


def domained_in(
    rows: Iterable[Row], column: str | None, domain: str, wrong: Wrong = refuse
) -> Iterator[tuple[str, Domained]]:
    """Every record of a file's rows with where it stands.

    column: the field that holds the text; None: the usual ones. domain: the field that names the domain: a string, a
    whole number or a bool. wrong: is told of a row that is no such record. Raises DataUnusable where it is plain text.
    """
    for where, row in rows:
        if isinstance(row, str):
            raise DataUnusable(
                f"the file is plain text, which names no domains: give JSONL or parquet with `{domain}` beside the text"
            )
        try:
            record = record_of(row, column, where)
            found = None if record is None else Domained(record, _domain_of(row, domain, where))
        except DataUnusable as error:
            wrong(error)
            continue
        if found is not None:
            yield where, found


def refuse_few_domains(records: Mapping[str, int], column: str, *, apart: bool) -> None:
    """Raises where there is nothing to weigh, or a domain can't be divided. records: of each domain. apart: what is
    held out is another text.
    """
    if len(records) == 1:
        raise DataUnusable(
            f"all records have the {column} `{next(iter(records))}`, so that there is nothing to weigh: leave "
            "domain_column out, or add records of another domain",
            param=DATA,
        )
    refuse_many_domains(records, column)
    few = sorted(name for name, count in records.items() if count < LEAST_RECORDS)
    if few and not apart:
        raise DataUnusable(
            f"of each domain at least {LEAST_RECORDS} records are needed, one to learn and one to hold out, and some "
            f"hundreds do well; there is one of {listed(few)}. Add more, or name a text of its own as "
            "evaluation.source.",
            param=DATA,
        )


def refuse_many_domains(names: Iterable[str], column: str) -> None:
    count = len(set(names))
    if count > MOST_DOMAINS:
        raise DataUnusable(
            f"`{column}` names more than {MOST_DOMAINS} domains, and the loss of each is measured by itself: name a "
            "field that tells a few kinds of text apart",
            param=DATA,
        )


def refuse_unknown_domains(found: Iterable[str], known: Iterable[str]) -> None:
    """Raises where a text of its own that is held out has domains that nothing to learn from is of. Names, both."""
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise DataUnusable(
            f"the evaluation text has domains that no record to learn from is of: {listed(unknown)}", param=EVALUATION
        )


def refuse_missing_domains(found: Iterable[str], known: Iterable[str]) -> None:
    """Raises where a text of its own that is held out has nothing of a domain that is learned. Names, both."""
    missing = sorted(set(known) - set(found))
    if missing:
        raise DataUnusable(
            "each domain is weighed by its loss on the evaluation text, which has no records of "
            f"{listed(missing)}: add some",
            param=EVALUATION,
        )


def counted_domains(records: Counter[str]) -> dict[str, int]:
    """Records of each domain, in the order of their numbers."""
    return {name: records[name] for name in sorted(records)}


def _domain_of(row: object, domain: str, where: str) -> str:
    """Raises DataUnusable where there is none. row: that has a record."""
    value = row.get(domain) if isinstance(row, Mapping) else None
    if value is None:
        raise DataUnusable(f"{where} has no `{domain}`, so that nobody knows which domain it is of")
    if type(value) not in KINDS:
        raise DataUnusable(f"{where}: `{domain}` is to be a string, a whole number or a bool")
    name = name_of(value)
    if not 0 < len(name.strip()) <= LONGEST_LABEL:
        said = "is empty" if not name.strip() else f"has {len(name):,} characters; at most {LONGEST_LABEL} are a name"
        raise DataUnusable(f"{where}: `{domain}` {said}")
    return name.encode(errors="replace").decode()
