"""Runs a command that must not outlive who started it: `python -I -S tether.py PARENT COMMAND…`.

Asks the kernel to kill this process when process PARENT ends, even by `kill -9`, then becomes the command. Linux keeps
that wish across exec; other systems have none, and there the command simply runs.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
        if os.getppid() != parent:  # it ended before the wish was heard
            sys.exit(1)
    os.execvp(command[0], command)  # noqa: S606 - what the launcher named


if __name__ == "__main__":
    main()
