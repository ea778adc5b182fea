"""Text files on disk as documents: plain text, JSONL or parquet, alone or a directory of them."""

from collections.abc import Iterator
from pathlib import Path

from squeeze.errors import DataUnusable
from squeeze.texts.documents import PARQUET, PIECE_BYTES, Row, Wrong, refuse, rows_in, said, wanted_of
from squeeze.texts.parquet import parquet_rows
from squeeze.texts.records import blamed


def documents_of(source: Path, param: str, column: str | None = None) -> Iterator[str]:
    """The texts of a file, or of a directory's files by their names, in order.

    param: the field of the request that names it, for the error. column: the field that holds the text of a record;
    None: the usual ones. Raises DataUnusable where a file is no text or a record has none.
    """
    with blamed(param):
        for where, record in rows_of(source, column):
            yield record if isinstance(record, str) else text_of(record, column, where)


def rows_of(source: Path, column: str | None = None, wrong: Wrong = refuse, label: str | None = None) -> Iterator[Row]:
    """The records of a file, or of a directory's files by their names, as `squeeze.texts.documents.rows_in`.

    label: a field beside the text.
    """
    if source.is_dir():
        for one in sorted(source.iterdir()):
            yield from rows_of(one, column, wrong, label)
        return
    with source.open("rb") as file:
        parquet = file.read(len(PARQUET)) == PARQUET
        file.seek(0)
        if parquet:
            yield from parquet_rows(source, column, label)
        else:
            yield from rows_in(iter(lambda: file.read(PIECE_BYTES), b""), column, wrong)


def text_of(row: object, column: str | None, where: str) -> str:
    """The text of a record: `text`, or `prompt` and `completion`, or what is said in a chat; empty where it is null."""
    columns, wanted = wanted_of(column)
    fields = {name: row[name] for name in columns if name in row} if isinstance(row, dict) else {}
    given = {name: value for name, value in fields.items() if value is not None}
    kind = next(iter(given), None)
    parts = [value for name, value in given.items() if name == kind or (kind == "prompt" and name == "completion")]
    if not fields or not all(isinstance(part, str | bytes | list | dict) for part in parts):
        raise DataUnusable(f"{where} of the file has none of {wanted}")
    text = ("" if all(isinstance(part, str) for part in parts) else "\n").join(map(said, parts))
    return text.encode(errors="replace").decode()  # JSON can hold halves of characters, no encoding can
