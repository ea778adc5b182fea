"""`scripts/serve.py` as a process of its own: the embedded default, started as `make serve` starts it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.servers import wait_until

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 60.0
READY = re.compile(r"Squeeze is ready at (http://\S+)")


@contextmanager
def launched(data: Path, log: Path, **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
    """The launcher on a data directory and a free port; killed at the end if it still runs, and its parts with it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "scripts/serve.py"],
            cwd=ROOT,
            env=settings(data, environment),
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def settings(data: Path, environment: Mapping[str, str]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SQUEEZE_")}
    return {**inherited, "SQUEEZE_DATA": str(data), "SQUEEZE_PORT": "0", "SQUEEZE_DEVICE": "cpu", **environment}


def ready(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """The address that the launcher prints."""
    wait_until(
        lambda: process.poll() is not None or READY.search(log.read_text()) is not None,
        within_seconds=PATIENCE_SECONDS,
    )
    found = READY.search(log.read_text())
    assert found is not None, log.read_text()
    return found.group(1)
