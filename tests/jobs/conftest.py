"""The tests of this room end with all their connections, so one PostgreSQL database, emptied each time, serves all."""

import pytest

from jobs.records import Base
from tests import servers


@pytest.fixture(scope="session")
def _shared_postgresql_url(_postgresql: str) -> str:
    servers.administer(_postgresql, "CREATE DATABASE jobs TEMPLATE migrated")
    return servers.with_database(_postgresql, "jobs")


@pytest.fixture
def postgresql_url(_shared_postgresql_url: str) -> str:
    """A migrated PostgreSQL database without rows."""
    tables = reversed(Base.metadata.sorted_tables)
    # Quicker than TRUNCATE for a few rows.
    servers.administer(_shared_postgresql_url, "; ".join(f"DELETE FROM {table.name}" for table in tables))
    return _shared_postgresql_url
