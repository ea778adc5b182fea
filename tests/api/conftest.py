"""A running service with the embedded broker: `running` is empty for each test, `shared` is one for many."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.settings import Settings
from squeeze.objects import Plan
from tests.api.planning import MODELS
from tests.api.serving import SPEC, Running, serve
from tests.hub import FaultyHub


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


@pytest.fixture(scope="package")
def sick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyHub]:
    """A Hub that has MODELS, and may be made ill."""
    with FaultyHub() as hub:
        for name, files in MODELS.items():
            hub.add_files(name, files, tmp_path_factory.mktemp("hub"))
        hub.repos["org/gated"].token = "hf_of_somebody_else"
        texts = tmp_path_factory.mktemp("texts")
        (texts / "train.txt").write_bytes(b" " * (2 << 20))
        hub.add_dataset("org/texts", texts)
        yield hub


@pytest.fixture(scope="package")
def planner(tmp_path_factory: pytest.TempPathFactory, _valkey: str, sick: FaultyHub) -> Iterator[Callable[..., Plan]]:
    """Plans a spec against that Hub."""
    data = tmp_path_factory.mktemp("plan")
    settings = Settings(data, f"sqlite:///{data}/squeeze.db", _valkey, (data / "storage").as_uri())
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_ENDPOINT", sick.url)
        with serve(settings) as running:

            def plan(model: str, step: dict[str, Any] | None = None, **changes: Any) -> Plan:
                first = changes.pop("replaced", None) or {**SPEC["steps"][0], **(step or {})}
                steps = changes.pop("steps", [first])
                answer = running.client.post("/v1/plan", json={"model": model, "steps": steps, **changes})
                assert answer.status_code == 200, answer.text
                return Plan.model_validate(answer.json())

            yield plan


def _settings(data: Path, database_url: str, broker_url: str) -> Settings:
    return Settings(
        data=data,
        database_url=database_url,
        broker_url=broker_url,
        storage_url=(data / "storage").as_uri(),
        max_body_bytes=64 * 1024,
        max_upload_bytes=4 * 1024 * 1024,
    )
