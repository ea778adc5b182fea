"""Uploaded files as strangers make them: each gives its text, or says why it has none."""

import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.texts.documents import documents_of
from squeeze.errors import DataUnusable
from squeeze.texts.documents import BLOCK_CHARACTERS

TEXT = "one\ntwo grün ☃\nthree\n"
ROWS = [{"text": "one"}, {"text": "two grün ☃"}]


def lines(rows: list[Any], end: str = "\n") -> str:
    return end.join(json.dumps(row) for row in rows)


def parquet(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def documents(tmp_path: Path, content: bytes | str) -> list[str]:
    path = tmp_path / "upload"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(documents_of(path, "data.source"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_in_every_marked_encoding_is_the_same(tmp_path: Path, encoding: str) -> None:
    assert documents(tmp_path, TEXT.encode(encoding)) == [TEXT]
    assert documents(tmp_path, lines(ROWS).encode(encoding)) == ["one", "two grün ☃"]


def test_line_ends_of_other_systems_and_empty_lines_make_no_difference(tmp_path: Path) -> None:
    assert documents(tmp_path, TEXT.replace("\n", "\r\n")) == [TEXT]
    assert documents(tmp_path, "\r\n" * 5000 + lines(ROWS, "\r\n\r\n") + "\r\n") == ["one", "two grün ☃"]


def test_a_stray_accent_of_another_encoding_is_no_reason_to_refuse(tmp_path: Path) -> None:
    (text,) = documents(tmp_path, ("word " * 50 + "grün").encode("latin-1"))
    assert text.endswith("gr\ufffdn")


@pytest.mark.parametrize(
    "content",
    [
        os.urandom(50_000),
        b"\0" * 99,
        gzip.compress(TEXT.encode()),
        TEXT.encode("utf-16-le"),
        "привет ".encode("cp1251"),
    ],
    ids=["random", "zeros", "gzip", "unmarked UTF-16", "cyrillic"],
)
def test_what_is_no_text_is_refused_with_what_would_do(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataUnusable, match="UTF-8") as refused:
        documents(tmp_path, content)
    assert refused.value.param == "data.source"


def test_one_enormous_line_comes_in_pieces(tmp_path: Path) -> None:
    text = "abc " * BLOCK_CHARACTERS
    pieces = documents(tmp_path, text)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 2 * BLOCK_CHARACTERS


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "a", "messages": [{"content": "b"}]}, "a"),
        ({"text": None, "prompt": "a", "completion": "b"}, "ab"),
        ({"prompt": "a", "completion": None}, "a"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]}, "a"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "a"},
                            {"type": "image_url", "image_url": {"url": "x"}},
                            {"type": "text", "text": "b"},
                        ],
                    },
                    {"role": "assistant", "content": "c"},
                ]
            },
            "a\nb\nc",
        ),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": [{"content": "b"}]}, "a\nb"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "a\nb"),
        ({"text": "half \ud800 character"}, "half ? character"),
        ({"text": "x", "score": float("nan")}, "x"),
        ({"text": None}, ""),
    ],
    ids=str,
)
def test_a_record_says_what_its_fields_say(tmp_path: Path, row: dict[str, Any], text: str) -> None:
    assert documents(tmp_path, lines([row])) == [text]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lines([*ROWS, {"body": "x"}]), "line 3 .* none of `text`"),
        (lines([{"text": 3}]), "line 1 .* none of `text`"),
        (lines([*ROWS, 3]), "line 3 .* none of `text`"),
        (lines(ROWS) + '\n{"text": ', "line 3 .* not JSON"),
        (lines(ROWS) + "\n" + "[" * 200_000, "line 3 .* not JSON"),
        ('{"text": ' + "9" * 5000 + "}", "line 1 .* not JSON"),
        (json.dumps({"text": "x"}, indent=1), "line 1 .* not JSON"),
        (json.dumps(ROWS), "one JSON array; write one object a line"),
    ],
    ids=["no text", "number", "bare", "cut", "deep", "vast number", "indented", "array"],
)
def test_a_line_that_can_t_be_used_is_named(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(DataUnusable, match=words):
        documents(tmp_path, content)


def test_text_that_merely_begins_with_a_brace_is_text(tmp_path: Path) -> None:
    code = "{ int main(void) { return 0; } }\n"
    assert documents(tmp_path, code) == [code]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (parquet(text=["a", None, "b"], image=[b"x"] * 3), ["a", "", "b"]),
        (parquet(text=pa.array(["a", "a"]).dictionary_encode()), ["a", "a"]),
        (parquet(text=pa.array([b"a"], pa.binary())), ["a"]),
        (parquet(messages=[[{"role": "user", "content": "a"}]]), ["a"]),
        (parquet(text=pa.array([], pa.string())), []),
    ],
    ids=["nulls", "dictionary", "bytes", "messages", "empty"],
)
def test_parquet_gives_its_text_column_or_its_chats(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    assert documents(tmp_path, content) == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (parquet(body=["a"], title=["b"]), r"none of `text`.* \(body, title\)"),
        (parquet(text=["a" * 1000] * 500)[:-100], "damaged parquet"),
        (b"PAR1" + b"x" * 1000, "damaged parquet"),
        (parquet(text=[1, 2]), "row 1 .* none of `text`"),
    ],
    ids=["no text column", "cut", "garbage", "numbers"],
)
def test_parquet_without_text_says_what_it_has(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(DataUnusable, match=words):
        documents(tmp_path, content)
