"""The real API for the tests of the client and of the command line."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from squeeze import Client
from tests.client.faults import Proxy, proxy
from tests.client.service import Service, running


@pytest.fixture
def service(tmp_path: Path, sqlite_url: str, valkey_url: str) -> Iterator[Service]:
    with running(tmp_path / "data", sqlite_url, valkey_url) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with Client(service.url) as client:
        yield client


@pytest.fixture
def faulty(service: Service) -> Iterator[Proxy]:
    """A way to the service on which things go wrong."""
    with proxy(service.url) as faulty:
        yield faulty


@pytest.fixture
def unlucky(faulty: Proxy) -> Iterator[Client]:
    """A client that goes that way."""
    with Client(faulty.url) as client:
        yield client
