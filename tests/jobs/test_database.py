"""The database: migrations, transactions, both dialects."""

import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text

from jobs import keys, lifecycle
from jobs.database import Database
from jobs.records import Base, JobRecord
from squeeze.errors import ServiceUnavailable, SpecInvalid
from squeeze.objects import Status
from tests import servers
from tests.jobs.making import bring, submit
from tests.jobs.racing import migrate, race


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/new/squeeze.db"
    return str(request.getfixturevalue("empty_postgresql_url"))


def test_processes_that_migrate_at_once_all_end_with_the_schema(empty_url: str) -> None:
    assert race(migrate, [(empty_url,)] * 4) == [None] * 4


def test_the_migrations_make_the_schema_that_the_records_describe(database_url: str, database: Database) -> None:
    engine = create_engine(database_url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_the_check_tells_a_schema_that_was_never_migrated(empty_url: str) -> None:
    database = Database(empty_url)
    if database.is_sqlite:
        Path(empty_url.removeprefix("sqlite:///")).parent.mkdir()
    with pytest.raises(ServiceUnavailable, match="python -m jobs migrate"):
        database.check()
    database.migrate()
    database.check()
    database.dispose()


def test_a_transaction_that_raises_leaves_nothing(database: Database) -> None:
    with pytest.raises(RuntimeError), database.write() as session:
        submit(session)
        raise RuntimeError
    with database.read() as session:
        assert session.query(JobRecord).count() == 0


def test_records_stay_readable_after_the_commit(database: Database) -> None:
    with database.write() as session:
        record = submit(session)
    assert record.project == "default"
    assert record.created_at.utcoffset() is not None


def test_times_come_back_in_utc_and_exact(database: Database) -> None:
    with database.write() as session:
        made = submit(session)
    with database.read() as session:
        read = session.get_one(JobRecord, made.id)
        assert read is not made
        assert read.created_at == made.created_at
        assert str(read.created_at.tzinfo) == "UTC"


def test_infinity_is_stored_as_null(database: Database) -> None:
    with database.write() as session:
        submit(session).usage = {"gpu_seconds": float("inf"), "energy_wh": [float("nan"), 1.5]}
    with database.read() as session:
        assert session.query(JobRecord).one().usage == {"gpu_seconds": None, "energy_wh": [None, 1.5]}


def test_writers_wait_for_each_other_instead_of_failing(database: Database) -> None:
    failures: list[Exception] = []

    def write_some() -> None:
        for _ in range(20):
            try:
                with database.write() as session:
                    keys.list_keys(session)  # reads before it writes: the pattern that a deferred transaction loses
                    submit(session)
            except ServiceUnavailable as error:
                failures.append(error)

    threads = [threading.Thread(target=write_some) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as session:
        assert (failures, session.query(JobRecord).count()) == ([], 160)


def test_a_server_that_drops_its_connections_is_unavailable_for_that_transaction_alone(
    postgresql_url: str, postgresql_database: Database
) -> None:
    drop = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = 'jobs'"
    with pytest.raises(ServiceUnavailable), postgresql_database.write() as session:
        submit(session)
        servers.administer(postgresql_url, drop)
        submit(session)
    with postgresql_database.write() as session:
        submit(session)
    servers.administer(postgresql_url, drop)
    with postgresql_database.read() as session:
        assert session.query(JobRecord).count() == 1


def test_a_process_that_stops_within_a_transaction_loses_it_and_its_locks(postgresql_database: Database) -> None:
    with postgresql_database.write() as session:
        job_id = bring(session, Status.running).id
    with pytest.raises(ServiceUnavailable), postgresql_database.write() as stopped:
        stopped.execute(text("SET LOCAL idle_in_transaction_session_timeout = 1"))
        lifecycle.renew(stopped, job_id, 1, 60)
        stopped.flush()
        with postgresql_database.write() as session:  # waits until the server has ended the other
            lifecycle.cancel(session, "default", job_id)
        stopped.execute(text("SELECT 1"))


def test_a_session_for_reading_refuses_to_write_on_sqlite(sqlite_database: Database) -> None:
    with pytest.raises(ServiceUnavailable), sqlite_database.read() as session:
        session.execute(text("DELETE FROM jobs"))


def test_a_server_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    database = Database(f"postgresql://nobody@/none?host={tmp_path}")
    for ask in (database.check, database.migrate):
        with pytest.raises(ServiceUnavailable):
            ask()
    database.dispose()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://localhost/x", "nonsense"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(SpecInvalid, match="postgresql"):
        Database(url)


def test_the_password_is_in_no_text_of_the_database(tmp_path: Path) -> None:
    database = Database(f"postgresql://squeeze:s3cret@/none?host={tmp_path}")
    with pytest.raises(ServiceUnavailable) as caught:
        database.check()
    assert "s3cret" not in f"{database!r} {caught.value} {caught.value.__cause__}"
    database.dispose()
