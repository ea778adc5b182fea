"""Process groups that outlive their makers: who they are, how to end them, and a ledger that a restarted worker reads.

A process id alone can be handed out again; with its start time, the boot and the process-id namespace it can't be
mistaken.
"""

import ctypes
import fcntl
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import structlog

UNCAUGHT_STATUS = 70  # of a forked process that ended by an exception which nobody took

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Group:
    """A process group by its leader: its process id and start time, in clock ticks since boot."""

    pid: int
    started: int


class NameTaken(RuntimeError):
    """Another living worker has this name."""


def start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(")")[2].split()[19])  # field 22; the name in brackets may hold anything


def send(group: Group, number: signal.Signals) -> bool:
    """Signals every process of the group; False where none is left or the number now belongs to somebody else.

    The kernel doesn't hand out a number as long as a group bears it, so a leader that is gone while its group lives
    is no danger; a leader with another start time is somebody else.
    """
    started = start_time(group.pid)
    if started is not None and started != group.started:
        return False
    try:
        os.killpg(group.pid, number)
    except ProcessLookupError:
        if started is None:
            return False
        try:
            os.kill(group.pid, number)  # forked, but not yet the leader of a group of its own
        except ProcessLookupError:
            return False
    return True


def die_with(parent: int) -> None:
    """Has the kernel kill this process when its parent ends, which may have happened already."""
    if _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the call
        os._exit(UNCAUGHT_STATUS)


def where() -> list[str]:
    """The boot and the namespace in which process ids mean something."""
    return [
        Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        str(Path("/proc/self/ns/pid").readlink()),
    ]


class Ledger:
    """The groups that a worker of one name has running, on disk. Held by one living worker at a time."""

    def __init__(self, folder: Path, name: str) -> None:
        """Takes the name (NameTaken where a living worker has it) and kills what the last bearer left running."""
        folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self._path = folder / f"{name}.json"
        self._lock = (folder / f"{name}.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise NameTaken(name) from error
        self._groups: list[Group] = []
        for group in self._read():
            if send(group, signal.SIGKILL):
                log.warning("leftover processes of this worker's last run were killed", process_group=group.pid)
        self._write()

    def add(self, group: Group) -> None:
        self._groups.append(group)
        self._write()

    def remove(self, group: Group) -> None:
        self._groups.remove(group)
        self._write()

    def close(self) -> None:
        self._lock.close()

    def _read(self) -> list[Group]:
        try:
            held = json.loads(self._path.read_text())
        except FileNotFoundError:
            return []
        except ValueError:  # half of a file: the machine lost power, so no process is left either
            log.warning("the ledger of process groups can't be read", path=str(self._path))
            return []
        if held["where"] != where():
            return []
        return [Group(pid, started) for pid, started in held["groups"]]

    def _write(self) -> None:
        fresh = self._path.with_suffix(".new")
        groups = [[group.pid, group.started] for group in self._groups]
        fresh.write_text(json.dumps({"where": where(), "groups": groups}))
        fresh.replace(self._path)
