"""One process at a time in a job's work directory.

A worker that stood still for longer than its lease has lost its job, but its child may still be at work when the next
attempt begins on the same machine. The later attempt ends the earlier one before it touches anything.
"""

import fcntl
import json
import os
import signal
from pathlib import Path
from typing import IO

from workers.groups import Group, send, start_time, where

LOCK = "lock"


def take(scratch: Path) -> IO[str]:
    """Holds the directory for as long as this process lives and the answer is kept; waits for the one before to end."""
    lock = (scratch / LOCK).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _end_holder(lock)
        fcntl.flock(lock, fcntl.LOCK_EX)
    lock.seek(0)
    lock.truncate()
    json.dump({"where": where(), "pid": os.getpid(), "started": start_time(os.getpid())}, lock)
    lock.flush()
    return lock


def _end_holder(lock: IO[str]) -> None:
    """Kills the attempt that holds the lock; one in another container can only be waited for."""
    lock.seek(0)
    try:
        held = json.load(lock)
    except ValueError:  # it has only just taken it
        return
    if held["where"] == where():
        send(Group(held["pid"], held["started"]), signal.SIGKILL)
