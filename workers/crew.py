"""The further processes of a job that several GPUs share: forked by its first one, and watched by it.

They are forked before the first one has run anything of torch's, live in its process group, and die with it. When one
of them fails, its word becomes the job's; when one dies without a word, the first one dies like it, so that whoever
watches over the job finds the same end as of a job of one process.
"""

import os
import selectors
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from workers.channel import Channel
from workers.groups import UNCAUGHT_STATUS, die_with

BLAME_SECONDS = 10.0

Serve = Callable[[int, Channel], int]


@dataclass(frozen=True)
class _Member:
    pid: int
    channel: Channel


class Crew:
    """So many further processes, ranks 1 and up.

    serve: what one does; is given its rank and a channel for its last word, and returns its exit status.
    supervisor: where the word of one that fails goes.
    """

    def __init__(self, count: int, serve: Serve, supervisor: Channel) -> None:
        self._serve, self._supervisor = serve, supervisor
        self._members: list[_Member] = []
        for rank in range(1, count + 1):
            self._members.append(self._forked(rank))
        self._watching = threading.Thread(target=self._watch, name="crew", daemon=True)
        if self._members:
            self._watching.start()

    def blame(self) -> None:
        """To be called when a process of the team ended: where it is one of ours, its end is about to become ours."""
        if self._members:
            self._watching.join(BLAME_SECONDS)

    def _forked(self, rank: int) -> _Member:
        ours, theirs = socket.socketpair()
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            ours.close()
            self._become(rank, parent, Channel(theirs))
        theirs.close()
        return _Member(pid, Channel(ours))

    def _become(self, rank: int, parent: int, channel: Channel) -> NoReturn:
        """The forked process's whole life."""
        status = UNCAUGHT_STATUS
        try:
            die_with(parent)
            self._supervisor.close()
            for member in self._members:
                member.channel.close()
            status = self._serve(rank, channel)
        except BaseException:  # noqa: BLE001 - nothing of the first process's may run here, whatever was raised
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _watch(self) -> None:
        """Until all have ended well, or one has not, which ends this process too."""
        with selectors.DefaultSelector() as selector:
            for member in self._members:
                selector.register(member.channel, selectors.EVENT_READ, member)
            while selector.get_map():
                for key, _ in selector.select():
                    member = key.data
                    for message in member.channel.drain():
                        self._supervisor.send(message)
                        os._exit(1)
                    if member.channel.closed:
                        selector.unregister(member.channel)
                        _end_like(os.waitpid(member.pid, 0)[1])


def _end_like(status: int) -> None:
    """Ends this process as another has ended, unless that was well. status: as `os.waitpid` gives it."""
    if os.WIFSIGNALED(status):
        os.kill(os.getpid(), os.WTERMSIG(status))
        signal.pause()
    if os.WEXITSTATUS(status):
        os._exit(os.WEXITSTATUS(status))
