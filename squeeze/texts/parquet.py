"""Parquet as records, with pyarrow, where that is installed.

    python -m squeeze.texts.parquet FILE PRESENT COLUMN LABEL

writes the records of a stranger's file as lines of JSON, from a process of its own: what a decoder written in C++ does
with a file made to break it, in memory or time, is then that process's end and nobody else's. PRESENT: the bytes from
the start that are there; COLUMN, LABEL: as JSON. The first line says how many records the file has; each other one is
`[where, record]`, or `{"refused": why}`; the last one says whether these were all.
"""

import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from squeeze.errors import DataUnusable
from squeeze.texts.documents import PIECE_BYTES, Row, wanted_of

ROWS_AT_ONCE = 256
MEMORY_BYTES = 4 << 30  # of addresses, for a stranger's file


def parquet_rows(source: Path, column: str | None = None, label: str | None = None) -> Iterator[Row]:
    """The records of a file, in order, with the fields alone that are looked at.

    column: the field that holds the text of a record; None: the usual ones. label: a field beside it. Raises
    DataUnusable where the file is damaged, or has no such field.
    """
    yield from _Table(source, column, label).rows(None)


def write_rows(source: Path, present: int, column: str | None, label: str | None, out: TextIO) -> None:
    """As this module is called."""
    try:
        table = _Table(source, column, label)
        groups = table.within(present)
        out.write(json.dumps({"records": table.records}) + "\n")
        for row in table.rows(groups):
            out.write(json.dumps(row, default=_no_json) + "\n")
        out.write(json.dumps({"whole": len(groups) == table.groups}) + "\n")
    except DataUnusable as error:
        out.write(json.dumps({"refused": error.message}) + "\n")


class _Table:
    """One file. records: how many it has. groups: of rows, that lie behind one another."""

    def __init__(self, source: Path, column: str | None, label: str | None) -> None:
        from pyarrow import ArrowException, parquet  # only where such a file is given: it costs 60 MB

        self._damaged: tuple[type[Exception], ...] = (ArrowException, OSError)
        self._read = 0
        columns, wanted = wanted_of(column)
        try:
            self._file = parquet.ParquetFile(source, buffer_size=PIECE_BYTES)
            names = self._file.schema_arrow.names
        except self._damaged as error:
            raise self._unreadable() from error
        held = [name for name in columns if name in names]
        if not held:
            raise DataUnusable(f"the file has none of {wanted} among its columns ({', '.join(names[:20])})")
        if label is not None and label not in names:
            raise DataUnusable(f"the file has no `{label}` among its columns ({', '.join(names[:20])})")
        self._columns = held if label is None else [*held, label]
        self.records, self.groups = int(self._file.metadata.num_rows), int(self._file.num_row_groups)

    def within(self, present: int) -> list[int]:
        """The first groups, as far as they lie within so many bytes from the start."""
        for number in range(self.groups):
            group = self._file.metadata.row_group(number)
            parts = [group.column(n) for n in range(group.num_columns)]
            if any(
                (one.dictionary_page_offset or one.data_page_offset) + one.total_compressed_size > present
                for one in parts
            ):
                return [*range(number)]
        return [*range(self.groups)]

    def rows(self, groups: list[int] | None) -> Iterator[Row]:
        """groups: to be read; None: all."""
        try:
            for batch in self._file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=self._columns):
                for row in batch.to_pylist():
                    self._read += 1
                    yield f"row {self._read}", row
        except self._damaged as error:
            raise self._unreadable() from error

    def _unreadable(self) -> DataUnusable:
        return DataUnusable(f"the file is damaged parquet, unreadable after row {self._read}: upload it again")


def _no_json(_: Any) -> dict[str, str]:
    """Stands for what is neither text nor number: bytes, dates."""
    return {}


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    write_rows(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4]), sys.stdout)
