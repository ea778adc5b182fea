"""The whole contract with curl alone, on the embedded service, beginning with the README's own lines."""

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hub import FaultyHub
from tests.launching import ROOT, launched, ready
from tests.models import tiny
from tests.servers import wait_until

MODEL = "HuggingFaceTB/SmolLM2-135M"  # the README's; here a tiny one has its name
JSON = ("-H", "Content-Type: application/json")
FILE = "compressed-tensors/model.safetensors"


@dataclass
class Service:
    """A running one, and the Hub that its worker pulls from."""

    url: str
    hub: FaultyHub

    def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = asked(f"{self.url}/v1/jobs/{job_id}")
        return found


@dataclass
class Finished:
    """The job that the README's lines made, and the directory in which they ran."""

    url: str
    id: str
    directory: Path
    output: str

    @property
    def file(self) -> dict[str, Any]:
        """What the list says of the weights."""
        listed: list[dict[str, Any]] = asked(f"{self.url}/artifacts")["data"]
        return next(each for each in listed if each["filename"] == FILE)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed (apt-get install curl)")
    home = tmp_path_factory.mktemp("curl")
    with FaultyHub() as hub, tempfile.TemporaryDirectory(prefix="squeeze-") as data:
        hub.add(MODEL, tiny.llama(home / "llama"))
        with launched(Path(data), home / "log", HF_ENDPOINT=hub.url) as launcher:
            yield Service(ready(launcher, home / "log"), hub)
            launcher.terminate()
            launcher.wait()


@pytest.fixture(scope="module")
def finished(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The README's block as it stands, but for the address and the two lines that would cancel the job."""
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"## With curl\n+```sh\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    script = block[1].replace("http://127.0.0.1:8000", service.url)
    assert script.count("-X POST") == 2
    script = "\n".join(line for line in script.splitlines() if "-X POST" not in line)
    directory = tmp_path_factory.mktemp("readme")
    done = subprocess.run(
        ["bash", "-eu", "-c", script + "\necho $JOB > job"], cwd=directory, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    job_id = (directory / "job").read_text().strip()
    assert service.job(job_id)["status"] == "succeeded", service.job(job_id)
    return Finished(f"{service.url}/v1/jobs/{job_id}", job_id, directory, done.stdout)


def test_the_lines_of_the_readme_do_what_they_say(finished: Finished) -> None:
    assert (finished.directory / "model.safetensors").stat().st_size == finished.file["bytes"]
    assert f"{finished.file['sha256']}  model.safetensors" in finished.output
    assert f"{finished.id}/{FILE}" in names_in_tar(finished.directory / "result.tar")
    assert '"perplexity_before"' in finished.output
    assert "event: status" in finished.output


def test_a_repeated_submit_makes_one_job_and_another_body_is_refused(service: Service) -> None:
    key = ("-H", "Idempotency-Key: once")
    body = {"model": "no/where", "steps": [{"kind": "quantize", "method": "rtn"}]}
    first, second = (answered(f"{service.url}/v1/jobs", *key, *JSON, "-d", json.dumps(body)) for _ in range(2))
    assert (first.status, second.status) == (202, 202)
    assert first.json["id"] == second.json["id"]
    assert first.headers["location"] == f"/v1/jobs/{first.json['id']}"
    other = answered(f"{service.url}/v1/jobs", *key, *JSON, "-d", json.dumps(body | {"seed": 1}))
    assert (other.status, other.json["error"]["code"]) == (422, "idempotency_mismatch")
    assert other.headers["content-type"] == "application/problem+json"
    wait_until(lambda: service.job(first.json["id"])["status"] == "failed")
    assert service.job(first.json["id"])["error"]["code"] == "model_not_found"
    deleted = answered(f"{service.url}/v1/jobs/{first.json['id']}", "-X", "DELETE")
    assert (deleted.status, deleted.json["deleted"]) == (200, True)
    assert answered(f"{service.url}/v1/jobs/{first.json['id']}").status == 404


def test_a_stream_that_broke_goes_on_after_the_last_event_and_a_cancel_ends_it(
    service: Service, tmp_path: Path
) -> None:
    service.hub.add("tiny/held", tiny.llama(tmp_path / "held", seed=1))
    service.hub.faults.hold_after = 0
    body = {"model": "tiny/held", "steps": [{"kind": "quantize", "method": "rtn", "group_size": 32}]}
    job_id = asked(f"{service.url}/v1/jobs", *JSON, "-d", json.dumps(body))["id"]
    events = f"{service.url}/v1/jobs/{job_id}/events"
    stream = ("-N", "-H", "Accept: text/event-stream")
    with (tmp_path / "first").open("wb") as out, subprocess.Popen([*CURL, *stream, events], stdout=out) as follower:
        wait_until(lambda: '"pulling"' in (tmp_path / "first").read_text())
        follower.kill()
    seen = ids((tmp_path / "first").read_text())

    running = [*CURL, *stream, "-H", f"Last-Event-ID: {seen[-1]}", events]
    with (tmp_path / "rest").open("wb") as out, subprocess.Popen(running, stdout=out) as follower:
        answer = answered(f"{service.url}/v1/jobs/{job_id}/cancel", "-X", "POST")
        assert (answer.status, answer.json["status"]) == (200, "cancelling")
        assert follower.wait(60) == 0, "the stream ends with the job"
    service.hub.faults.hold_after = None
    service.hub.faults.let_go.set()
    assert service.job(job_id)["status"] == "cancelled"
    rest = ids((tmp_path / "rest").read_text())
    assert seen + rest == [event["id"] for event in asked(f"{events}?limit=1000")["data"]]
    assert answered(events, *stream, "-H", f"Last-Event-ID: {rest[-1]}").status == 204
    assert answered(f"{service.url}/v1/jobs/{job_id}/cancel", "-X", "POST").status == 200, "twice is as good as once"


def test_a_download_that_was_interrupted_goes_on_where_it_broke(finished: Finished, tmp_path: Path) -> None:
    url, target = f"{finished.url}/artifacts/{FILE}", tmp_path / "model.safetensors"
    broken = f"{shlex.join(CURL)} {url} 2>/dev/null | head -c 100000 > {target}"  # curl dies of its closed pipe
    subprocess.run(["bash", "-c", broken], check=True)
    assert target.stat().st_size == 100000
    curl("--fail", "--location", "--continue-at", "-", "-o", str(target), url)
    assert digest(target) == finished.file["sha256"]

    part = tmp_path / "part"
    curl("-r", "0-999", "-o", str(part), url)
    assert part.stat().st_size == 1000
    curl("--fail", "-C", "-", "-o", str(part), url)
    assert digest(part) == finished.file["sha256"]
    subprocess.run([*CURL, "--fail", "-C", "-", "-o", str(part), url], check=False, capture_output=True)  # 416
    assert digest(part) == finished.file["sha256"], "what is whole stays whole"


def test_what_one_has_already_is_not_sent_again(finished: Finished, tmp_path: Path) -> None:
    url = f"{finished.url}/artifacts/{FILE}"
    head = answered(url, "--head")
    assert (head.status, int(head.headers["content-length"])) == (200, finished.file["bytes"])
    assert head.headers["etag"] == f'"{finished.file["sha256"]}"'
    unchanged = answered(url, "-H", f"If-None-Match: {head.headers['etag']}")
    assert (unchanged.status, unchanged.body) == (304, b"")
    saved, etag = tmp_path / "saved", tmp_path / "etag"
    curl("--etag-save", str(etag), "-o", str(saved), url)
    curl("--etag-compare", str(etag), "-o", str(tmp_path / "again"), url)
    assert digest(saved) == finished.file["sha256"]
    assert not (tmp_path / "again").exists() or (tmp_path / "again").stat().st_size == 0


def test_a_range_beyond_the_end_is_refused_with_the_size(finished: Finished) -> None:
    beyond = answered(f"{finished.url}/artifacts/{FILE}", "-r", f"{finished.file['bytes']}-")
    assert (beyond.status, beyond.json["error"]["code"]) == (416, "range_unsatisfiable")
    assert beyond.headers["content-range"] == f"bytes */{finished.file['bytes']}"
    part = answered(f"{finished.url}/artifacts/{FILE}", "-r", "8-15")
    assert (part.status, len(part.body)) == (206, 8)
    assert part.headers["content-range"] == f"bytes 8-15/{finished.file['bytes']}"


def test_the_archive_holds_every_artifact_and_can_be_resumed_too(finished: Finished, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.tar", tmp_path / "broken.tar"
    curl("-o", str(whole), f"{finished.url}/archive")
    listed = {f"{finished.id}/{each['filename']}" for each in asked(f"{finished.url}/artifacts")["data"]}
    assert set(names_in_tar(whole)) == listed
    curl("-r", "0-99999", "-o", str(broken), f"{finished.url}/archive")
    curl("--fail", "-C", "-", "-o", str(broken), f"{finished.url}/archive")
    assert digest(broken) == digest(whole)
    subprocess.run(["tar", "-xf", str(whole), "-C", str(tmp_path)], check=True)
    assert digest(tmp_path / finished.id / FILE) == finished.file["sha256"]


def test_the_report_is_json_or_a_page(finished: Finished) -> None:
    report = answered(f"{finished.url}/report")
    assert report.json["quality"]["divergence_nats"] > 0
    page = answered(f"{finished.url}/report", "-H", "Accept: text/html")
    assert page.headers["content-type"].startswith("text/html")
    assert b"<!doctype html>" in page.body.lower()


def test_a_file_is_uploaded_listed_and_deleted(service: Service, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "some words"}\n')
    form = ("-F", "purpose=calibration", "-F", f"file=@{tmp_path}/text.jsonl")
    file = asked(f"{service.url}/v1/files", *form)
    assert file["sha256"] == digest(tmp_path / "text.jsonl")
    assert [each["id"] for each in asked(f"{service.url}/v1/files")["data"]] == [file["id"]]
    assert answered(f"{service.url}/v1/files/{file['id']}", "-X", "DELETE").json["deleted"]
    assert asked(f"{service.url}/v1/files")["data"] == []


def test_what_asks_for_no_job_answers(service: Service) -> None:
    body = {"model": MODEL, "steps": [{"kind": "quantize", "method": "gptq", "group_size": 64}]}
    plan = asked(f"{service.url}/v1/plan", *JSON, "-d", json.dumps(body))
    assert (plan["feasible"], plan["obstacles"]) == (True, [])
    assert {each["method"] for each in asked(f"{service.url}/v1/methods")["data"]} >= {"rtn", "gptq"}
    assert [answered(f"{service.url}/{each}").status for each in ("healthz", "readyz", "docs")] == [200, 200, 200]
    assert b"squeeze_jobs{" in answered(f"{service.url}/metrics").body
    wrong = answered(f"{service.url}/v1/jobs", *JSON, "-d", '{"model": "org/name"}')
    assert (wrong.status, wrong.json["error"]["param"]) == (422, "steps")


CURL = ("curl", "--silent", "--show-error", "--max-time", "120")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def curl(*arguments: str) -> bytes:
    done = subprocess.run([*CURL, *arguments], check=False, capture_output=True)
    assert done.returncode == 0, (shlex.join(arguments), done.stderr.decode())
    return done.stdout


def answered(url: str, *arguments: str) -> Answer:
    """Status, headers with small names, and body."""
    told, _, body = curl("--include", *arguments, url).partition(b"\r\n\r\n")
    if told.startswith(b"HTTP/1.1 100"):
        told, _, body = body.partition(b"\r\n\r\n")
    first, *lines = told.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return Answer(int(first.split()[1]), headers, body)


def asked(url: str, *arguments: str) -> Any:
    answer = answered(url, *arguments)
    assert answer.status < 300, answer.body
    return answer.json


def ids(stream: str) -> list[int]:
    return [int(each) for each in re.findall(r"^id: ?(\d+)$", stream, re.MULTILINE)]


def names_in_tar(path: Path) -> list[str]:
    listing = subprocess.run(["tar", "-tf", str(path)], check=True, capture_output=True, text=True).stdout
    return [name for name in listing.splitlines() if not name.endswith("/")]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
