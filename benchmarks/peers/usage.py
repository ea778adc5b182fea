"""What a peer's run took: imported by every script here, in whichever environment it runs."""

import json
import resource
import time
from pathlib import Path


class Usage:
    """Counts from where it is made: right after the imports, before any weight is loaded."""

    def __init__(self) -> None:
        self._idle_bytes = _status_bytes("VmRSS")
        self._began, self._cpu_began = time.monotonic(), _cpu_seconds()
        self.seconds = self.cpu_seconds = 0.0

    def start(self) -> None:
        """Time before this does not count: a peer may load its model first."""
        self._began, self._cpu_began = time.monotonic(), _cpu_seconds()

    def stop(self) -> None:
        """Time after this does not count; memory does."""
        self.seconds, self.cpu_seconds = time.monotonic() - self._began, _cpu_seconds() - self._cpu_began

    def report(self) -> None:
        """The last line that a script prints."""
        above = _status_bytes("VmHWM") - self._idle_bytes
        print(json.dumps({"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "bytes_above_idle": above}))


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
