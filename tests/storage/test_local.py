"""The local directory under kills, full disks and company."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from squeeze.errors import DiskFull, SpecInvalid, StorageUnavailable
from storage import InvalidKeyError, open_storage

# Writes one chunk, says so, and then waits for input that never comes.
WRITER = """
import sys
from storage import open_storage

def chunks():
    yield b"x" * 300_000
    print("half", flush=True)
    sys.stdin.readline()

open_storage(sys.argv[1]).put_stream("jobs/a/model.safetensors", chunks())
"""

FULL_DISK = """
import sys
from pathlib import Path
from squeeze.errors import DiskFull
from storage import open_storage

storage = open_storage(f"file://{sys.argv[1]}/storage")
storage.put_stream("small", [b"x" * 1000])
try:
    storage.put_stream("large", (b"x" * 100_000 for _ in range(100)))
except DiskFull:
    pass
else:
    raise SystemExit("a disk of 1 MB took 10 MB")
assert list(storage.list()) == ["small"]
assert list(Path(sys.argv[1], "storage/partial").iterdir()) == []
try:
    storage.fetch("small", Path(sys.argv[1]) / "fetched")
    Path(sys.argv[1], "filler").write_bytes(b"x" * 2_000_000)
except OSError:
    pass
try:
    storage.fetch("small", Path(sys.argv[1]) / "fetched-2")
except DiskFull:
    pass
else:
    raise SystemExit("a full disk took another file")
"""

PEAK = """
import resource, sys
from pathlib import Path
from storage import open_storage

storage = open_storage(sys.argv[1])
size = int(sys.argv[2])
chunk = bytes(65536)
storage.put_stream("warm", [chunk])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
storage.put_stream("large", (chunk for _ in range(size // len(chunk))), max_bytes=size)
storage.fetch("large", Path(sys.argv[3]))
storage.put_file("again", Path(sys.argv[3]))
assert storage.size("again") == size
assert sum(map(len, storage.read("again"))) == size
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.fixture
def half_written(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of a put."""
    command = [sys.executable, "-c", WRITER, f"file://{tmp_path}/storage"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        yield process
        process.kill()


def unfinished(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "storage" / "partial").iterdir())


def test_a_killed_writer_leaves_no_object_and_its_rest_is_swept_at_the_next_open(
    tmp_path: Path, half_written: subprocess.Popen[str]
) -> None:
    half_written.send_signal(signal.SIGKILL)
    half_written.wait()
    assert len(unfinished(tmp_path)) == 1
    storage = open_storage(f"file://{tmp_path}/storage")
    assert list(storage.list()) == []
    assert unfinished(tmp_path) == []


def test_a_sweep_leaves_alone_what_another_process_is_writing(
    tmp_path: Path, half_written: subprocess.Popen[str]
) -> None:
    storage = open_storage(f"file://{tmp_path}/storage")
    assert len(unfinished(tmp_path)) == 1
    assert not storage.exists("jobs/a/model.safetensors")
    half_written.communicate("go on\n")
    assert half_written.returncode == 0
    assert storage.size("jobs/a/model.safetensors") == 300_000
    assert unfinished(tmp_path) == []


def test_a_full_disk_is_told_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    script = f'mount -t tmpfs -o size=1m none "{tmp_path}" && exec "{sys.executable}" -c "$0" "{tmp_path}"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*command, "pass"], check=False, capture_output=True).returncode
    ):
        pytest.skip("a small disk of our own needs unshare(1) and user namespaces")
    done = subprocess.run([*command, FULL_DISK], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_device_without_space_is_disk_full(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    from storage.files import disk_faults

    with pytest.raises(DiskFull), disk_faults(), open("/dev/full", "wb", buffering=0) as device:  # noqa: PTH123
        device.write(b"x")


def test_memory_stays_bounded_however_large_the_object(tmp_path: Path) -> None:
    url, size = f"file://{tmp_path}/storage", 200 << 20
    command = [sys.executable, "-c", PEAK, url, str(size), str(tmp_path / "fetched")]
    grown_kib = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown_kib * 1024 < size / 4


def test_an_object_can_be_read_in_place(tmp_path: Path) -> None:
    storage = open_storage(f"file://{tmp_path}/storage")
    storage.put_stream("jobs/a/1/x", [b"content"])
    path = storage.local_path("jobs/a/1/x")
    assert path is not None
    assert path.read_bytes() == b"content"
    assert storage.presign("jobs/a/1/x", expires_seconds=60, filename="x") is None


def test_empty_folders_go_with_their_last_object(tmp_path: Path) -> None:
    storage = open_storage(f"file://{tmp_path}/storage")
    storage.put_stream("jobs/a/1/x", [b"x"])
    storage.put_stream("jobs/b/1/x", [b"x"])
    storage.delete_prefix("jobs/a")
    assert [path.name for path in (tmp_path / "storage" / "objects" / "jobs").iterdir()] == ["b"]
    storage.delete("jobs/b/1/x")
    assert list((tmp_path / "storage" / "objects").iterdir()) == []


def test_writers_and_deleters_of_one_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    storage = open_storage(f"file://{tmp_path}/storage")

    def write_and_delete(number: int) -> None:
        key = f"jobs/a/b/c/{number}"
        for _ in range(30):
            storage.put_stream(key, [b"x"])
            assert storage.size(key) == 1
            storage.delete(key)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write_and_delete, range(8)))
    assert list(storage.list()) == []


def test_an_object_that_goes_while_it_is_read_is_still_read_whole(tmp_path: Path) -> None:
    storage = open_storage(f"file://{tmp_path}/storage")
    storage.put_stream("object", [bytes(3 << 20)])
    chunks = storage.read("object")
    first = next(chunks)
    storage.delete("object")
    assert len(first) + sum(map(len, chunks)) == 3 << 20


@pytest.mark.parametrize("key", ["a/b", "a/b/c/d"])
def test_a_key_above_or_under_an_object_is_refused(tmp_path: Path, key: str) -> None:
    storage = open_storage(f"file://{tmp_path}/storage")
    storage.put_stream("a/b/c", [b"x"])
    with pytest.raises(InvalidKeyError, match="above or under"):
        storage.put_stream(key, [b"y"])


def test_a_directory_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageUnavailable):
        open_storage(f"file://{tmp_path}/file/storage")


def test_a_directory_that_went_away_fails_its_check(tmp_path: Path) -> None:
    storage = open_storage(f"file://{tmp_path}/storage")
    shutil.rmtree(tmp_path / "storage")
    with pytest.raises(StorageUnavailable):
        storage.check()


@pytest.mark.parametrize(
    "url", ["ftp://host/x", "file://host/x", "file://relative", "file:///x?y=z", "/plain/path", ""]
)
def test_a_url_of_another_kind_is_refused_with_what_would_do(url: str) -> None:
    with pytest.raises(SpecInvalid, match="file://"):
        open_storage(url)


def test_spaces_and_percents_in_the_url_are_decoded(tmp_path: Path) -> None:
    storage = open_storage((tmp_path / "a b%c").as_uri())
    storage.put_stream("x", [b"x"])
    assert (tmp_path / "a b%c" / "objects" / "x").read_bytes() == b"x"


def test_new_files_follow_the_umask(tmp_path: Path) -> None:
    storage = open_storage(f"file://{tmp_path}/storage")
    mask = os.umask(0o027)
    try:
        storage.put_stream("x", [b"x"])
    finally:
        os.umask(mask)
    path = storage.local_path("x")
    assert path is not None
    assert path.stat().st_mode & 0o777 == 0o640
    assert path.stat().st_mtime <= time.time() + 1
