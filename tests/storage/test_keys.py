"""No key leads out of the root, whatever it is made of."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage import InvalidKeyError, open_storage
from storage.base import check_key

NASTY = st.sampled_from(
    ["..", ".", "", "/", "\\", "~", "%2e%2e", "..\0", "...", "a", "\u202e", "\ud800", "con", " ", "é" * 130]
)
KEYS = st.one_of(st.text(), st.lists(st.one_of(NASTY, st.text(max_size=5)), max_size=6).map("/".join))


def accepted(key: str) -> bool:
    try:
        return check_key(key) == key
    except InvalidKeyError:
        return False


@given(KEYS)
def test_an_accepted_key_resolves_inside_the_root_and_to_itself(key: str) -> None:
    if not accepted(key):
        return
    root = Path("/somewhere/root")
    path = root / key
    assert path.relative_to(root).as_posix() == key
    assert ".." not in path.parts
    assert not key.startswith("/")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(KEYS, st.binary(max_size=50))
def test_a_put_writes_inside_the_root_or_not_at_all(tmp_path: Path, key: str, content: bytes) -> None:
    storage = open_storage(f"file://{tmp_path}/root")
    try:
        storage.put_stream(key, [content])
    except InvalidKeyError:
        assert not accepted(key)
        assert list(storage.list()) == []
    else:
        assert b"".join(storage.read(key)) == content
        assert list(storage.list()) == [key]
        assert storage.delete_prefix(key) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    assert list((tmp_path / "root" / "partial").iterdir()) == []


@given(st.integers(0, 300), st.integers(0, 300), st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_any_range_reads_the_slice(tmp_path: Path, start: int, end: int, content: bytes) -> None:
    storage = open_storage(f"file://{tmp_path}/root")
    storage.put_stream("object", [content])
    assert b"".join(storage.read("object", start, end)) == content[start:end]


def test_a_surrogate_is_refused_before_the_disk_sees_it() -> None:
    with pytest.raises(InvalidKeyError):
        check_key("a\ud800")
