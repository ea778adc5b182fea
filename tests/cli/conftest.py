"""The command line against the real API."""

from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from squeeze.cli import main
from tests.client.conftest import client, faulty, service
from tests.client.service import Service

__all__ = ["client", "faulty", "service"]

Squeeze = Callable[..., Result]


@pytest.fixture
def squeeze(service: Service) -> Squeeze:
    """Runs `squeeze` with these words against the service."""

    def run(*words: str) -> Result:
        return CliRunner().invoke(main, ["--url", service.url, *words])

    return run
