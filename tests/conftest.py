"""Fixtures that every room may use: databases and brokers, all of them real.

`database` and `broker_url` run a test on each kind that is installed; `sqlite_database`, `valkey_url` and the like ask
for one kind. Every test gets an empty database and an empty broker.
"""

import itertools
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.database import Database
from tests import servers

_numbers = itertools.count(1)

# Who starts us in the background may have had us ignore interrupts, and so would every process that we start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def _postgresql() -> Iterator[str]:
    """One server for the whole session, with a migrated database that the tests' own are copied from."""
    programs = servers.postgresql_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    with servers.postgresql_server(programs) as url:
        servers.administer(url, "CREATE DATABASE migrated")
        database = Database(servers.with_database(url, "migrated"))
        database.migrate()
        database.dispose()
        yield url


@pytest.fixture(scope="session")
def _migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("migrated") / "squeeze.db"
    database = Database(f"sqlite:///{path}")
    database.migrate()
    database.dispose()
    return path


@pytest.fixture
def empty_postgresql_url(_postgresql: str) -> Iterator[str]:
    """A PostgreSQL database without tables."""
    name = f"test_{next(_numbers)}"
    servers.administer(_postgresql, f"CREATE DATABASE {name}")
    yield servers.with_database(_postgresql, name)
    servers.administer(_postgresql, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def postgresql_url(_postgresql: str) -> Iterator[str]:
    """A migrated PostgreSQL database without rows."""
    name = f"test_{next(_numbers)}"
    servers.administer(_postgresql, f"CREATE DATABASE {name} TEMPLATE migrated STRATEGY file_copy")
    yield servers.with_database(_postgresql, name)
    servers.administer(_postgresql, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def sqlite_url(_migrated_sqlite: Path, tmp_path: Path) -> str:
    """A migrated SQLite database without rows."""
    shutil.copy(_migrated_sqlite, tmp_path / "squeeze.db")
    return f"sqlite:///{tmp_path}/squeeze.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A migrated database without rows, of each kind in turn."""
    database = Database(database_url)
    yield database
    database.dispose()


@pytest.fixture
def sqlite_database(sqlite_url: str) -> Iterator[Database]:
    database = Database(sqlite_url)
    yield database
    database.dispose()


@pytest.fixture
def postgresql_database(postgresql_url: str) -> Iterator[Database]:
    database = Database(postgresql_url)
    yield database
    database.dispose()


@pytest.fixture(scope="session")
def _valkey() -> Iterator[str]:
    with servers.valkey_server() as (url, _):
        yield url


@pytest.fixture(scope="session")
def _redis() -> Iterator[str]:
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    with servers.redis_server(program) as (url, _):
        yield url


@pytest.fixture
def valkey_url(_valkey: str) -> str:
    """The embedded broker, empty."""
    servers.forget_all(_valkey)
    return _valkey


@pytest.fixture
def redis_url(_redis: str) -> str:
    """A Redis server on TCP, empty."""
    servers.forget_all(_redis)
    return _redis


@pytest.fixture(params=["valkey", "redis"])
def broker_url(request: pytest.FixtureRequest) -> str:
    """An empty broker, of each kind in turn."""
    return str(request.getfixturevalue(f"{request.param}_url"))
