"""The worker's side of the fork server: starts it, asks for children, hears of their ends."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import structlog

from workers.channel import Channel
from workers.forkserver import DEFAULT_ENTRY, MESSAGE_BYTES
from workers.groups import Group, Ledger, start_time

log = structlog.get_logger(__name__)

_ROOT = Path(__file__).resolve().parents[1]


class ServerGone(RuntimeError):
    """The fork server died."""


@dataclass(frozen=True)
class Forked:
    token: str
    group: Group


@dataclass(frozen=True)
class Exited:
    """How a child ended. status: as `os.waitpid` gives it."""

    token: str
    status: int
    cpu_seconds: float
    peak_bytes: int


class ForkServer:
    """One running fork server, started again when it has died. Used from one thread at a time."""

    def __init__(self, ledger: Ledger, entry: str = DEFAULT_ENTRY) -> None:
        self._ledger = ledger
        self._entry = entry
        self._process: subprocess.Popen[bytes] | None = None
        self._group: Group | None = None
        self._socket: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Starts the server where none runs; returns at once, its imports take seconds."""
        if self._process is not None and self._process.poll() is None and self._socket is not None:
            return
        self.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "workers.forkserver", "--socket", str(theirs.fileno()), "--entry", self._entry],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                # Asked the usual way, whether there is a GPU, CUDA would start in the server and fail in its forks.
                # numpy's OpenBLAS, which no job uses, would otherwise start its threads when it is imported.
                env={
                    **os.environ,
                    "PYTHONPATH": path,
                    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                },
            )
        self._socket = ours
        self._group = Group(self._process.pid, start_time(self._process.pid) or 0)
        self._ledger.add(self._group)

    def fork(self, token: str, errors: TextIO) -> Channel:
        """Asks for a child whose error output goes to a file; `Forked` and `Exited` of the same token follow."""
        ours, theirs = socket.socketpair()
        with theirs:
            for server in (self._running(), None):
                try:
                    socket.send_fds(
                        server or self._running(),
                        [json.dumps({"fork": token}).encode()],
                        [theirs.fileno(), errors.fileno()],
                    )
                    return Channel(ours)
                except (BrokenPipeError, ConnectionResetError):
                    self.close()  # it has died since the last job: a new one, once
        ours.close()
        raise ServerGone("the fork server dies as soon as it is started")

    def fileno(self) -> int:
        return self._live().fileno()

    def receive(self) -> Iterator[Forked | Exited]:
        """What the server has said, without waiting; ServerGone where it is dead."""
        while True:
            try:
                message = self._live().recv(MESSAGE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionResetError:
                message = b""
            if not message:
                raise self._gone()
            told: dict[str, Any] = json.loads(message)
            if "forked" in told:
                yield Forked(told["forked"], Group(told["pid"], told["started"]))
            elif "exited" in told:
                yield Exited(told["exited"], told["status"], told["cpu_seconds"], told["peak_bytes"])
            else:
                log.info("fork server is warm", seconds=round(told["seconds"], 2), threads=told["threads"])

    def close(self) -> None:
        """Ends the server and with it every child."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._end(self._process)
            self._process = None
        if self._group is not None:
            self._ledger.remove(self._group)
            self._group = None

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        try:
            process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:  # it still imports, or hangs
            process.kill()
            process.wait()

    def _running(self) -> socket.socket:
        self.start()
        return self._live()

    def _live(self) -> socket.socket:
        if self._socket is None:
            raise ServerGone("the fork server has not been started")
        return self._socket

    def _gone(self) -> ServerGone:
        process = self._process
        self.close()
        return ServerGone(f"the fork server died (exit status {process.returncode if process else None})")
