"""Process groups are ended whole, never mistaken for another, and remembered on disk."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from workers.groups import Group, Ledger, NameTaken, send, start_time

from .conftest import alive, eventually

SLEEP = "import time; time.sleep(1000)"


@pytest.fixture
def process() -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, "-c", SLEEP], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def group_of(process: "subprocess.Popen[bytes]") -> Group:
    started = start_time(process.pid)
    assert started is not None
    return Group(process.pid, started)


def test_a_signal_reaches_the_group(process: "subprocess.Popen[bytes]") -> None:
    assert send(group_of(process), signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL


def test_a_process_that_took_over_the_number_is_left_alone(process: "subprocess.Popen[bytes]") -> None:
    group = group_of(process)
    assert not send(Group(group.pid, group.started - 1), signal.SIGKILL)
    assert process.poll() is None


def test_a_group_whose_leader_is_gone_is_still_reached(tmp_path: Path) -> None:
    left = tmp_path / "left"
    leader = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {SLEEP!r}]);"
            f"open({str(left)!r}, 'w').write(str(p.pid)); sys.stdin.read()",
        ],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    pid = int(eventually(lambda: left.is_file() and left.read_text(), "the grandchild runs"))
    group = group_of(leader)
    leader.communicate()
    assert alive(pid)
    assert send(group, signal.SIGKILL)
    eventually(lambda: not alive(pid), "the grandchild is gone")


def test_a_ledger_ends_what_its_last_bearer_left_running(tmp_path: Path, process: "subprocess.Popen[bytes]") -> None:
    ledger = Ledger(tmp_path, "one")
    ledger.add(group_of(process))
    ledger.close()
    Ledger(tmp_path, "other").close()
    assert process.poll() is None
    Ledger(tmp_path, "one").close()
    assert process.wait(10) == -signal.SIGKILL
    assert json.loads((tmp_path / "one.json").read_text())["groups"] == []


def test_a_ledger_of_another_boot_or_container_ends_nothing(tmp_path: Path, process: "subprocess.Popen[bytes]") -> None:
    group = group_of(process)
    held = {"where": ["another boot", "pid:[1]"], "groups": [[group.pid, group.started]]}
    (tmp_path / "one.json").write_text(json.dumps(held))
    Ledger(tmp_path, "one").close()
    assert process.poll() is None


def test_a_ledger_cut_short_by_a_power_failure_ends_nothing(tmp_path: Path, process: "subprocess.Popen[bytes]") -> None:
    ledger = Ledger(tmp_path, "one")
    ledger.add(group_of(process))
    ledger.close()
    kept = tmp_path / "one.json"
    kept.write_text(kept.read_text()[:-3])
    Ledger(tmp_path, "one").close()
    assert process.poll() is None


def test_two_living_workers_can_not_have_one_name(tmp_path: Path) -> None:
    first = Ledger(tmp_path, "one")
    with pytest.raises(NameTaken):
        Ledger(tmp_path, "one")
    first.close()
    Ledger(tmp_path, "one").close()


def test_a_process_that_is_not_there_has_no_start() -> None:
    child = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ)
    os.waitpid(child, 0)
    assert start_time(child) is None
