"""A warm process that forks one child per job: `python -m workers.forkserver --socket FD --entry module:function`.

It imports torch, transformers and the pipeline once, so that a job starts in milliseconds, and never runs an
operation of theirs: no CUDA context and no OpenMP thread exists when it forks. One loop, one thread. It answers its
worker over a socket of whole messages; when the worker is gone, however it died, it kills every child's group and ends.
"""

import argparse
import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from workers.channel import Channel
from workers.groups import UNCAUGHT_STATUS, Group, die_with, send, start_time

Entry = Callable[[Channel], int]

MESSAGE_BYTES = 4096
DEFAULT_ENTRY = "workers.child:run"


@dataclass(frozen=True)
class _Child:
    token: str
    group: Group


class _Server:
    def __init__(self, worker: socket.socket, entry: Entry) -> None:
        self._worker = worker
        self._entry = entry
        self._children: dict[int, _Child] = {}  # by the descriptor that tells of the child's end
        self._selector = selectors.DefaultSelector()
        self._selector.register(worker, selectors.EVENT_READ)

    def tell(self, message: dict[str, object]) -> None:
        """To the worker."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the next read says so too, and ends us
            self._worker.send(json.dumps(message).encode())

    def serve(self) -> None:
        """Until the worker is gone."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is not self._worker:
                    self._reap(key.fd)
                elif not self._take():
                    for child in self._children.values():
                        send(child.group, signal.SIGKILL)
                    return

    def _take(self) -> bool:
        try:
            message, descriptors, _, _ = socket.recv_fds(self._worker, MESSAGE_BYTES, 2)
        except ConnectionResetError:
            return False
        if not message:
            return False
        token = json.loads(message)["fork"]
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._become(parent, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        group = Group(pid, start_time(pid) or 0)
        watch = os.pidfd_open(pid)
        self._children[watch] = _Child(token, group)
        self._selector.register(watch, selectors.EVENT_READ)
        self.tell({"forked": token, "pid": pid, "started": group.started})
        return True

    def _become(self, parent: int, channel: int, errors: int) -> NoReturn:
        """The child's whole life."""
        status = UNCAUGHT_STATUS
        try:
            os.setsid()
            die_with(parent)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            self._selector.close()
            self._worker.close()
            for watch in self._children:
                os.close(watch)
            nothing = os.open(os.devnull, os.O_RDONLY)
            for source, target in ((nothing, 0), (errors, 1), (errors, 2)):
                os.dup2(source, target)
            os.close(nothing)
            os.close(errors)
            os.set_inheritable(channel, False)
            _volunteer_for_the_oom_killer()
            status = self._entry(Channel(socket.socket(fileno=channel)))
        except BaseException:  # noqa: BLE001 - nothing of the server's may run in the child, whatever was raised
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _reap(self, watch: int) -> None:
        child = self._children.pop(watch)
        self._selector.unregister(watch)
        os.close(watch)
        # While the dead leader is not yet waited for, its number can't be anybody else's.
        send(child.group, signal.SIGKILL)
        _, status, usage = os.wait4(child.group.pid, 0)
        self.tell(
            {
                "exited": child.token,
                "status": status,
                "cpu_seconds": usage.ru_utime + usage.ru_stime,
                "peak_bytes": usage.ru_maxrss * 1024,
            }
        )


def _volunteer_for_the_oom_killer() -> None:
    """When memory runs out the job is to die, not the worker, the database or the broker."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--socket", type=int, required=True, help="descriptor of a SOCK_SEQPACKET to the worker")
    parser.add_argument("--entry", default=DEFAULT_ENTRY, help="module:function that a child runs")
    options = parser.parse_args()
    # The worker decides when we end. A terminal's or a supervisor's signal to all of the service's processes is its.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    began = time.monotonic()
    module, _, function = options.entry.partition(":")
    entry: Entry = getattr(importlib.import_module(module), function)
    gc.collect()
    gc.freeze()  # the collector would touch, hence copy, every page that a child shares with us
    worker = socket.socket(fileno=options.socket)
    threads = len(list(Path("/proc/self/task").iterdir()))
    server = _Server(worker, entry)
    server.tell({"ready": os.getpid(), "seconds": time.monotonic() - began, "threads": threads})
    server.serve()


if __name__ == "__main__":
    main()
