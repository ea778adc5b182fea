"""`python -m api` as a process: it says what is wrong, ends in time, and keeps secrets out of its log."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.api.serving import SPEC

PATIENCE_SECONDS = 40.0


def _environ(tmp_path: Path, **changes: str) -> dict[str, str]:
    return {**os.environ, "SQUEEZE_DATA": str(tmp_path), "SQUEEZE_PORT": str(_free_port()), **changes}


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def _process(environ: dict[str, str], log: Path) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-m", "api"], env=environ, stderr=file, stdout=file)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{environ['SQUEEZE_PORT']}", timeout=PATIENCE_SECONDS) as client:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while True:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                try:
                    client.get("/healthz")
                    break
                except httpx.ConnectError:
                    time.sleep(0.02)
            yield process, client
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("form", ["json", "console"])
def test_secrets_never_reach_the_log_and_every_line_has_its_request(tmp_path: Path, form: str) -> None:
    log = tmp_path / "log"
    environ = _environ(tmp_path, SQUEEZE_LOG_FORMAT=form)
    made = subprocess.run(
        [sys.executable, "-m", "jobs", "keys", "create", "--name", "test"],
        env=environ, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    key = made.stdout.strip()
    with _process(environ, log) as (process, client):
        header = {"Authorization": f"Bearer {key}", "X-Request-Id": "mine-7"}
        assert client.post("/v1/jobs?token=hf_secret", json=SPEC, headers=header).status_code == 202
        assert client.get("/v1/jobs", headers={"Authorization": "Bearer sq-guess"}).status_code == 401
        (tmp_path / "squeeze.db").unlink()  # whatever breaks then is logged with its traceback
        (tmp_path / "squeeze.db").mkdir()
        broken = client.get("/v1/jobs", headers=header)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) in {0, -signal.SIGTERM}
    assert broken.status_code in {200, 500, 503}
    text = log.read_text()
    assert key not in text
    assert "sq-guess" not in text
    assert "hf_secret" not in text
    if form == "json":
        lines = [json.loads(line) for line in text.splitlines()]
        submitted = next(line for line in lines if line["event"] == "job_submitted")
        assert submitted["request_id"] == "mine-7"
        assert re.match(r"job-[0-9a-z]{26}$", submitted["job_id"])


def test_a_stream_of_events_does_not_hold_up_the_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with _process(_environ(tmp_path), log) as (process, client):
        job_id = client.post("/v1/jobs", json=SPEC).json()["id"]
        begun, ended = threading.Event(), threading.Event()

        def follow() -> None:
            accept = {"Accept": "text/event-stream"}
            with httpx.stream(
                "GET", client.base_url.join(f"/v1/jobs/{job_id}/events"), headers=accept, timeout=60
            ) as answer:
                for line in answer.iter_lines():
                    if line:
                        begun.set()
            ended.set()  # an answer that was cut off would have raised

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        assert begun.wait(PATIENCE_SECONDS)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) in {0, -signal.SIGTERM}
        assert ended.wait(PATIENCE_SECONDS), log.read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"SQUEEZE_HOST": "0.0.0.0"}, "python -m jobs keys create"),
        ({"SQUEEZE_PORT": "many"}, "SQUEEZE_PORT"),
        ({"SQUEEZE_STORAGE_URL": "ftp://x"}, "SQUEEZE_STORAGE_URL"),
    ],
)
def test_what_is_wrong_at_start_is_said_in_one_line(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "api"],
        env=_environ(tmp_path, **changes), capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False,
    )  # fmt: skip
    assert ran.returncode == 2
    assert words in ran.stderr
    assert "Traceback" not in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
