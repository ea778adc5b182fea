"""Parquet as its own process reads it: from any storage, the beginning alone, and whatever becomes of the process."""

import random
import string
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from api import tables
from api.tables import Table
from squeeze.errors import DataUnusable
from storage.base import Storage
from storage.local import LocalStorage


class Afar(LocalStorage):
    """Gives no path, as storage over a network gives none."""

    def local_path(self, key: str) -> Path | None:
        return None


def stored(room: Path, rows: list[str], kind: type[LocalStorage], group: int) -> Storage:
    pq.write_table(pa.table({"text": rows}), room / "made.parquet", row_group_size=group)
    storage = kind(room / "storage")
    storage.put_file("rows", room / "made.parquet")
    return storage


def texts(count: int) -> list[str]:
    dice = random.Random(0)
    return ["".join(dice.choices(string.ascii_letters, k=1000)) for _ in range(count)]


@pytest.mark.parametrize("kind", [LocalStorage, Afar])
def test_of_a_large_file_the_groups_at_the_beginning_are_read_and_all_records_counted(
    tmp_path: Path, kind: type[LocalStorage]
) -> None:
    rows = texts(600)
    table = Table(stored(tmp_path, rows, kind, 100), "rows", 250_000)
    assert [*table.rows(None, None)] == [(f"row {n}", {"text": row}) for n, row in enumerate(rows[:200], start=1)]
    assert (table.records, table.whole) == (600, False)
    table = Table(stored(tmp_path, rows, kind, 100), "rows", 1 << 20)
    assert len([*table.rows(None, None)]) == 600 and table.whole


def test_a_reader_that_has_enough_leaves_no_process(tmp_path: Path) -> None:
    rows = Table(stored(tmp_path, texts(5000), LocalStorage, 5000), "rows", 1 << 24).rows(None, None)
    assert next(rows)[0] == "row 1"
    rows.close()


def test_a_process_that_is_ended_before_its_end_has_refused_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "SECONDS", 0.0)
    table = Table(stored(tmp_path, texts(5), LocalStorage, 5), "rows", 1 << 20)
    assert [*table.rows(None, None)] == [] and not table.whole


def test_what_is_damaged_behind_its_beginning_says_how_far_it_could_be_read(tmp_path: Path) -> None:
    storage = stored(tmp_path, texts(600), LocalStorage, 100)
    content = bytearray(b"".join(storage.read("rows")))
    content[450_000:490_000] = bytes(40_000)
    storage.put_stream("rows", iter([bytes(content)]))
    with pytest.raises(DataUnusable, match="damaged parquet, unreadable after row 256"):
        [*Table(storage, "rows", 1 << 20).rows(None, None)]


def test_its_process_knows_none_of_our_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEEZE_SECRET", "hush")
    with tables._reading([sys.executable, "-c", "import os; print(os.environ)"]) as lines:
        assert b"hush" not in b"".join(lines)
