"""S3: settings, presigned URLs, faults of the server."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

import botocore.auth
import httpx
import pytest
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from squeeze.errors import SpecInvalid, StorageUnavailable
from storage import Storage, open_storage
from storage.signing import Keys, attachment, presigned
from tests.servers import free_port
from tests.storage.servers import S3Server

SECRET = "a-secret-that-must-not-be-seen"
ENVIRON = {"AWS_ACCESS_KEY_ID": "the-id", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}


@pytest.fixture
def bucket(server: S3Server) -> str:
    return server.make_bucket()


@pytest.fixture
def s3(server: S3Server, bucket: str) -> Storage:
    return open_storage(f"s3://{bucket}/some/prefix", server.environ)


def test_objects_lie_under_the_prefix_and_only_there(server: S3Server, bucket: str, s3: Storage) -> None:
    s3.put_stream("files/a", [b"x"])
    whole = open_storage(f"s3://{bucket}", server.environ)
    assert list(whole.list()) == ["some/prefix/files/a"]
    assert list(open_storage(f"s3://{bucket}/other", server.environ).list()) == []


@pytest.mark.parametrize("chunk_count", [1, 30])
def test_an_upload_that_breaks_leaves_no_parts_behind(
    server: S3Server, bucket: str, s3: Storage, chunk_count: int
) -> None:
    def breaking() -> Iterator[bytes]:
        for _ in range(chunk_count):
            yield bytes(1 << 20)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        s3.put_stream("object", breaking())
    uploads = server.ask("GET", f"/{bucket}", {"uploads": ""})
    assert uploads.status_code == 200
    assert "<UploadId>" not in uploads.text


def test_a_presigned_url_serves_ranges_under_the_name_asked_for(s3: Storage) -> None:
    s3.put_stream("jobs/a/1/x", [b"0123456789"])
    url = s3.presign("jobs/a/1/x", expires_seconds=60, filename='we"ird ü.bin')
    assert url is not None
    whole = httpx.get(url)
    assert (whole.status_code, whole.content) == (200, b"0123456789")
    kind, plain, encoded = whole.headers["Content-Disposition"].split("; ")
    assert (kind, plain) == ("attachment", 'filename="we_ird _.bin"')
    assert unquote(encoded.removeprefix("filename*=UTF-8''")) == 'we"ird ü.bin'
    part = httpx.get(url, headers={"Range": "bytes=3-5"})
    assert (part.status_code, part.content) == (206, b"345")


def test_every_object_says_that_it_is_to_be_saved_not_shown(server: S3Server, bucket: str, s3: Storage) -> None:
    s3.put_stream("report.html", [b"<script>"])
    assert server.ask("GET", f"/{bucket}/some/prefix/report.html").headers["Content-Disposition"] == "attachment"


def test_our_signature_is_that_of_botocore() -> None:
    url = "https://s3.eu-central-1.amazonaws.com/bucket/a%20b/%C3%BC.bin"
    query = {"response-content-disposition": attachment("ü b.bin")}
    now = datetime.now(UTC)
    credentials = Credentials("the-id", SECRET, "a+session/token=")
    request = AWSRequest("GET", url, params=query)
    botocore.auth.S3SigV4QueryAuth(credentials, "s3", "eu-central-1", expires=600).add_auth(request)
    theirs = parse_qs(urlsplit(request.url).query)
    at = datetime.strptime(theirs["X-Amz-Date"][0], "%Y%m%dT%H%M%S%z")
    ours = presigned(
        "GET",
        url,
        Keys("the-id", SECRET, "a+session/token="),
        region="eu-central-1",
        expires_seconds=600,
        now=at,
        query=query,
    )
    assert abs((at - now).total_seconds()) < 60
    assert parse_qs(urlsplit(ours).query) == theirs


def test_our_signature_is_that_of_the_example_that_amazon_publishes() -> None:
    url = presigned(
        "GET",
        "https://examplebucket.s3.amazonaws.com/test.txt",
        Keys("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
        region="us-east-1",
        expires_seconds=86400,
        now=datetime(2013, 5, 24, tzinfo=UTC),
        query={},
    )
    assert url.endswith("X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404")


@pytest.mark.parametrize("expires_seconds", [0, -1, 7 * 24 * 3600 + 1])
def test_a_lifetime_that_s3_refuses_is_refused_here(expires_seconds: int) -> None:
    storage = open_storage("s3://bucket", ENVIRON)
    with pytest.raises(ValueError, match="604800"):
        storage.presign("x", expires_seconds=expires_seconds, filename="x")


def test_presigned_urls_name_the_public_endpoint_when_there_is_one() -> None:
    storage = open_storage("s3://bucket/p?public_endpoint=https://files.example.org", ENVIRON)
    url = storage.presign("a", expires_seconds=60, filename="a")
    assert url is not None
    assert url.startswith("https://files.example.org/bucket/p/a?")


def test_no_url_is_given_where_clients_cannot_reach_the_server() -> None:
    assert open_storage("s3://bucket?presign=no", ENVIRON).presign("a", expires_seconds=60, filename="a") is None


@pytest.mark.parametrize(
    ("url", "environ"),
    [
        ("s3://key:secret@bucket/prefix", {}),
        ("s3://bucket:9000/prefix", {}),
        ("s3:///prefix", {}),
        ("s3://bucket?unknown=1", {}),
        ("s3://bucket?presign=perhaps", {}),
        ("s3://bucket?public_endpoint=https://host/with/path", {}),
        ("s3://bucket?public_endpoint=http://files.example.org", {}),
        ("s3://bucket", {"AWS_SECRET_ACCESS_KEY": ""}),
        ("s3://bucket", {"AWS_ENDPOINT_URL": "http://storage.example.org"}),
        ("s3://bucket", {"AWS_ENDPOINT_URL": "https://key:secret@storage.example.org"}),
        ("s3://bucket", {"AWS_ENDPOINT_URL": "storage.example.org"}),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused_without_showing_secrets(url: str, environ: dict[str, str]) -> None:
    with pytest.raises(SpecInvalid) as caught:
        open_storage(url, ENVIRON | environ)
    assert "secret@" not in str(caught.value)
    assert SECRET not in str(caught.value)


def test_plain_http_is_taken_on_loopback_or_when_said_so() -> None:
    for endpoint, said in (
        *((f"http://{host}:1", {}) for host in ("127.0.0.1", "localhost", "[::1]")),
        ("http://s3:8333", {"AWS_ALLOW_HTTP": "true"}),
    ):
        storage = open_storage("s3://bucket", ENVIRON | {"AWS_ENDPOINT_URL": endpoint} | said)
        url = storage.presign("a", expires_seconds=60, filename="a")
        assert url is not None and url.startswith(f"{endpoint}/bucket/a?")


def test_the_endpoint_for_s3_goes_before_the_general_one() -> None:
    environ = ENVIRON | {"AWS_ENDPOINT_URL_S3": "https://s3.example.org", "AWS_ENDPOINT_URL": "https://example.org"}
    url = open_storage("s3://bucket", environ).presign("a", expires_seconds=60, filename="a")
    assert url is not None
    assert url.startswith("https://s3.example.org/bucket/a?")


def test_no_secret_shows_in_a_repr_an_error_or_a_url() -> None:
    environ = ENVIRON | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}", "AWS_SESSION_TOKEN": "the-token"}
    storage = open_storage("s3://bucket", environ)
    with pytest.raises(StorageUnavailable) as caught:
        storage.check()
    shown = [repr(caught.value), repr(caught.value.__cause__), *(repr(value) for value in vars(storage).values())]
    assert not [text for text in shown if SECRET in text or "the-token" in text]
    assert SECRET not in (storage.presign("a", expires_seconds=60, filename="a") or "")


def test_a_server_that_does_not_answer_is_unavailable() -> None:
    storage = open_storage("s3://bucket", ENVIRON | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"})
    with pytest.raises(StorageUnavailable, match="AWS_ENDPOINT_URL"):
        storage.check()


class NoRanges(BaseHTTPRequestHandler):
    """Answers a request for a range with the whole object, as some servers do."""

    CONTENT = b"0123456789"

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.CONTENT)))
        self.send_header("Last-Modified", "Sat, 21 Nov 2026 00:00:00 GMT")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.CONTENT)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests' output is not a log."""


def test_a_server_that_ignores_ranges_gives_no_wrong_bytes() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), NoRanges) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        environ = ENVIRON | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}
        with pytest.raises(StorageUnavailable):
            list(open_storage("s3://bucket", environ).read("object", 3, 5))
        server.shutdown()
        thread.join()


def test_a_bucket_that_is_not_there_is_named_by_the_check(server: S3Server) -> None:
    with pytest.raises(StorageUnavailable, match="NoSuchBucket"):
        open_storage("s3://no-such-bucket", server.environ).check()
    with pytest.raises(StorageUnavailable, match="NoSuchBucket"):
        open_storage("s3://no-such-bucket", server.environ).put_stream("a", [b"x"])


def test_fetching_to_a_place_that_is_no_folder_is_a_fault_of_the_disk(s3: Storage, tmp_path: Path) -> None:
    s3.put_stream("a", [b"x"])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageUnavailable, match=re.escape("directory can't be used")):
        s3.fetch("a", tmp_path / "file" / "fetched")
