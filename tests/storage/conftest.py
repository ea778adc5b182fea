"""One storage per backend, each on a real server or directory of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import Storage, open_storage
from tests.storage.radosgw import missing, radosgw
from tests.storage.servers import S3Server, moto

SERVERS = [pytest.param("moto_server"), pytest.param("radosgw_server", marks=pytest.mark.slow)]


@pytest.fixture(scope="session")
def moto_server() -> Iterator[S3Server]:
    with moto() as server:
        yield server


@pytest.fixture(scope="session")
def radosgw_server() -> Iterator[S3Server]:
    if absent := missing():
        pytest.skip(f"not installed: {', '.join(absent)} (Debian: ceph-mon ceph-mgr ceph-osd radosgw ceph-common)")
    with radosgw() as server:
        yield server


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> S3Server:
    found: S3Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=[pytest.param("local"), *SERVERS])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(f"file://{tmp_path}/storage")
    server: S3Server = request.getfixturevalue(request.param)
    return open_storage(f"s3://{server.make_bucket()}/some/prefix", server.environ)
