"""The service's parts as processes that `scripts/chaos.py` knows, kills and starts again."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TETHER = ROOT / "scripts" / "tether.py"
LONGEST_AWAY_SECONDS = 1.5
STOP_SECONDS = 30.0
LONGEST_AIM_SECONDS = 8.0
AIMED_SHARE = 0.5
WORKERS = ("one", "two")


@dataclass
class Part:
    """A program of the service. Its process is tethered to ours, and leads a group of its own."""

    name: str
    arguments: list[str]
    environment: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    start_at: float = 0.0
    refused: int | None = None

    def tend(self, dice: random.Random) -> None:
        """Starts the part where it does not run, a moment after its death."""
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return
            if code != -signal.SIGKILL:
                self.refused = code  # nobody asked for that
            self.process = None
            self.start_at = time.monotonic() + dice.uniform(0.0, LONGEST_AWAY_SECONDS)
        if time.monotonic() >= self.start_at:
            self.start()

    def start(self) -> None:
        command = [sys.executable, "-I", "-S", str(TETHER), str(os.getpid()), sys.executable, *self.arguments]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self) -> int:
        """In good order; its exit status."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        process.terminate()
        try:
            return process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


class Parts:
    """Broker, API and two workers on one data directory, and what may be killed of them."""

    def __init__(self, environment: Mapping[str, str], logs: Path) -> None:
        def part(name: str, *arguments: str) -> Part:
            return Part(name, [*arguments], environment, logs / f"{name}.log")

        self.broker = part("broker", "-m", "jobs", "broker")
        self.api = part("api", "-m", "api")
        worker = ("-m", "workers", "--device", "cpu", "--entry", "scripts.chaos_child:run", "--name")
        self.workers = [part(f"worker-{name}", *worker, name) for name in WORKERS]
        self.all = [self.broker, self.api, *self.workers]

    def victims(self) -> dict[str, list[int]]:
        """Process ids by kind. A child forks off what certifies its result; a fork server forks children."""
        workers = _running(self.workers)
        servers = [pid for worker in workers for pid in children(worker) if "workers.forkserver" in command_of(pid)]
        jobs = [pid for server in servers for pid in children(server)]
        return {
            "child": jobs,
            "certifier": [pid for job in jobs for pid in children(job)],
            "fork server": servers,
            "worker": workers,
            "API": _running([self.api]),
            "broker": _running([self.broker]),
        }

    def stop(self) -> None:
        for parts in (self.workers, [self.api], [self.broker]):
            for part in parts:
                part.stop()


@dataclass
class Killer:
    """Kills something now and then. aimed: how many of the kills came while a result was being stored."""

    parts: Parts
    dice: random.Random
    storage: Path
    pause_seconds: float
    kills: Counter[str] = field(default_factory=Counter)
    aimed: int = 0
    next_at: float = 0.0

    def act(self, tend: Callable[[], None]) -> None:
        """Where the time has come. tend: called while it takes aim."""
        if time.monotonic() < self.next_at:
            return
        if self.next_at:
            target = self._aim(tend) if self.dice.random() < AIMED_SHARE else self._pick()
            if target is not None:
                self._kill(*target)
        self.next_at = time.monotonic() + self.dice.uniform(0.2, 1.8) * self.pause_seconds

    def kill_api(self) -> None:
        for pid in self.parts.victims()["API"]:
            self._kill("API", pid)

    def _pick(self) -> tuple[str, int] | None:
        """Any kind is as likely as another; None where nothing runs at all."""
        victims = {kind: pids for kind, pids in self.parts.victims().items() if pids}
        if not victims:
            return None
        kind = self.dice.choice([*victims])
        return kind, self.dice.choice(victims[kind])

    def _aim(self, tend: Callable[[], None]) -> tuple[str, int] | None:
        """At a moment that chance alone rarely hits: while a result goes into the storage, or just after."""
        before = self._stored()
        until = time.monotonic() + LONGEST_AIM_SECONDS
        while time.monotonic() < until:
            if fresh := sorted(self._stored() - before):
                time.sleep(self.dice.uniform(0.0, 0.1))
                line = self._line(fresh[0].parent.name)
                if line:
                    self.aimed += 1
                    return self.dice.choice(line)
                break
            tend()
            time.sleep(0.005)
        return self._pick()

    def _line(self, job_id: str) -> list[tuple[str, int]]:
        """The child of a job with the fork server and the worker above it; empty where it has ended."""
        for child in self.parts.victims()["child"]:
            server = parent(child)
            worker = parent(server) if server else None
            if server and worker and working_directory(child).name == job_id:
                return [("child", child), ("fork server", server), ("worker", worker)]
        return []

    def _stored(self) -> set[Path]:
        """Attempts of which something lies in the storage."""
        return {*self.storage.glob("objects/jobs/*/*")}

    def _kill(self, kind: str, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.kills[kind] += 1


def children(pid: int) -> list[int]:
    """Of all threads of a process; none where it is gone."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def working_directory(pid: int) -> Path:
    try:
        return Path(f"/proc/{pid}/cwd").readlink()
    except (FileNotFoundError, ProcessLookupError):
        return Path()


def belonging_to(data: Path) -> list[int]:
    """Living processes of the service on a data directory, by their environment or where they work."""
    found = []
    mark = f"SQUEEZE_DATA={data}\0".encode()
    for path in Path("/proc").glob("[0-9]*"):
        pid = int(path.name)
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if pid != os.getpid() and (
                mark in (path / "environ").read_bytes() or working_directory(pid).is_relative_to(data)
            ):
                found.append(pid)
    return found


def _running(parts: list[Part]) -> list[int]:
    return [part.process.pid for part in parts if part.process is not None and part.process.poll() is None]
