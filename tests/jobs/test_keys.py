"""API keys: only their hash is kept; a revoked one opens nothing."""

from datetime import timedelta

import pytest
from sqlalchemy import text

from jobs import keys
from jobs.database import Database
from jobs.records import now
from squeeze.errors import NotFound, SpecInvalid


def test_a_key_opens_its_project_until_it_is_revoked(database: Database) -> None:
    with database.write() as session:
        assert not keys.any_active(session)
        record, plaintext = keys.create(session, "search", "laptop")
        assert keys.any_active(session)
        found = keys.find(session, plaintext)
        assert found is not None
        assert (found.id, found.project, found.name) == (record.id, "search", "laptop")
        revoked_at = keys.revoke(session, record.id).revoked_at
        assert keys.revoke(session, record.id).revoked_at == revoked_at
        assert keys.find(session, plaintext) is None
        assert not keys.any_active(session)


def test_only_the_hash_of_a_key_is_kept(database: Database) -> None:
    with database.write() as session:
        record, plaintext = keys.create(session, "default", "laptop")
        rows = session.execute(text("SELECT * FROM keys")).all()
    assert plaintext.startswith("sq-")
    assert len(plaintext) == len("sq-") + 43  # 256 bits
    assert plaintext not in repr(rows)
    assert plaintext.removeprefix("sq-")[6:] not in repr(rows)
    assert plaintext.startswith(record.prefix)


@pytest.mark.parametrize("guess", ["", "sq-", "sq-\0", "sq-\udce9", "ü", "x" * 100_000])
def test_a_guess_opens_nothing(database: Database, guess: str) -> None:
    with database.write() as session:
        keys.create(session, "default", "laptop")
        assert keys.find(session, guess) is None


def test_keys_are_listed_by_project(database: Database) -> None:
    with database.write() as session:
        made = [keys.create(session, project, "laptop")[0].id for project in ("a", "b", "a")]
        assert [record.id for record in keys.list_keys(session)] == made
        assert [record.id for record in keys.list_keys(session, "a")] == [made[0], made[2]]
        with pytest.raises(NotFound):
            keys.revoke(session, "key-none")


def test_the_last_use_is_written_once_in_a_while(database: Database) -> None:
    at = now()
    with database.write() as session:
        record, _ = keys.create(session, "default", "laptop")
        seen = []
        for seconds in (0, 59, 61):
            keys.used(session, record.id, at=at + timedelta(seconds=seconds), every_seconds=60)
            session.refresh(record)
            assert record.last_used_at is not None
            seen.append(round((record.last_used_at - at).total_seconds()))
    assert seen == [0, 0, 61]


@pytest.mark.parametrize(
    ("project", "name"), [("", "x"), ("A", "x"), ("a b", "x"), ("a" * 64, "x"), ("a", ""), ("a", "\n")]
)
def test_a_project_or_name_out_of_form_is_refused(sqlite_database: Database, project: str, name: str) -> None:
    with pytest.raises(SpecInvalid), sqlite_database.write() as session:
        keys.create(session, project, name)
