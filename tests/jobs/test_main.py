"""The operator's commands."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from jobs import keys
from jobs.__main__ import main
from jobs.database import Database


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/data/squeeze.db"


def _run(url: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, env={"SQUEEZE_DATABASE_URL": url})


def test_migrate_makes_the_schema_and_may_run_again(url: str) -> None:
    for _ in range(2):
        assert _run(url, "migrate").exit_code == 0
    database = Database(url)
    database.check()
    database.dispose()


def test_a_key_is_shown_once_opens_its_project_and_is_revoked(url: str) -> None:
    made = _run(url, "keys", "create", "--project", "search", "--name", "laptop")
    assert made.exit_code == 0, made.output
    plaintext = made.stdout.strip()
    assert re.fullmatch(r"sq-[\w-]{43}", plaintext)
    database = Database(url)
    with database.read() as session:
        found = keys.find(session, plaintext)
        assert found is not None
        assert found.project == "search"

    listed = _run(url, "keys", "list").stdout
    assert plaintext not in listed
    for shown in (found.id, "search", plaintext[:9], "active", "never used", "laptop"):
        assert shown in listed
    assert _run(url, "keys", "list", "--project", "other").stdout == ""

    assert _run(url, "keys", "revoke", found.id).exit_code == 0
    assert "revoked" in _run(url, "keys", "list").stdout
    with database.read() as session:
        assert keys.find(session, plaintext) is None
    database.dispose()


def test_mistakes_are_one_line_and_no_traceback(url: str) -> None:
    for arguments in (["keys", "revoke", "key-none"], ["keys", "create", "--project", "A B", "--name", "x"]):
        result = _run(url, *arguments)
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1), result.stderr
        assert result.stderr.startswith("Error: ")


def test_a_bad_setting_is_told_by_name() -> None:
    result = CliRunner().invoke(main, ["migrate"], env={"SQUEEZE_DATABASE_URL": "mysql://h/d"})
    assert result.exit_code == 1
    assert "SQUEEZE_DATABASE_URL takes" in result.stderr
