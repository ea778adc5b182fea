"""Text files as records, read as their bytes come: plain text and JSONL, told apart by what is in them; no torch.

The service reads uploads so before it takes a job, the worker reads everything so. A file is read in pieces of bounded
size. What is no text is refused, with what would do, rather than learned from.
"""

import codecs
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NoReturn

from squeeze.errors import DataUnusable

HEAD_BYTES = 1 << 16  # decide what kind of file it is
PIECE_BYTES = 1 << 20  # that are asked for at a time
BLOCK_CHARACTERS = 1 << 20  # of plain text at a time
LONGEST_RECORD = 1 << 26  # characters of a line of JSONL
MOST_UNREADABLE = 0.1  # share of characters that are no UTF-8: stray accents of another encoding pass, others don't
PARQUET = b"PAR1"
# UTF-32's little-endian mark begins with UTF-16's.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
Row = tuple[str, object]  # where in the file a record stands, and what it holds; a piece of plain text is a str
Wrong = Callable[[DataUnusable], None]  # is told of a record that is none; raises, or lets the others be looked at
COLUMNS = ("text", "prompt", "completion", "messages", "conversations")
WANTED = "`text`, `prompt` and `completion`, or `messages`"

# The grain in which a file is split into a training and a held-out part. In small files it is finer: with 128 pieces
# the odds that chance holds nothing out are one in a million; pieces of 4096 left a file of 180 kB without.
SPLIT_CHARACTERS_LEAST, SPLIT_CHARACTERS_MOST = 256, 4096
SPLIT_PIECES = 128


def refuse(error: DataUnusable) -> NoReturn:
    """Ends at the first record that is none."""
    raise error


def rows_in(chunks: Iterable[bytes], column: str | None = None, wrong: Wrong = refuse) -> Iterator[Row]:
    """The records of a file that is not parquet, in order; plain text comes in pieces.

    column: the field that holds the text of a record; None: the usual ones. wrong: is told of a line that is no record.
    Raises DataUnusable where the file is no text.
    """
    rest, head = iter(chunks), b""
    for chunk in rest:
        head += chunk
        if len(head) >= HEAD_BYTES:
            break
    encoding = next((encoding for mark, encoding in MARKS if head.startswith(mark)), "utf-8-sig")
    opening = head[:HEAD_BYTES].decode(encoding, errors="replace")
    _refuse_binary(opening)
    if re.match(r"\s*\[\s*\{\s*\"", opening):
        raise DataUnusable("the file is one JSON array; write one object a line instead (JSONL)")
    stream = io.BufferedReader(_Joined(chain([head], rest)), PIECE_BYTES)
    text = io.TextIOWrapper(stream, encoding, errors="replace")
    yield from _jsonl(text, wanted_of(column)[1], wrong) if re.match(r"\s*\{\s*[\"}]", opening) else _plain(text)


def wanted_of(column: str | None) -> tuple[Sequence[str], str]:
    """(fields of a record that are looked at, the same in words)."""
    return (COLUMNS, WANTED) if column is None else ((column,), f"`{column}`")


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


def passages(documents: Iterable[str], limit: int) -> Iterator[str]:
    """Long documents in pieces of up to `limit` characters, cut at line ends where there are any, or else at spaces."""
    for document in documents:
        start = 0
        while len(document) - start > limit:
            cuts = (document.rfind(mark, start + limit // 2, start + limit) for mark in ("\n", " "))
            end = next((cut + 1 for cut in cuts if cut >= 0), start + limit)
            yield document[start:end]
            start = end
        if document[start:].strip():
            yield document[start:]


def grain_for(size_bytes: int) -> int:
    """Characters of the pieces that the running text of a file of that size is split by."""
    return max(SPLIT_CHARACTERS_LEAST, min(size_bytes // SPLIT_PIECES, SPLIT_CHARACTERS_MOST))


class _Joined(io.RawIOBase):
    """Chunks of bytes as one stream; what their source raises passes through."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._left = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def _refuse_binary(opening: str) -> None:
    if "\0" in opening or opening.count("\ufffd") > MOST_UNREADABLE * len(opening):
        raise DataUnusable(
            "the file is not text in UTF-8 (nor UTF-16 with a byte-order mark), JSONL or parquet; unpack it, or save "
            "it as UTF-8"
        )


def _plain(file: io.TextIOWrapper) -> Iterator[Row]:
    while text := file.read(BLOCK_CHARACTERS):
        yield "", text + file.readline(BLOCK_CHARACTERS)


def _jsonl(file: io.TextIOWrapper, wanted: str, wrong: Wrong) -> Iterator[Row]:
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
            wrong(DataUnusable(f"line {number} of the file is not JSON: {error}"))
            continue
        if isinstance(row, dict):
            yield f"line {number}", row
        else:
            wrong(DataUnusable(f"line {number} of the file has none of {wanted}"))
