"""What an uploaded text is, by its name's ending and its first bytes, so that a wrong file is refused at once."""

import codecs
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import PurePosixPath

from squeeze.errors import DataUnusable

SNIFFED_BYTES = 1 << 16
NAME_CHARACTERS = 255
JSONL = {".jsonl", ".ndjson"}
PLAIN = {".txt", ".text", ".md"}
PARQUET = {".parquet"}
CONTENT_TYPES = {**dict.fromkeys(JSONL, "application/jsonl"), **dict.fromkeys(PLAIN, "text/plain; charset=utf-8")}
_PARQUET_MAGIC = b"PAR1"


def plain_name(filename: str) -> str:
    """The last part of a client's path, without what can't be shown; DataUnusable where nothing is left."""
    name = "".join(each for each in filename.replace("\\", "/").rsplit("/", 1)[-1] if each.isprintable())
    name = name.strip()[-NAME_CHARACTERS:]
    if not name or name in {".", ".."}:
        raise DataUnusable("The part `file` has no file name. Send one: its ending tells what it is.", param="file")
    return name


def content_type(filename: str) -> str:
    """The media type that a stored file is served with."""
    return CONTENT_TYPES.get(_ending(filename), "application/octet-stream")


def checked(filename: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same chunks, once the first were looked at; raises DataUnusable where they are not what the name says."""
    ending = _ending(filename)
    if ending not in JSONL | PLAIN | PARQUET:
        raise DataUnusable(
            f"{filename} ends in {ending or 'nothing'}; send JSON lines (.jsonl, one object with `text` a line), "
            "plain text (.txt) or Parquet (.parquet).",
            param="file",
        )
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= SNIFFED_BYTES:
            break
    if not head.strip():
        raise DataUnusable(f"{filename} is empty. Send a file with text in it.", param="file")
    if ending in PARQUET:
        if not head.startswith(_PARQUET_MAGIC):
            raise DataUnusable(f"{filename} does not begin as a Parquet file does (PAR1).", param="file")
    else:
        text = _decoded(filename, head)
        if ending in JSONL:
            _check_first_line(filename, text, whole=len(head) < SNIFFED_BYTES)
    return chain([head], chunks)


def _ending(filename: str) -> str:
    return PurePosixPath(filename.lower()).suffix


def _decoded(filename: str, head: bytes) -> str:
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)  # a character may be cut at the end
    except UnicodeDecodeError as error:
        raise DataUnusable(f"{filename} is not UTF-8: {error.reason} at byte {error.start}.", param="file") from error
    if "\0" in text:
        raise DataUnusable(f"{filename} holds zero bytes; that is no text.", param="file")
    return text


def _check_first_line(filename: str, text: str, *, whole: bool) -> None:
    lines = text.lstrip().split("\n")  # only these end a line of JSONL
    first = lines[0]
    if len(lines) == 1 and not whole:
        if not first.startswith("{"):
            raise _not_jsonl(filename, "its first line is no object")
        return  # longer than what was looked at
    try:
        row = json.loads(first)
    except ValueError as error:
        raise _not_jsonl(filename, f"its first line is not JSON ({error})") from error
    if not isinstance(row, dict) or not _holds_text(row):
        raise _not_jsonl(filename, "its first line is no object with `text`")


def _holds_text(row: dict[str, object]) -> bool:
    if isinstance(row.get("text"), str):
        return True
    if "prompt" in row and "completion" in row:
        return True
    return any(isinstance(row.get(name), list) for name in ("messages", "conversations"))


def _not_jsonl(filename: str, reason: str) -> DataUnusable:
    return DataUnusable(
        f'{filename}: {reason}. Each line must look like {{"text": "…"}}, {{"prompt": "…", "completion": "…"}} or '
        '{"messages": [{"role": "user", "content": "…"}, …]}.',
        param="file",
    )
