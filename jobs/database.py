"""One way to talk to SQLite (WAL, one machine) and PostgreSQL (psycopg 3): short transactions, and a migration."""

import fcntl
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from pydantic_core import from_json, to_json
from sqlalchemy import Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker

from squeeze.errors import ServiceUnavailable, SpecInvalid

_WAIT_SECONDS = 15  # for a lock; then the request is told to come back
_NO_ANSWER = "The database can't answer now; try again in a moment."
_MIGRATION_LOCK = 0x5C0EE2E  # an advisory lock's number; any constant of our own


class Database:
    """A database by its URL. Nothing is opened before the first use; safe to share between threads."""

    def __init__(self, url: str) -> None:
        try:
            self._url = make_url(url.replace("postgres://", "postgresql://", 1))
        except ArgumentError:
            raise SpecInvalid("The database URL can't be read: sqlite:///PATH or postgresql://….") from None
        if self._url.drivername in ("postgresql", "postgresql+psycopg"):
            self._url = self._url.set(drivername="postgresql+psycopg")
            self._writing: Engine = _postgresql(self._url)
            self._reading: Engine = self._writing.execution_options(isolation_level="AUTOCOMMIT")
        elif self._url.drivername == "sqlite" and self._url.database not in (None, "", ":memory:"):
            self._writing = _sqlite(self._url, foreign_keys=True)
            self._reading = _sqlite(self._url, reading=True)
        else:
            raise SpecInvalid("The database must be sqlite:///PATH (a file) or postgresql://….")
        # Records stay readable after the commit: the caller answers from them once the transaction is over.
        self._write = sessionmaker(self._writing, expire_on_commit=False)
        self._read = sessionmaker(self._reading, expire_on_commit=False, autoflush=False)

    @property
    def is_sqlite(self) -> bool:
        return self._url.get_backend_name() == "sqlite"

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction: committed at the end, rolled back when anything raises."""
        with _unavailable(), self._write.begin() as session:
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Reads without a transaction: each statement sees what is committed when it runs."""
        with _unavailable(), self._read() as session:
            yield session

    def check(self) -> None:
        """Raises ServiceUnavailable when the database does not answer or its schema is not this version's."""
        wanted = _newest()
        with _unavailable(), self._reading.connect() as connection:
            known = inspect(connection).has_table("alembic_version")
            found = connection.scalar(text("SELECT version_num FROM alembic_version")) if known else None
        if found != wanted:
            raise ServiceUnavailable(
                f"The database's schema is {found or 'empty'}, not {wanted} as this version needs: run "
                "`python -m jobs migrate`."
            )

    def migrate(self) -> None:
        """Brings the schema to this version. Any number of processes may do so at once; one does the work."""
        with _unavailable():
            if self.is_sqlite:
                self._migrate_sqlite()
            else:
                self._migrate_postgresql()

    def dispose(self) -> None:
        """Closes the pooled connections."""
        self._writing.dispose()
        self._reading.dispose()

    def _migrate_sqlite(self) -> None:
        path = Path(str(self._url.database))
        path.parent.mkdir(parents=True, exist_ok=True)
        # Switching to WAL does not wait for other connections, so a file lock keeps the processes apart.
        with path.with_name(path.name + ".migrating").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            engine = _sqlite(self._url)  # foreign keys off: rebuilding a table must not cascade into others
            try:
                with engine.connect() as connection:
                    raw = connection.connection.dbapi_connection
                    assert raw is not None
                    raw.execute("PRAGMA journal_mode = WAL")
                with engine.begin() as connection:
                    _upgrade(connection)
            finally:
                engine.dispose()

    def _migrate_postgresql(self) -> None:
        with self._writing.begin() as connection:
            connection.execute(text("SET LOCAL lock_timeout = 0"))  # a peer's migration may take long
            connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _MIGRATION_LOCK})
            _upgrade(connection)


@cache
def _newest() -> str | None:
    return ScriptDirectory.from_config(_alembic()).get_current_head()


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config


def _upgrade(connection: Connection) -> None:
    config = _alembic()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _json(value: Any) -> str:
    """Infinity and NaN become null: PostgreSQL refuses them, and so does every strict JSON reader."""
    return to_json(value, inf_nan_mode="null").decode()


def _postgresql(url: Any) -> Engine:
    return create_engine(
        url,
        json_serializer=_json,
        json_deserializer=from_json,
        pool_pre_ping=True,  # a restarted server costs a reconnect, not an error
        pool_size=10,
        max_overflow=20,
        pool_timeout=_WAIT_SECONDS,
        connect_args={
            "connect_timeout": 5,
            # A process that is stopped in the middle of a transaction must not keep a job's row locked for ever.
            "options": f"-c lock_timeout={_WAIT_SECONDS}s -c idle_in_transaction_session_timeout={_WAIT_SECONDS}s",
        },
    )


def _sqlite(url: Any, *, foreign_keys: bool = False, reading: bool = False) -> Engine:
    engine = create_engine(
        url,
        json_serializer=_json,
        json_deserializer=from_json,
        pool_size=10,
        max_overflow=20,
        pool_timeout=_WAIT_SECONDS,
        connect_args={"timeout": _WAIT_SECONDS},
    )

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say so, not where the driver guesses
        connection.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")
        connection.execute("PRAGMA synchronous = FULL")  # an accepted job outlives a power cut
        if reading:
            connection.execute("PRAGMA query_only = ON")

    if not reading:
        # A transaction that reads first and writes later fails at once when another wrote in between; one that takes
        # the write lock at its start waits its turn.
        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


@contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except PoolTimeout as error:
        raise ServiceUnavailable(_NO_ANSWER) from error
    except DBAPIError as error:
        if getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR:
            raise  # a statement that can't be right: our bug, not the weather
        if not (error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)):
            raise
        raise ServiceUnavailable(_NO_ANSWER) from error
