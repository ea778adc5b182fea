"""What only a server that checks signatures can show: radosgw."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from squeeze.errors import StorageUnavailable
from storage import open_storage
from storage.signing import Keys, presigned
from tests.storage.servers import S3Server
from tests.storage.test_local import PEAK

pytestmark = pytest.mark.slow

# Sends 20 MB, says so, and then waits for input that never comes.
WRITER = """
import os, sys
from storage import open_storage

def chunks():
    for _ in range(20):
        yield bytes(1 << 20)
    print("half", flush=True)
    sys.stdin.readline()

open_storage(sys.argv[1], dict(os.environ)).put_stream("object", chunks())
"""


@pytest.fixture
def bucket(radosgw_server: S3Server) -> str:
    return radosgw_server.make_bucket()


def presign(server: S3Server, bucket: str) -> str:
    storage = open_storage(f"s3://{bucket}", server.environ)
    storage.put_stream("a", [b"content"])
    url = storage.presign("a", expires_seconds=60, filename="model.bin")
    assert url is not None
    assert httpx.get(url).content == b"content"
    return url


def test_a_tampered_signature_is_refused(radosgw_server: S3Server, bucket: str) -> None:
    url = presign(radosgw_server, bucket)
    tampered = url[:-1] + ("0" if url[-1] != "0" else "1")
    refused = httpx.get(tampered)
    assert (refused.status_code, "SignatureDoesNotMatch" in refused.text) == (403, True)


@pytest.mark.parametrize(("found", "instead"), [("model.bin", "other.exe"), ("X-Amz-Expires=60", "X-Amz-Expires=600")])
def test_a_changed_parameter_is_refused(radosgw_server: S3Server, bucket: str, found: str, instead: str) -> None:
    url = presign(radosgw_server, bucket)
    assert found in url
    assert httpx.get(url.replace(found, instead)).status_code == 403


def test_another_object_is_refused(radosgw_server: S3Server, bucket: str) -> None:
    url = presign(radosgw_server, bucket)
    open_storage(f"s3://{bucket}", radosgw_server.environ).put_stream("b", [b"other"])
    assert httpx.get(url.replace(f"/{bucket}/a?", f"/{bucket}/b?")).status_code == 403


def test_another_verb_is_refused(radosgw_server: S3Server, bucket: str) -> None:
    url = presign(radosgw_server, bucket)
    assert httpx.put(url, content=b"mine").status_code == 403
    assert httpx.delete(url).status_code == 403


def test_an_expired_url_is_refused(radosgw_server: S3Server, bucket: str) -> None:
    presign(radosgw_server, bucket)
    keys = Keys(radosgw_server.access_key, radosgw_server.secret_key)
    signed_for = {
        age: presigned(
            "GET",
            f"{radosgw_server.endpoint}/{bucket}/a",
            keys,
            region="us-east-1",
            expires_seconds=60,
            now=datetime.now(UTC) - timedelta(seconds=age),
            query={},
        )
        for age in (30, 90)
    }
    assert httpx.get(signed_for[30]).status_code == 200
    assert httpx.get(signed_for[90]).status_code == 403


def test_nobody_reads_without_a_signature(radosgw_server: S3Server, bucket: str) -> None:
    presign(radosgw_server, bucket)
    assert httpx.get(f"{radosgw_server.endpoint}/{bucket}/a").status_code == 403


def test_a_wrong_secret_is_refused_in_every_call(radosgw_server: S3Server, bucket: str, tmp_path: Path) -> None:
    presign(radosgw_server, bucket)
    storage = open_storage(f"s3://{bucket}", radosgw_server.environ | {"AWS_SECRET_ACCESS_KEY": "wrong"})
    calls = [
        storage.check,
        lambda: storage.size("a"),
        lambda: storage.exists("a"),
        lambda: storage.read("a"),
        lambda: storage.fetch("a", tmp_path / "fetched"),
        lambda: storage.put_stream("a", [b"mine"]),
        lambda: storage.put_stream("a", [bytes(20 << 20)]),
        lambda: storage.delete("a"),
        lambda: list(storage.list()),
        lambda: storage.delete_prefix("a"),
    ]
    for call in calls:
        with pytest.raises(StorageUnavailable, match="refused us"):
            call()
    whole = open_storage(f"s3://{bucket}", radosgw_server.environ)
    assert b"".join(whole.read("a")) == b"content"


def test_a_killed_upload_leaves_no_object(radosgw_server: S3Server, bucket: str) -> None:
    command = [sys.executable, "-c", WRITER, f"s3://{bucket}"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=radosgw_server.environ
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half\n"
        writer.kill()
    assert list(open_storage(f"s3://{bucket}", radosgw_server.environ).list()) == []


def test_memory_stays_bounded_however_large_the_object(radosgw_server: S3Server, bucket: str, tmp_path: Path) -> None:
    size = 400 << 20
    command = [sys.executable, "-c", PEAK, f"s3://{bucket}", str(size), str(tmp_path / "fetched")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=radosgw_server.environ)
    assert int(done.stdout) * 1024 < size / 3
