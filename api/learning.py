"""Whether uploaded examples can be learned from, found out before the job that names them is taken."""

import math
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain

from api.service import Service
from api.sources import Files
from api.tables import Table
from api.tensors import has_chat_template
from jobs import files
from jobs.records import FileRecord
from squeeze.errors import ArtifactNotFound, DataUnusable, FileNotFound
from squeeze.names import OWN_ID
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.training import Train
from squeeze.texts.documents import PARQUET, Row, Wrong, grain_for, rows_in
from squeeze.texts.domains import (
    Domained,
    domained_in,
    refuse_few_domains,
    refuse_many_domains,
    refuse_missing_domains,
    refuse_unknown_domains,
)
from squeeze.texts.labels import Labelled, labelled_in, name_of, refuse_one_label, refuse_unknown
from squeeze.texts.records import (
    DATA,
    EVALUATION,
    Chat,
    Faults,
    Record,
    blamed,
    records_in,
    refuse_nothing_held_out,
    refuse_too_few,
)

CHECKED_BYTES = 16 << 20  # of a file; the worker looks at the rest before it fetches a model
CHECKED_SECONDS = 2.0  # for the same
LEAST_TOKENS = 16  # of a sequence


@dataclass(frozen=True)
class Seen:
    """Of what is trained on. chat: where the first chat stands; None where there is none. records: how many there are,
    by the part that was looked at; None where nothing was.
    """

    chat: str | None = None
    records: int | None = None


def refuse_unusable(service: Service, project: str, spec: JobSpec) -> Seen:
    """Reads the uploaded files that a step trains on or measures its loss on.

    Raises DataUnusable, with the lines, where records are none, or too few. Of a large file only the beginning is read;
    datasets are the worker's. A file that is not there is the submit's to refuse.
    """
    if not any(isinstance(step, Train) for step in spec.steps):
        return Seen()
    apart = spec.evaluation.source is not None
    label, domain = spec.label_column, spec.domain_column
    data = _Look(service, project, DATA, spec.data.source, spec.data.column, label, domain)
    held_out = _Look(service, project, EVALUATION, spec.evaluation.source, spec.evaluation.column, label, domain)
    if data.count is not None:
        refuse_too_few(data.count, apart=apart)
        if label is not None:
            refuse_one_label(sorted(data.labels))
            refuse_unknown(held_out.labels, data.labels)
        if domain is not None:
            refuse_few_domains(data.domains, domain, apart=apart)
            refuse_unknown_domains(held_out.domains, data.domains)
    if held_out.count is not None:
        refuse_nothing_held_out(held_out.count)
        if domain is not None:
            refuse_missing_domains(held_out.domains, data.domains)
    return Seen(data.chat or held_out.chat, data.records)


def refuse_misfit(files: Files, positions: int, chat: str | None) -> None:
    """Raises DataUnusable where the model can't read such examples. positions: that its config allows, 0 where it says
    nothing. chat: where the first chat stands in the data.
    """
    if 0 < positions < LEAST_TOKENS:
        raise DataUnusable(f"The model has {positions} positions; at least {LEAST_TOKENS} are needed.", param="model")
    if chat is not None and not has_chat_template(files):
        raise DataUnusable(
            f"{chat} is a chat, and the model has no chat template that says how one is written. Give `prompt` and "
            "`completion` instead, or a model with a template.",
            param=DATA,
        )


def text_bytes_of(service: Service, project: str, spec: JobSpec) -> int | None:
    """Of the examples that are trained on; None where they are no uploaded file."""
    record = _found(service, project, spec.data.source)
    return None if record is None else record.bytes


class _Enough(Exception):
    """What was to be looked at now was."""


class _Look:
    """One file's records, as far as they are looked at. count: of them; None where there may be more. records: what
    that comes to for the whole file. labels: the names of those that were seen, where each record is to have one, in
    the field `label`. domains: records of each that was seen, where each is to name one in the field `domain`.
    """

    def __init__(
        self,
        service: Service,
        project: str,
        param: str,
        source: str | None,
        column: str | None,
        label: str | None,
        domain: str | None,
    ) -> None:
        self.labels: set[str] = set()
        self.domains: Counter[str] = Counter()
        self.count: int | None = None
        self.records: int | None = None
        self.chat: str | None = None
        record = _found(service, project, source)
        if record is None:
            return
        try:
            chunks = service.storage.read(record.storage_key)
        except ArtifactNotFound:  # deleted since
            return
        first = next(chunks, b"")
        faults, count, beginning = Faults(), 0, _Beginning(chain([first], chunks))
        table = Table(service.storage, record.storage_key, CHECKED_BYTES) if first.startswith(PARQUET) else None
        with blamed(param):
            try:
                rows = (
                    rows_in(beginning, column, faults) if table is None else _soon(table.rows(column, label or domain))
                )
                for where, one in _found_in(rows, column, grain_for(record.bytes), (label, domain), faults):
                    count += 1
                    if isinstance(one, Labelled):
                        self.labels.add(name_of(one.label))
                    if isinstance(one, Domained):
                        self.domains[one.domain] += 1
                        refuse_many_domains(self.domains, str(domain))
                        one = one.record  # noqa: PLW2901 - which may be a chat
                    if self.chat is None and isinstance(one, Chat):
                        self.chat = where
                self.count = count if table is None or table.whole else None
            except _Enough:
                pass
            faults.refuse_any()
        if table is None:
            self.records = round(count * max(1.0, record.bytes / max(1, beginning.seen)))
        else:
            self.records = table.records


def _found_in(
    rows: Iterable[Row], column: str | None, grain: int, beside: tuple[str | None, str | None], wrong: Wrong
) -> Iterator[tuple[str, Record | Labelled | Domained]]:
    """beside: the fields of a label and of a domain, where records are to have one."""
    label, domain = beside
    if label is not None:
        return labelled_in(rows, column, label, wrong)
    if domain is not None:
        return domained_in(rows, column, domain, wrong)
    return records_in(rows, column, grain, wrong)


def _found(service: Service, project: str, source: str | None) -> FileRecord | None:
    if source is None or not OWN_ID.match(source):
        return None
    try:
        with service.database.read() as session:
            return files.find(session, project, source)
    except FileNotFound:
        return None


def _soon(rows: Generator[Row]) -> Iterator[Row]:
    """Raises _Enough where they take longer than is looked at them now, counted from the first."""
    until = math.inf
    with closing(rows):
        for row in rows:
            until = min(until, time.monotonic() + CHECKED_SECONDS)
            if time.monotonic() > until:
                raise _Enough
            yield row


class _Beginning:
    """Of a file; raises _Enough where there is more than is looked at now. seen: bytes that were."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._until = chunks, time.monotonic() + CHECKED_SECONDS
        self.seen = 0

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            if self.seen >= CHECKED_BYTES or time.monotonic() > self._until:
                raise _Enough
            yield chunk
            self.seen += len(chunk)
