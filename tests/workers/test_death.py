"""Why a child died, from its exit status, the kernel's counters and its last words."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from squeeze.errors import SqueezeError
from workers.death import MemoryWatch, explain, oom_kills


def status_of(code: str) -> int:
    """As `os.waitpid` gives it, of a real process."""
    pid = subprocess.Popen([sys.executable, "-c", code])
    _, status = os.waitpid(pid.pid, 0)
    pid.returncode = 0
    return status


def died(code: str, errors: Path, *, out_of_memory: bool = False, known: tuple[str, ...] = ()) -> SqueezeError:
    return explain(status_of(code), out_of_memory=out_of_memory, peak_bytes=3 << 30, errors=errors, known_secrets=known)


def test_sigkill_while_memory_ran_out_is_the_hosts_memory_and_says_what_to_lower(tmp_path: Path) -> None:
    error = died("import os; os.kill(os.getpid(), 9)", tmp_path / "none", out_of_memory=True)
    assert (error.code, error.retryable) == ("out_of_memory_host", False)
    assert "3.0 GiB" in error.message
    assert "data.samples" in error.message


def test_sigkill_otherwise_is_a_killed_process_that_is_tried_again(tmp_path: Path) -> None:
    error = died("import os; os.kill(os.getpid(), 9)", tmp_path / "none")
    assert (error.code, error.retryable, "SIGKILL" in error.message) == ("process_killed", True, True)


def test_a_segmentation_fault_is_told_by_its_name_even_while_memory_is_short(tmp_path: Path) -> None:
    error = died(f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})", tmp_path / "none", out_of_memory=True)
    assert (error.code, "SIGSEGV" in error.message) == ("process_killed", True)


def test_an_end_without_a_word_is_told_with_the_last_lines_and_without_secrets(tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    errors.write_text("early\n" * 10_000 + "Traceback\nRuntimeError: password is hunter2hunter2\n")
    error = died("raise SystemExit(7)", errors, known=("hunter2hunter2",))
    assert error.code == "compression_bug"
    assert "status 7" in error.message
    assert "password is [hidden]" in error.message
    assert len(error.message) < 1000


def test_a_child_that_printed_nothing_is_told_so(tmp_path: Path) -> None:
    assert "printed last: nothing" in died("raise SystemExit(7)", tmp_path / "none").message


def test_memory_has_not_run_out_where_nothing_was_killed() -> None:
    watch = MemoryWatch()
    watch.look()
    assert not watch.ran_out()


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists(),
    reason="needs root and control groups of version 1 that may be changed",
)
def test_the_kernels_killer_is_seen_in_the_counter_of_the_workers_control_group() -> None:
    inner = (
        "import os, subprocess, sys\n"
        "from workers.death import MemoryWatch\n"
        "watch = MemoryWatch()\n"
        "child = subprocess.run([sys.executable, '-c', 'x = bytearray(512 << 20)'])\n"
        "sys.exit(0 if child.returncode == -9 and watch.ran_out() else 1)\n"
    )
    group = _own_group() / f"squeeze-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(128 << 20))
        process = subprocess.Popen(
            ["/bin/sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$0" -c "$1"', sys.executable, inner]
        )
        assert process.wait(60) == 0
    finally:
        group.rmdir()


def test_the_counter_of_killed_processes_can_be_read() -> None:
    assert oom_kills() >= 0


def _own_group() -> Path:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            whole = Path("/sys/fs/cgroup/memory") / path.lstrip("/")
            return whole if whole.is_dir() else Path("/sys/fs/cgroup/memory")
    raise AssertionError("no control group of version 1")
