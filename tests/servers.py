"""Real servers for the tests: PostgreSQL and Redis from the system's packages, Valkey from its wheel."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import make_url

from jobs import broker

_PATIENCE_SECONDS = 60.0


def postgresql_programs() -> Path | None:
    """The newest installed PostgreSQL's programs: not on PATH in Debian's packages."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


@contextmanager
def postgresql_server(programs: Path) -> Iterator[str]:
    """A server on a unix socket in a directory of its own; gives the URL of its administrator's database.

    It sorts by ICU's English rules, which unlike bytes' order pass over the dash: ids must sort by age under them too.
    """
    owner = _unprivileged()
    directory = Path(tempfile.mkdtemp(prefix="squeeze-pg-"))
    if owner is not None:
        shutil.chown(directory, owner)
    cluster = directory / "cluster"
    subprocess.run(
        [
            *(programs / "initdb", "--pgdata", cluster, "--username=postgres", "--auth=trust", "--no-sync"),
            *("--encoding=UTF8", "--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en-US"),
        ],
        check=True,
        capture_output=True,
        user=owner,
        cwd=directory,
    )
    log = (directory / "log").open("wb")
    server = subprocess.Popen(
        [
            *(programs / "postgres", "-D", cluster, "-k", directory, "-h", "", "-c", "fsync=off"),
            *("-c", "max_connections=200", "-c", "shared_buffers=32MB"),
        ],
        stdout=log,
        stderr=log,
        user=owner,
        cwd=directory,
    )
    url = f"postgresql://postgres@/postgres?host={directory}"
    try:
        _await(server, lambda: _answers_sql(url), directory / "log")
        yield url
    finally:
        server.send_signal(signal.SIGINT)  # "fast": it does not wait for clients to leave
        _end(server)
        log.close()
        shutil.rmtree(directory)


def administer(url: str, statement: str) -> None:
    """Runs a statement that no transaction may hold, such as CREATE DATABASE."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.encode())


def with_database(url: str, name: str) -> str:
    """The URL of another database of the same server."""
    return make_url(url).set(database=name).render_as_string(hide_password=False)


@contextmanager
def redis_server(
    program: str, *, port: int | None = None, password: str | None = None
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A server on a TCP port, by default of its own choice, keeping nothing; gives its URL and process."""
    port = port or free_port()
    url = f"redis://:{password}@127.0.0.1:{port}/0" if password else f"redis://127.0.0.1:{port}/0"
    with tempfile.TemporaryDirectory(prefix="squeeze-redis-") as directory:
        log = Path(directory) / "log"
        server = subprocess.Popen(
            [
                *(program, "--port", str(port), "--bind", "127.0.0.1", "--dir", directory),
                *("--save", "", "--logfile", log, "--requirepass", password or ""),
            ]
        )
        try:
            _await(server, lambda: _answers_redis(url), log)
            yield url, server
        finally:
            _end(server)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def valkey_server() -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """The embedded broker as the service starts it; gives its URL and process."""
    with short_directory() as data:
        server = broker.start(data)
        try:
            yield broker.broker_url(data), server
        finally:
            _end(server)


@contextmanager
def short_directory() -> Iterator[Path]:
    """A directory for a broker's socket, whose path has 107 bytes at most; pytest's own are too deep."""
    with tempfile.TemporaryDirectory(prefix="squeeze-") as directory:
        yield Path(directory)


def forget_all(url: str) -> None:
    """Empties a broker."""
    client = _redis(url)
    client.flushall()
    client.close()


def wait_until(holds: Callable[[], bool], *, within_seconds: float = _PATIENCE_SECONDS) -> None:
    """Returns as soon as the condition holds; fails when it does not in time."""
    deadline = time.monotonic() + within_seconds
    while not holds():
        assert time.monotonic() < deadline, f"not so within {within_seconds:g} seconds"
        time.sleep(0.02)


def _redis(url: str) -> redis.Redis:
    return redis.Redis.from_url(
        url.replace("redis+socket://", "unix://"), socket_timeout=5.0, retry=Retry(NoBackoff(), 0)
    )


def _unprivileged() -> str | None:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _answers_sql(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=5).close()
    except psycopg.OperationalError:
        return False
    return True


def _answers_redis(url: str) -> bool:
    client = _redis(url)
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
    finally:
        client.close()


def _await(server: "subprocess.Popen[bytes]", answers: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not answers():
        if server.poll() is not None or time.monotonic() > deadline:
            _end(server)
            raise RuntimeError(f"{server.args!r} does not answer:\n{log.read_text()[-2000:]}")
        time.sleep(0.02)


def _end(server: "subprocess.Popen[bytes]") -> None:
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
    server.wait()
