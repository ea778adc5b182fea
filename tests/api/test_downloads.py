"""Artifacts, archive and report over a real socket: whole, in part, resumed, checked."""

import hashlib
import io
import tarfile
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from jobs import lifecycle
from jobs.lifecycle import NewArtifact
from squeeze.objects import Usage
from squeeze.reports.report import Report
from storage import CHUNK_BYTES
from tests.api.serving import RESULT, Running, report

CONTENT = bytes(range(256)) * (CHUNK_BYTES // 100)  # some chunks and a bit
LONG = "gptq/" + "ä" * 60 + "/" + "x" * 90 + ".json"
FILES = {"gptq/model.safetensors": CONTENT, "gptq/config.json": b"{}", "gptq/empty": b"", LONG: b"long"}
PATH = "artifacts/gptq/model.safetensors"


@pytest.fixture(scope="module")
def done(shared: Running, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a job that has succeeded."""
    job_id = shared.submit()
    shared.succeed(job_id, FILES, tmp_path_factory.mktemp("made"), report())
    return f"/v1/jobs/{job_id}"


def test_artifacts_are_listed_with_what_checks_them(shared: Running, done: str) -> None:
    listed = shared.client.get(f"{done}/artifacts").json()
    assert [each["filename"] for each in listed["data"]] == sorted(FILES)
    for each in listed["data"]:
        content = shared.client.get(each["download_url"]).content
        assert len(content) == each["bytes"]
        assert hashlib.sha256(content).hexdigest() == each["sha256"]


def test_a_download_carries_its_digest_and_never_runs_in_a_browser(shared: Running, done: str) -> None:
    answer = shared.client.get(f"{done}/{PATH}")
    digest = hashlib.sha256(CONTENT)
    assert answer.content == CONTENT
    assert answer.headers["etag"] == f'"{digest.hexdigest()}"'
    assert answer.headers["repr-digest"] == f"sha-256=:{b64encode(digest.digest()).decode()}:"
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-disposition"].startswith('attachment; filename="model.safetensors"')
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in answer.headers["content-security-policy"]


def test_head_tells_the_same_without_the_bytes(shared: Running, done: str) -> None:
    for path in (PATH, "archive"):
        head, get = shared.client.head(f"{done}/{path}"), shared.client.get(f"{done}/{path}")
        assert head.status_code == 200
        assert head.content == b""
        skipped = {"date", "x-request-id"}
        assert {k: v for k, v in head.headers.items() if k not in skipped} == {
            k: v for k, v in get.headers.items() if k not in skipped
        }


@pytest.mark.parametrize(
    ("header", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=100-", 100, None),
        ("bytes=-7", -7, None),
        (f"bytes={CHUNK_BYTES - 1}-{CHUNK_BYTES}", CHUNK_BYTES - 1, CHUNK_BYTES + 1),
    ],
)
def test_a_range_is_answered_with_that_part(
    shared: Running, done: str, header: str, start: int, end: int | None
) -> None:
    answer = shared.client.get(f"{done}/{PATH}", headers={"Range": header})
    assert answer.status_code == 206
    assert answer.content == CONTENT[start:end]
    first = start % len(CONTENT)
    assert answer.headers["content-range"] == f"bytes {first}-{first + len(answer.content) - 1}/{len(CONTENT)}"


def test_a_range_outside_is_416_with_the_size(shared: Running, done: str) -> None:
    answer = shared.client.get(f"{done}/{PATH}", headers={"Range": f"bytes={len(CONTENT)}-"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (416, "range_unsatisfiable")
    assert answer.headers["content-range"] == f"bytes */{len(CONTENT)}"


def test_if_range_resumes_only_the_same_bytes(shared: Running, done: str) -> None:
    etag = shared.client.head(f"{done}/{PATH}").headers["etag"]
    same = shared.client.get(f"{done}/{PATH}", headers={"Range": "bytes=5-", "If-Range": etag})
    assert (same.status_code, same.content) == (206, CONTENT[5:])
    for other in ('"other"', "Sat, 21 Nov 2026 09:00:00 GMT", f"W/{etag}"):
        whole = shared.client.get(f"{done}/{PATH}", headers={"Range": "bytes=5-", "If-Range": other})
        assert (whole.status_code, whole.content) == (200, CONTENT)


def test_what_one_has_already_is_not_sent_again(shared: Running, done: str) -> None:
    for path in (PATH, "archive"):
        etag = shared.client.head(f"{done}/{path}").headers["etag"]
        for given in (etag, f'"other", W/{etag}', "*"):
            answer = shared.client.get(f"{done}/{path}", headers={"If-None-Match": given})
            assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
        assert shared.client.get(f"{done}/{path}", headers={"If-None-Match": '"other"'}).status_code == 200


def test_a_download_that_breaks_is_resumed_to_the_same_digest(shared: Running, done: str) -> None:
    held = b""
    with shared.client.stream("GET", f"{done}/{PATH}") as answer:
        for chunk in answer.iter_raw():
            held += chunk
            if len(held) > 100_000:
                break
        etag = answer.headers["etag"]
    rest = shared.client.get(f"{done}/{PATH}", headers={"Range": f"bytes={len(held)}-", "If-Range": etag})
    assert f'"{hashlib.sha256(held + rest.content).hexdigest()}"' == etag


def test_the_archive_holds_everything_and_resumes(shared: Running, done: str) -> None:
    answer = shared.client.get(f"{done}/archive")
    whole = answer.content
    assert int(answer.headers["content-length"]) == len(whole)
    job_id = done.rsplit("/", 1)[-1]
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        read = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    assert read == {f"{job_id}/{name}": content for name, content in FILES.items()}
    middle = len(whole) // 2
    rest = shared.client.get(f"{done}/archive", headers={"Range": f"bytes={middle}-"})
    assert (rest.status_code, rest.content) == (206, whole[middle:])


def test_a_job_without_artifacts_has_no_archive_and_no_report(shared: Running) -> None:
    job_id = shared.submit()
    absent = {"archive": "artifact_not_found", "report": "report_not_ready", "artifacts/x": "artifact_not_found"}
    for path, code in absent.items():
        answer = shared.client.get(f"/v1/jobs/{job_id}/{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, code)
    assert shared.client.get(f"/v1/jobs/{job_id}/artifacts").json()["data"] == []


@pytest.mark.parametrize("name", ["..%2F..%2Fsqueeze.db", "gptq/..%2F..%2F..", "%00", "gptq//config.json", ""])
def test_a_name_that_was_not_published_is_not_found(shared: Running, done: str, name: str) -> None:
    assert shared.client.get(f"{done}/artifacts/{name}").status_code == 404


def test_bytes_that_have_vanished_are_a_problem_and_no_broken_answer(running: Running, tmp_path: Path) -> None:
    job_id = running.submit()
    running.succeed(job_id, {"gptq/model.safetensors": b"x" * 10}, tmp_path, report())
    running.service.storage.delete_prefix(f"jobs/{job_id}")
    for path in (PATH, "archive"):
        answer = running.client.get(f"/v1/jobs/{job_id}/{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "artifact_not_found")


def test_on_s3_a_download_is_a_redirect_that_needs_no_key(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIATEST",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",  # signing needs no answer
    }.items():
        monkeypatch.setenv(name, value)
    running = start(storage_url="s3://bucket/prefix")
    job_id = running.submit()
    sha256 = hashlib.sha256(b"x").hexdigest()
    artifact = NewArtifact("gptq/model.safetensors", 1, sha256, "gptq", f"jobs/{job_id}/1/gptq/model.safetensors")
    with running.service.database.write() as session:
        lifecycle.claim(session, job_id, worker="w", lease_seconds=60)
        lifecycle.publish(session, job_id, 1, artifacts=[artifact], result=RESULT, report=report(), usage=Usage())
    path = f"/v1/jobs/{job_id}/{PATH}"
    answer = running.client.get(path, headers={"Range": "bytes=0-0"})  # the object storage knows ranges itself
    assert answer.status_code == 307
    location = httpx.URL(answer.headers["location"])
    assert (location.port, location.path) == (9, f"/bucket/prefix/{artifact.storage_key}")
    assert location.params["X-Amz-Signature"]
    assert location.params["X-Amz-Expires"] == "3600"
    assert "secret" not in str(location)
    assert answer.headers["etag"] == f'"{sha256}"'
    assert running.client.head(path).headers["content-length"] == "1"
    assert running.client.get(path, headers={"If-None-Match": f'"{sha256}"'}).status_code == 304


def test_the_report_is_json_for_programs(shared: Running, done: str) -> None:
    for accept in ("*/*", "application/json", "application/json, text/html"):
        answer = shared.client.get(f"{done}/report", headers={"Accept": accept})
        assert Report.model_validate(answer.json()) == Report.model_validate(report())
        assert answer.headers["vary"] == "Accept"
