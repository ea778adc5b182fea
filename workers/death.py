"""Why a child died, in words and with a code, from its exit status and what the machine's memory went through."""

import os
import signal
from pathlib import Path

from squeeze.errors import CompressionBug, OutOfMemoryHost, ProcessKilled, SqueezeError
from workers.scrub import scrub

_CGROUPS = Path("/sys/fs/cgroup")
_NEARLY_NOTHING = 0.02  # of the machine's memory
_TAIL_BYTES = 16_384
_TAIL_LINES = 8


def explain(
    status: int, *, out_of_memory: bool, peak_bytes: int, errors: Path, known_secrets: tuple[str, ...]
) -> SqueezeError:
    """The error of a child that ended without saying why.

    status: as `os.waitpid` gives it. errors: the file that holds its error output.
    """
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGKILL and out_of_memory:
            return OutOfMemoryHost(
                f"The host ran out of memory and the job's process was killed; it had used {_gib(peak_bytes)}. Take "
                "fewer `data.samples` or a shorter `data.sequence_length`, or give the worker more memory."
            )
        return ProcessKilled(
            f"The job's process was killed by signal {number} ({signal.Signals(number).name}), which did not come "
            "from this service. It is tried again from where it stopped, a few times at most."
        )
    tail = scrub(_tail(errors), known_secrets)
    return CompressionBug(
        f"The job's process ended with status {os.WEXITSTATUS(status)} and no word. Please report this with what it "
        f"printed last: {tail or 'nothing'}"
    )


class MemoryWatch:
    """Tells whether the machine, or the container, ran out of memory since this was made."""

    def __init__(self) -> None:
        self._killed_before = oom_kills()
        self._was_low = False

    def look(self) -> None:
        """To be called about once a second: where no counter can be read, the last look must tell."""
        total, available = _memory()
        self._was_low = available < _NEARLY_NOTHING * total

    def ran_out(self) -> bool:
        return oom_kills() > self._killed_before or self._was_low


def oom_kills() -> int:
    """How many processes of our control group, or else of the machine, the kernel killed for want of memory so far."""
    for path in _counters():
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


def _counters() -> list[Path]:
    """Files that may hold the count, the narrowest first: control groups v2, v1, the machine."""
    candidates = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            candidates += [_CGROUPS / path.lstrip("/") / "memory.events", _CGROUPS / "memory.events"]
        elif "memory" in controllers.split(","):
            memory = _CGROUPS / "memory"
            candidates += [memory / path.lstrip("/") / "memory.oom_control", memory / "memory.oom_control"]
    return [*candidates, Path("/proc/vmstat")]


def _memory() -> tuple[int, int]:
    """(total, available) of the machine, in KiB."""
    held = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(held["MemTotal"].split()[0]), int(held["MemAvailable"].split()[0])


def _tail(errors: Path) -> str:
    try:
        with errors.open("rb") as file:
            file.seek(max(0, errors.stat().st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return " | ".join(line.strip() for line in text.splitlines()[-_TAIL_LINES:] if line.strip())


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes else "an unknown amount"
