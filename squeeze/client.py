"""The Python client: `squeeze.Client`.

    client = squeeze.Client()  # SQUEEZE_URL, SQUEEZE_API_KEY
    job = client.jobs.create(model="org/name", steps=[{"kind": "quantize", "method": "gptq", "bits": 4}])
    job = client.jobs.wait(job.id)
    client.jobs.download(job.id, Path("out"))

Answers are the classes of `squeeze.objects`; errors are those of `squeeze.errors`, the same that the service raised.
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import quote

import httpx
from pydantic import BaseModel

from squeeze.download import OnBytes, download, place
from squeeze.errors import ConnectionFailed, ServiceUnavailable
from squeeze.objects import FINAL, Artifact, Deleted, Event, File, Item, Job, Method, Page, Plan, Status
from squeeze.reports.report import Report
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.compressing import Compress
from squeeze.steps.merging import Merge
from squeeze.steps.slimming import Slim
from squeeze.steps.training import Train
from squeeze.transport import Transport, pause_seconds

DEFAULT_URL = "http://127.0.0.1:8000"
PAGE_ITEMS = 100
LONGEST_POLL_SECONDS = 2.0
# A service that is restarted while somebody waits for a job is back well within this time.
PATIENCE_SECONDS = 60.0

Purpose = Literal["calibration", "training", "evaluation"]


class Client:
    """One service. Safe to share between threads; close it, or use it as a context manager."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_seconds: float = 60.0,
        retries: int = 4,
    ) -> None:
        url = base_url or os.environ.get("SQUEEZE_URL") or DEFAULT_URL
        key = api_key or os.environ.get("SQUEEZE_API_KEY") or None
        self._transport = Transport(url, key, timeout_seconds=timeout_seconds, retries=retries)
        self.jobs = Jobs(self._transport)
        self.files = Files(self._transport)

    @property
    def base_url(self) -> str:
        return self._transport.base_url

    def plan(self, spec: JobSpec | Mapping[str, Any] | None = None, /, **fields: Any) -> Plan:
        """What a job would need and what stands in its way; takes what `jobs.create` takes, and runs nothing."""
        body = _body(spec, fields)
        return self._transport.ask(Plan, "POST", "/v1/plan", repeatable=True, content=body, headers=_JSON)

    def methods(self) -> list[Method]:
        """Every method that the service knows, with the JSON schema of its parameters."""
        return self._transport.ask(Page[Method], "GET", "/v1/methods", repeatable=True).data

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Jobs:
    """`client.jobs`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self,
        spec: JobSpec | Mapping[str, Any] | None = None,
        /,
        *,
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> Job:
        """Submits a job: a `JobSpec`, a mapping, or the fields as keywords (`model=…, steps=[…]`).

        An `Idempotency-Key` always goes along, so that a lost answer never makes two jobs. Give your own to make the
        call safe across restarts of your program too.
        """
        key = idempotency_key or str(uuid.uuid4())
        body = _body(spec, fields)
        headers = _JSON | {"Idempotency-Key": key}
        return self._transport.ask(Job, "POST", "/v1/jobs", repeatable=True, content=body, headers=headers)

    def list(
        self,
        *,
        status: Status | str | None = None,
        kind: str | None = None,
        metadata: Mapping[str, str] | None = None,
        limit: int | None = None,
    ) -> Iterator[Job]:
        """The project's jobs, newest first, page by page as they are asked for; at most `limit` of them."""
        query = {"status": status, "kind": kind}
        query |= {f"metadata[{name}]": value for name, value in (metadata or {}).items()}
        return _pages(self._transport, "/v1/jobs", Page[Job], query, limit)

    def get(self, job_id: str) -> Job:
        return self._transport.ask(Job, "GET", _job(job_id), repeatable=True)

    def cancel(self, job_id: str) -> Job:
        """Asks for the job's end. A queued job is cancelled at once, a running one within seconds."""
        return self._transport.ask(Job, "POST", f"{_job(job_id)}/cancel", repeatable=True)

    def retry(self, job_id: str) -> Job:
        """Queues a failed or cancelled job again; it goes on from what its last attempt kept."""
        return self._transport.ask(Job, "POST", f"{_job(job_id)}/retry")

    def delete(self, job_id: str) -> Deleted:
        """Removes a final job with its artifacts."""
        return self._transport.ask(Deleted, "DELETE", _job(job_id))

    def wait(
        self, job_id: str, *, timeout_seconds: float | None = None, on_poll: Callable[[Job], None] | None = None
    ) -> Job:
        """Returns the job once it has ended, whichever way: look at its `status` and `error`.

        Outlives a restart of the service. Raises TimeoutError when the job still runs after `timeout_seconds`.
        """
        begun = answered = time.monotonic()
        pause = 0.1
        while True:
            try:
                job = self.get(job_id)
            except (ConnectionFailed, ServiceUnavailable):
                if time.monotonic() - answered > PATIENCE_SECONDS:
                    raise
            else:
                answered = time.monotonic()
                if on_poll is not None:
                    on_poll(job)
                if job.status in FINAL:
                    return job
                if timeout_seconds is not None and answered - begun + pause > timeout_seconds:
                    raise TimeoutError(f"{job_id} is still {job.status.value} after {timeout_seconds} seconds")
            time.sleep(pause)
            pause = min(pause * 1.5, LONGEST_POLL_SECONDS)

    def events(self, job_id: str, *, after: int = 0, follow: bool = True) -> Iterator[Event]:
        """The job's events after the one numbered `after`.

        With `follow` they come as they happen until the job ends; a lost connection is taken up again where it broke.
        """
        if not follow:
            yield from self._recorded(job_id, after)
            return
        answered, failures = time.monotonic(), 0
        while True:
            try:
                headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
                with self._transport.stream(f"{_job(job_id)}/events", headers) as response:
                    for event in _server_sent(response):
                        answered, failures, after = time.monotonic(), 0, event.id
                        yield event
                # The service closes the stream when the job is final, and also when it stops.
                if self.get(job_id).status in FINAL:
                    yield from self._recorded(job_id, after)
                    return
            except (httpx.TransportError, ConnectionFailed, ServiceUnavailable) as lost:
                if time.monotonic() - answered > PATIENCE_SECONDS:
                    raise (
                        self._transport.unreachable(lost) if isinstance(lost, httpx.TransportError) else lost
                    ) from lost
            time.sleep(pause_seconds(min(failures, 4)))
            failures += 1

    def artifacts(self, job_id: str) -> Sequence[Artifact]:
        return self._transport.ask(Page[Artifact], "GET", f"{_job(job_id)}/artifacts", repeatable=True).data

    def download(
        self,
        job_id: str,
        directory: Path | str,
        *,
        format: str | None = None,
        parallel: int = 1,
        on_bytes: OnBytes | None = None,
    ) -> Sequence[Path]:
        """Writes the job's artifacts below `directory` and returns their paths.

        Only those of `format` where one is named. What an interrupted call left is resumed; what is there already, with
        the right SHA-256, is left as it is. `on_bytes(artifact, bytes so far)` is called on the way, from several
        threads where `parallel` is more than one.
        """
        root = Path(directory)
        wanted = [artifact for artifact in self.artifacts(job_id) if format in (None, artifact.format)]
        targets = [place(root, artifact.filename) for artifact in wanted]

        def one(artifact: Artifact, target: Path) -> Path:
            path = f"{_job(job_id)}/artifacts/{quote(artifact.filename)}"
            download(self._transport, path, artifact, target, on_bytes)
            return target

        if parallel <= 1:
            return [one(artifact, target) for artifact, target in zip(wanted, targets, strict=True)]
        with ThreadPoolExecutor(parallel) as pool:
            return [*pool.map(one, wanted, targets)]

    def report(self, job_id: str) -> Report:
        return self._transport.ask(Report, "GET", f"{_job(job_id)}/report", repeatable=True)

    def _recorded(self, job_id: str, after: int) -> Iterator[Event]:
        return _pages(self._transport, f"{_job(job_id)}/events", Page[Event], {"after": after}, None)


class Files:
    """`client.files`: text to calibrate and to evaluate on."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def upload(self, path: Path | str, purpose: Purpose = "calibration") -> File:
        """Uploads a JSONL, plain text or parquet file, streamed; name its id in `data.source`."""
        with Path(path).open("rb") as file:
            form = {"purpose": purpose}
            return self._transport.ask(File, "POST", "/v1/files", data=form, files={"file": (Path(path).name, file)})

    def list(self, *, limit: int | None = None) -> Iterator[File]:
        return _pages(self._transport, "/v1/files", Page[File], {}, limit)

    def get(self, file_id: str) -> File:
        return self._transport.ask(File, "GET", _file(file_id), repeatable=True)

    def delete(self, file_id: str) -> Deleted:
        return self._transport.ask(Deleted, "DELETE", _file(file_id))


_JSON = {"Content-Type": "application/json"}


def _body(spec: JobSpec | Mapping[str, Any] | None, fields: Mapping[str, Any]) -> bytes:
    """The JSON of a spec. What was never set is left out, so that an older service need not know it; a mapping goes
    out as it is, and the service says what is wrong with it."""
    described = _described(spec) if isinstance(spec, JobSpec) else dict(spec or {})
    return json.dumps({**described, **fields}, default=_described).encode()


def _described(value: object) -> dict[str, Any]:
    if not isinstance(value, BaseModel):
        raise TypeError(f"{type(value).__name__} can't be sent as JSON")
    described = value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, JobSpec):
        described["steps"] = [_described(step) for step in value.steps]
    if isinstance(value, Compress | Train | Merge | Slim):
        described["kind"] = value.kind  # it has a default, yet the service tells steps apart by it
    return described


def _job(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _file(file_id: str) -> str:
    return f"/v1/files/{quote(file_id, safe='')}"


def _pages(
    transport: Transport, path: str, page: type[Page[Item]], query: Mapping[str, object], limit: int | None
) -> Iterator[Item]:
    """The items of a list, asked for page by page; at most `limit` of them."""
    sent = {name: str(value) for name, value in query.items() if value is not None}
    left = limit
    while left is None or left > 0:
        sent["limit"] = str(PAGE_ITEMS if left is None else min(left, PAGE_ITEMS))
        answer = transport.ask(page, "GET", path, repeatable=True, params=sent)
        yield from answer.data
        if not answer.has_more or answer.last_id is None:
            return
        sent["after"] = answer.last_id
        left = None if left is None else left - len(answer.data)


def _server_sent(response: httpx.Response) -> Iterator[Event]:
    """The events of a `text/event-stream`. Lines end at newlines alone: JSON may hold U+2028, which ends none."""
    data: list[str] = []
    rest = b""
    for chunk in response.iter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            text = line.removesuffix(b"\r").decode()
            if text.startswith("data:"):
                data.append(text.removeprefix("data:").removeprefix(" "))
            elif not text and data:
                yield Event.model_validate_json("\n".join(data))
                data = []
