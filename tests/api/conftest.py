"""A running service with the embedded broker: `running` is empty for each test, `shared` is one for many."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.settings import Settings
from tests.api.serving import Running, serve


@pytest.fixture
def settings(tmp_path: Path, sqlite_url: str, valkey_url: str) -> Settings:
    return _settings(tmp_path, sqlite_url, valkey_url)


@pytest.fixture
def running(settings: Settings) -> Iterator[Running]:
    with serve(settings) as running:
        yield running


@pytest.fixture
def start(settings: Settings) -> Iterator[Callable[..., Running]]:
    """Starts a service with other settings."""
    with ExitStack() as stack:

        def start_with(**changes: Any) -> Running:
            return stack.enter_context(serve(replace(settings, **changes)))

        yield start_with


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="package")
def shared(tmp_path_factory: pytest.TempPathFactory, _valkey: str) -> Iterator[Running]:
    """One service for the tests that look at nothing but their own answers."""
    data = tmp_path_factory.mktemp("shared")
    with serve(_settings(data, f"sqlite:///{data}/squeeze.db", _valkey)) as running:
        yield running


def _settings(data: Path, database_url: str, broker_url: str) -> Settings:
    return Settings(
        data=data,
        database_url=database_url,
        broker_url=broker_url,
        storage_url=(data / "storage").as_uri(),
        max_body_bytes=64 * 1024,
        max_upload_bytes=4 * 1024 * 1024,
    )
