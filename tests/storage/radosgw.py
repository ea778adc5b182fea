"""A real S3 server for the tests: Ceph's radosgw over a cluster of one, on free loopback ports, up in about 20 seconds.

Debian packages: ceph-mon, ceph-mgr, ceph-osd, radosgw, ceph-common.
"""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import httpx

from tests.servers import free_port
from tests.storage.servers import S3Server

PROGRAMS = ("ceph", "ceph-authtool", "ceph-mgr", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
_START_SECONDS = 120.0

_CONFIGURATION = """
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{mon_port},v1:127.0.0.1:{mon_port_v1}]
public_network = 127.0.0.0/8
public_addr = 127.0.0.1
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pgp_num = 4
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
mon_pg_warn_min_per_osd = 0
run_dir = {root}
log_file = {root}/$name.log
admin_socket = {root}/$name.asok
pid_file = {root}/$name.pid
keyring = {root}/keyring
mon_data = {root}/mon
osd_data = {root}/osd
mgr_data = {root}/mgr
osd_objectstore = bluestore
bluestore_block_size = 8589934592
osd_memory_target = 1000000000
rgw_frontends = beast endpoint=127.0.0.1:{rgw_port}
rgw_data = {root}/rgw
"""


def missing() -> list[str]:
    """The programs that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


@contextmanager
def radosgw() -> Iterator[S3Server]:
    # Not pytest's folder: the sockets' paths must be shorter than 108 bytes.
    root = Path(tempfile.mkdtemp(prefix="rgw-"))
    port, secret = free_port(), uuid4().hex
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        _configure(root, port)
        _start_cluster(root, daemons)
        daemons.append(_daemon(root, "radosgw", "-n", "client.rgw"))
        _await_answer(f"http://127.0.0.1:{port}/", daemons)
        user = ("user", "create", "--uid", "tests", "--display-name", "tests")
        _run(root, "radosgw-admin", *user, "--access-key", "tests", "--secret-key", secret)
        yield S3Server(f"http://127.0.0.1:{port}", "tests", secret)
    finally:
        for daemon in reversed(daemons):
            daemon.kill()
            daemon.wait()
        shutil.rmtree(root)


def _configure(root: Path, port: int) -> None:
    for folder in ("mon", "osd", "mgr", "rgw"):
        (root / folder).mkdir()
    fsid, mon_port, mon_port_v1 = str(uuid4()), free_port(), free_port()
    (root / "ceph.conf").write_text(
        _CONFIGURATION.format(fsid=fsid, root=root, mon_port=mon_port, mon_port_v1=mon_port_v1, rgw_port=port)
    )
    keyring = str(root / "keyring")
    _run(root, "ceph-authtool", "-C", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
    everything = [part for daemon in ("mon", "osd", "mgr") for part in ("--cap", daemon, "allow *")]
    for name in ("client.admin", "client.rgw", "mgr.x"):
        _run(root, "ceph-authtool", keyring, "--gen-key", "-n", name, *everything)
    addresses = f"[v2:127.0.0.1:{mon_port},v1:127.0.0.1:{mon_port_v1}]"
    _run(root, "monmaptool", "--create", "--fsid", fsid, "--addv", "a", addresses, str(root / "monmap"))


def _start_cluster(root: Path, daemons: list[subprocess.Popen[bytes]]) -> None:
    keyring = str(root / "keyring")
    _run(root, "ceph-mon", "-i", "a", "--mkfs", "--monmap", str(root / "monmap"), "--keyring", keyring)
    daemons.append(_daemon(root, "ceph-mon", "-i", "a"))
    daemons.append(_daemon(root, "ceph-mgr", "-i", "x"))
    osd_uuid = str(uuid4())
    osd = _run(root, "ceph", "osd", "new", osd_uuid).strip()
    capabilities = ("--cap", "mon", "allow profile osd", "--cap", "osd", "allow *", "--cap", "mgr", "allow profile osd")
    _run(root, "ceph-authtool", keyring, "--gen-key", "-n", f"osd.{osd}", *capabilities)
    _run(root, "ceph", "auth", "import", "-i", keyring)
    _run(root, "ceph-osd", "-i", osd, "--mkfs", "--osd-uuid", osd_uuid)
    daemons.append(_daemon(root, "ceph-osd", "-i", osd))


def _run(root: Path, program: str, *arguments: str) -> str:
    command = [program, "-c", str(root / "ceph.conf"), *arguments]
    if program in {"ceph-authtool", "monmaptool"}:
        command = [program, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_START_SECONDS)
    assert done.returncode == 0, f"{program} {arguments}: {done.stderr[-2000:]}"
    return done.stdout


def _daemon(root: Path, program: str, *arguments: str) -> subprocess.Popen[bytes]:
    command = [program, "-c", str(root / "ceph.conf"), *arguments, "-f"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _await_answer(url: str, daemons: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        assert all(daemon.poll() is None for daemon in daemons), "a daemon of the cluster ended"
        with suppress(httpx.TransportError):
            httpx.get(url, timeout=1.0)
            return
        time.sleep(0.1)
    raise AssertionError(f"no radosgw answered at {url} within {_START_SECONDS} seconds")
