"""What every backend keeps to."""

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from squeeze.errors import ArtifactNotFound, BodyTooLarge, StorageUnavailable
from storage import InvalidKeyError, Storage, Stored

MIB = 1 << 20
ODD_NAMES = ["a b", "a%20b", "ü/日本", "x#1", "q?y=1&z", "tilde~*!'()", "p+q=r;,:@$", '[br]{ack}|^`<>"', "e\u0301"]


def some_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def in_chunks(content: bytes, chunk_bytes: int = 100_000) -> Iterator[bytes]:
    for start in range(0, len(content), chunk_bytes):
        yield content[start : start + chunk_bytes]


def breaking_after(content: bytes) -> Iterator[bytes]:
    yield from in_chunks(content)
    raise RuntimeError("the source broke")


@pytest.mark.parametrize("size", [0, 1, MIB, 8 * MIB, 20 * MIB + 7])
def test_what_was_put_is_read_back_with_its_size_and_digest(storage: Storage, tmp_path: Path, size: int) -> None:
    content = some_bytes(size)
    expected = Stored(size, hashlib.sha256(content).hexdigest())
    source = tmp_path / "source"
    source.write_bytes(content)

    assert storage.put_stream("jobs/a/1/stream", in_chunks(content)) == expected
    assert storage.put_file("jobs/a/1/file", source) == expected
    for key in ("jobs/a/1/stream", "jobs/a/1/file"):
        assert b"".join(storage.read(key)) == content
        assert storage.size(key) == size
        assert storage.exists(key)
        storage.fetch(key, tmp_path / "new" / "fetched", expected.sha256)
        assert (tmp_path / "new" / "fetched").read_bytes() == content
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["fetched"]


def test_a_range_reads_what_the_slice_of_the_bytes_holds(storage: Storage) -> None:
    content = some_bytes(3 * MIB)
    storage.put_stream("object", in_chunks(content))
    for start, end in [
        (0, 1),
        (5, 5),
        (MIB - 1, MIB + 1),
        (7, None),
        (0, 9 * MIB),
        (3 * MIB, None),
        (4 * MIB, 5 * MIB),
    ]:
        assert b"".join(storage.read("object", start, end)) == content[start:end]
    assert max(map(len, storage.read("object"))) < 3 * MIB


def test_a_second_put_replaces_the_first(storage: Storage) -> None:
    storage.put_stream("object", [b"first, and longer"])
    storage.put_stream("object", [b"second"])
    assert b"".join(storage.read("object")) == b"second"
    assert storage.size("object") == 6


@pytest.mark.parametrize("size", [2_000, 20 * MIB])
def test_a_stream_past_its_limit_leaves_what_was_there(storage: Storage, size: int) -> None:
    storage.put_stream("object", [b"old"])
    with pytest.raises(BodyTooLarge):
        storage.put_stream("object", in_chunks(some_bytes(size)), max_bytes=size - 1)
    assert b"".join(storage.read("object")) == b"old"
    assert storage.put_stream("object", in_chunks(some_bytes(size)), max_bytes=size).size_bytes == size


@pytest.mark.parametrize("size", [2_000, 20 * MIB])
def test_a_source_that_breaks_leaves_nothing_and_its_own_error(storage: Storage, size: int) -> None:
    with pytest.raises(RuntimeError, match="the source broke"):
        storage.put_stream("object", breaking_after(some_bytes(size)))
    assert not storage.exists("object")
    assert list(storage.list()) == []


def test_a_file_that_is_not_there_is_the_callers_error(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        storage.put_file("object", tmp_path / "absent")


def test_an_absent_object_is_named_as_such(storage: Storage, tmp_path: Path) -> None:
    assert not storage.exists("absent")
    with pytest.raises(ArtifactNotFound):
        storage.size("absent")
    with pytest.raises(ArtifactNotFound):
        storage.read("absent")
    with pytest.raises(ArtifactNotFound):
        storage.fetch("absent", tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()
    storage.delete("absent")
    assert storage.delete_prefix("absent") == 0
    assert list(storage.list("absent")) == []


def test_a_folder_of_objects_is_no_object(storage: Storage) -> None:
    storage.put_stream("folder/object", [b"x"])
    assert not storage.exists("folder")
    with pytest.raises(ArtifactNotFound):
        storage.read("folder")
    storage.delete("folder")
    assert list(storage.list()) == ["folder/object"]


def test_a_damaged_object_is_not_fetched(storage: Storage, tmp_path: Path) -> None:
    storage.put_stream("object", [b"damaged"])
    target = tmp_path / "new" / "fetched"
    target.parent.mkdir()
    target.write_bytes(b"old")
    with pytest.raises(StorageUnavailable, match="damaged"):
        storage.fetch("object", target, hashlib.sha256(b"whole").hexdigest())
    assert [path.read_bytes() for path in target.parent.iterdir()] == [b"old"]


def test_a_prefix_covers_whole_segments(storage: Storage) -> None:
    for key in ("jobs/a/1/x", "jobs/a/2/x", "jobs/a/2/y/z", "jobs/ab/1/x", "files/a"):
        storage.put_stream(key, [b"x"])
    assert list(storage.list()) == ["files/a", "jobs/a/1/x", "jobs/a/2/x", "jobs/a/2/y/z", "jobs/ab/1/x"]
    assert list(storage.list("jobs/a/2")) == ["jobs/a/2/x", "jobs/a/2/y/z"]
    assert storage.delete_prefix("jobs/a") == 3
    assert storage.delete_prefix("files/a") == 1
    assert list(storage.list()) == ["jobs/ab/1/x"]


def test_a_deleted_object_is_gone(storage: Storage) -> None:
    storage.put_stream("files/a", [b"x"])
    storage.delete("files/a")
    assert not storage.exists("files/a")
    storage.put_stream("files/a", [b"y"])
    assert b"".join(storage.read("files/a")) == b"y"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_of_any_letters_come_back_as_they_were(storage: Storage, name: str) -> None:
    key = f"odd/{name}"
    storage.put_stream(key, [name.encode()])
    assert b"".join(storage.read(key)) == name.encode()
    assert list(storage.list("odd")) == [key]
    assert storage.delete_prefix("odd") == 1


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "./a", "a\0b", "a\nb", "a\\b", "é" * 128]
)
def test_a_key_that_could_lead_elsewhere_is_refused_by_every_call(storage: Storage, tmp_path: Path, key: str) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    calls = [
        lambda: storage.put_stream(key, [b"x"]),
        lambda: storage.put_file(key, source),
        lambda: storage.read(key),
        lambda: storage.fetch(key, tmp_path / "fetched"),
        lambda: storage.size(key),
        lambda: storage.exists(key),
        lambda: storage.local_path(key),
        lambda: storage.presign(key, expires_seconds=60, filename="x"),
        lambda: storage.delete(key),
        lambda: storage.delete_prefix(key),
    ]
    for call in calls:
        with pytest.raises(InvalidKeyError):
            call()


def test_a_storage_that_works_passes_its_check(storage: Storage) -> None:
    storage.check()
