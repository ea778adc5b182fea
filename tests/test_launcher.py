"""`scripts/serve.py` with its real parts: broker, API and worker as processes of their own."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import serve
from squeeze import Client
from tests.launching import PATIENCE_SECONDS, ROOT, launched, ready, settings
from tests.servers import wait_until


@pytest.fixture
def data() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="squeeze-") as directory:  # short: a socket's path has 107 bytes at most
        yield Path(directory)


def test_the_service_starts_whole_mends_itself_and_leaves_nothing_behind(data: Path, tmp_path: Path) -> None:
    with launched(data, tmp_path / "first.log", HF_ENDPOINT="http://127.0.0.1:1") as first:
        url = ready(first, tmp_path / "first.log")
        parts = parts_of(first.pid)
        assert {"broker", "api", "worker"} == parts.keys()
        with Client(url) as client:
            job = client.jobs.create(model="org/name", steps=[{"kind": "quantize", "method": "rtn"}])
            client.jobs.cancel(job.id)

        second = subprocess.run(
            [sys.executable, "scripts/serve.py"],
            cwd=ROOT,
            env=settings(data, {}),
            check=False,
            capture_output=True,
            text=True,
        )
        assert second.returncode == 2
        assert f"already runs on {data} (process {first.pid})" in second.stderr

        os.kill(parts["api"], signal.SIGKILL)
        with Client(url) as client:
            assert client.jobs.wait(job.id, timeout_seconds=PATIENCE_SECONDS).id == job.id  # outlives the restart
        wait_until(lambda: parts_of(first.pid).get("api", parts["api"]) != parts["api"])

        everything = descendants(first.pid)
        first.kill()
        first.wait()
        wait_until(lambda: not any(alive(pid) for pid in everything))

    with launched(data, tmp_path / "again.log") as again:
        with Client(ready(again, tmp_path / "again.log")) as client:
            assert [one.id for one in client.jobs.list()] == [job.id]
        everything = descendants(again.pid)
        assert everything
        again.terminate()
        assert again.wait(PATIENCE_SECONDS) == 0
        assert not any(alive(pid) for pid in everything)
    assert "The same command goes on from here." in (tmp_path / "again.log").read_text()


def test_a_port_that_is_taken_is_refused_with_advice(data: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with launched(data, tmp_path / "log", SQUEEZE_PORT=str(port)) as process:
            assert process.wait(PATIENCE_SECONDS) == 2
    assert f"Can't listen on 127.0.0.1 port {port}" in (tmp_path / "log").read_text()


def test_a_wrong_setting_is_named_and_nothing_is_started(data: Path, tmp_path: Path) -> None:
    with launched(data, tmp_path / "log", SQUEEZE_PORT="many") as process:
        assert process.wait(PATIENCE_SECONDS) == 2
    assert "SQUEEZE_PORT" in (tmp_path / "log").read_text()


def test_a_part_that_never_comes_up_ends_the_start_and_the_other_parts(data: Path, tmp_path: Path) -> None:
    with launched(data, tmp_path / "log", SQUEEZE_HOST="0.0.0.0") as process:
        assert process.wait(PATIENCE_SECONDS) == 1
    told = (tmp_path / "log").read_text()
    assert "no API key exists" in told
    assert "The api does not start (see above)." in told


def test_there_is_one_worker_for_each_gpu_that_may_be_used_or_one_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert serve.devices("cuda:1", {}) == ["cuda:1"]
    assert serve.devices("auto", {"CUDA_VISIBLE_DEVICES": "0,3"}) == ["cuda:0", "cuda:1"]
    assert serve.devices("auto", {"CUDA_VISIBLE_DEVICES": ""}) == ["cpu"]
    assert serve.devices("auto", {"CUDA_VISIBLE_DEVICES": "-1"}) == ["cpu"]
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA H200 (UUID: GPU-2)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert serve.devices("auto", {}) == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("::1", "http://[::1]:80"),
        ("example.org", "http://example.org:80"),
    ],
)
def test_the_address_is_one_that_this_machine_reaches(host: str, reached: str) -> None:
    assert serve.address(host, 80) == reached


def parts_of(launcher: int) -> dict[str, int]:
    """Process numbers by what the process is."""
    signs = {"api": " -m api ", "worker": " -m workers ", "broker": "valkey-server"}
    lines = {pid: command_line(pid).replace("\0", " ") for pid in children(launcher)}
    return {name: pid for name, sign in signs.items() for pid, line in lines.items() if sign in line}


def descendants(pid: int) -> set[int]:
    below = children(pid)
    return below.union(*(descendants(child) for child in below)) if below else set()


def children(parent: int) -> set[int]:
    return {pid for pid in processes() if parent_of(pid) == parent}


def processes() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())


def parent_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def alive(pid: int) -> bool:
    """Neither gone nor a zombie that waits to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
