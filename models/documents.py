"""Text files as documents: plain text, JSONL or parquet, told apart by what is in them.

A file is read in pieces of bounded size. What is no text is refused, with what would do, rather than calibrated on.
"""

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from squeeze.errors import DataUnusable

HEAD_BYTES = 1 << 16  # decide what kind of file it is
BLOCK_CHARACTERS = 1 << 20  # of plain text at a time
LONGEST_RECORD = 1 << 26  # characters of a line of JSONL
MOST_UNREADABLE = 0.1  # share of characters that are no UTF-8: stray accents of another encoding pass, others don't
# UTF-32's little-endian mark begins with UTF-16's.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
Row = tuple[str, object]  # where in the file a record stands, and what it holds; a piece of plain text is a str
COLUMNS = ("text", "prompt", "completion", "messages", "conversations")
WANTED = "`text`, `prompt` and `completion`, or `messages`"


def documents_of(source: Path, param: str, column: str | None = None) -> Iterator[str]:
    """The texts of a file, or of a directory's files by their names, in order.

    param: the field of the request that names it, for the error. column: the field that holds the text of a record;
    None: the usual ones. Raises DataUnusable where a file is no text or a record has none.
    """
    columns, wanted = _wanted(column)
    for where, record in records_of(source, param, column):
        with blamed(param):
            yield record if isinstance(record, str) else _text_of(record, columns, wanted, where)


def records_of(source: Path, param: str, column: str | None = None) -> Iterator[Row]:
    """As `documents_of`, the records as they are, each with where it stands; plain text comes in pieces."""
    if source.is_dir():
        for one in sorted(source.iterdir()):
            yield from records_of(one, param, column)
        return
    columns, wanted = _wanted(column)
    with blamed(param):
        with source.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if head.startswith(b"PAR1"):
            yield from _parquet(source, columns, wanted)
            return
        encoding = next((encoding for mark, encoding in MARKS if head.startswith(mark)), "utf-8-sig")
        opening = head.decode(encoding, errors="replace")
        _refuse_binary(opening)
        if re.match(r"\s*\[\s*\{\s*\"", opening):
            raise DataUnusable("the file is one JSON array; write one object a line instead (JSONL)")
        if re.match(r"\s*\{\s*[\"}]", opening):
            yield from _jsonl(source, encoding, wanted)
        else:
            yield from _plain(source, encoding)


@contextmanager
def blamed(param: str) -> Iterator[None]:
    """Has an error of a text name the field of the request that names the text."""
    try:
        yield
    except DataUnusable as error:
        error.param = param
        raise


def _wanted(column: str | None) -> tuple[Sequence[str], str]:
    """(fields of a record that are looked at, the same in words)."""
    return (COLUMNS, WANTED) if column is None else ((column,), f"`{column}`")


def _refuse_binary(opening: str) -> None:
    if "\0" in opening or opening.count("\ufffd") > MOST_UNREADABLE * len(opening):
        raise DataUnusable(
            "the file is not text in UTF-8 (nor UTF-16 with a byte-order mark), JSONL or parquet; unpack it, or save "
            "it as UTF-8"
        )


def _plain(source: Path, encoding: str) -> Iterator[Row]:
    with source.open(encoding=encoding, errors="replace") as file:
        while text := file.read(BLOCK_CHARACTERS):
            yield "", text + file.readline(BLOCK_CHARACTERS)


def _jsonl(source: Path, encoding: str, wanted: str) -> Iterator[Row]:
    with source.open(encoding=encoding, errors="replace") as file:
        number = 0
        while line := file.readline(LONGEST_RECORD):
            number += 1
            if len(line) == LONGEST_RECORD:
                raise DataUnusable(f"line {number} of the file is longer than {LONGEST_RECORD:,} characters; cut it up")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataUnusable(f"line {number} of the file is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataUnusable(f"line {number} of the file has none of {wanted}")
            yield f"line {number}", row


def _parquet(source: Path, columns: Sequence[str], wanted: str) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet  # only where such a file is given: it costs 60 MB

    number = 0
    try:
        file = parquet.ParquetFile(source)
        names = file.schema_arrow.names
        held = [name for name in columns if name in names]
        if not held:
            raise DataUnusable(f"the file has none of {wanted} among its columns ({', '.join(names[:20])})")
        for batch in file.iter_batches(batch_size=256, columns=held):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (ArrowException, OSError) as error:
        raise DataUnusable(f"the file is damaged parquet, unreadable after row {number}: upload it again") from error


def _text_of(row: object, columns: Sequence[str], wanted: str, where: str) -> str:
    """The text of a record: `text`, or `prompt` and `completion`, or what is said in a chat; empty where it is null."""
    fields = {name: row[name] for name in columns if name in row} if isinstance(row, dict) else {}
    given = {name: value for name, value in fields.items() if value is not None}
    kind = next(iter(given), None)
    parts = [value for name, value in given.items() if name == kind or (kind == "prompt" and name == "completion")]
    if not fields or not all(isinstance(part, str | bytes | list | dict) for part in parts):
        raise DataUnusable(f"{where} of the file has none of {wanted}")
    text = ("" if all(isinstance(part, str) for part in parts) else "\n").join(map(said, parts))
    return text.encode(errors="replace").decode()  # JSON can hold halves of characters, no encoding can


def said(value: Any) -> str:
    """What a string, a message, a list of them or of their parts says; a part that is no text says nothing."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, list):
        return "\n".join(filter(None, map(said, value)))
    if isinstance(value, dict):
        return said(next((value[name] for name in ("content", "text", "value") if name in value), None))
    return ""
