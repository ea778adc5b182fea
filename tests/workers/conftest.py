"""Workers of the tests: the real ones, on a database and a storage of their own, in this process or another."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs import files, lifecycle, listing
from jobs.database import Database
from jobs.queue import celery_app, enqueue
from jobs.records import EventRecord, JobRecord, new_id
from jobs.settings import Settings
from squeeze.objects import Status
from squeeze.specs.job_spec import JobSpec
from storage import open_storage
from tests.hub import FaultyHub
from workers.forkserver import DEFAULT_ENTRY
from workers.groups import Ledger
from workers.spawn import ForkServer
from workers.worker import Worker

PROJECT = "default"
TOKEN = "hf_ThisIsTheSecretOfTheTests"
NASTY = "tests.workers.children:run"
PATIENCE_SECONDS = 60.0
CODE = "\n".join(f"def function_{n}(argument):\n    return argument + {n}" for n in range(2000))


def eventually(true: Callable[[], Any], what: str) -> Any:
    """Waits until it is, and returns what it then was."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if found := true():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {PATIENCE_SECONDS:g} seconds: {what}")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


@dataclass
class Place:
    """A service's data directory with everything in it but the processes."""

    settings: Settings
    database: Database

    def submit(self, do: str | None = None, **fields: Any) -> str:
        given: dict[str, Any] = {"model": "org/model", "steps": [{"kind": "quantize", "method": "rtn"}]} | fields
        if do is not None:
            given["metadata"] = {"do": do}
        with self.database.write() as session:
            record, _ = lifecycle.submit(
                session, project=PROJECT, spec=JobSpec.model_validate(given), idempotency_key=None, body_hash="-"
            )
        return record.id

    def ring(self, job_id: str) -> None:
        enqueue(celery_app(self.settings.broker_url), job_id, "cpu", 0)

    def job(self, job_id: str) -> JobRecord:
        with self.database.read() as session:
            return listing.find(session, PROJECT, job_id)

    def cancel(self, job_id: str) -> None:
        with self.database.write() as session:
            lifecycle.cancel(session, PROJECT, job_id)

    def events(self, job_id: str) -> list[EventRecord]:
        with self.database.read() as session:
            return listing.events(session, job_id, limit=1000)

    def artifacts(self, job_id: str) -> list[str]:
        with self.database.read() as session:
            return [artifact.filename for artifact in listing.artifacts(session, PROJECT, job_id)]

    def stored(self, job_id: str) -> list[str]:
        return list(open_storage(self.settings.storage_url).list(f"jobs/{job_id}"))

    def scratch(self, job_id: str) -> Path:
        return self.settings.scratch / job_id

    def pid(self, job_id: str, who: str = "child", attempt: int = 1) -> int:
        """Of a child, once it is at work."""
        path = self.scratch(job_id) / who
        text = eventually(
            lambda: self.job(job_id).attempt >= attempt and path.is_file() and path.read_text(), f"{who} at work"
        )
        return int(text)

    def at_work(self, job_id: str, attempt: int = 1) -> int:
        """Waits until the child of an attempt has told of a stage; its process id."""
        eventually(lambda: self.job(job_id).attempt == attempt and self.job(job_id).stage, "a stage")
        return self.pid(job_id, attempt=attempt)


@pytest.fixture
def place(tmp_path: Path, sqlite_url: str, valkey_url: str) -> Iterator[Place]:
    yield from _place(tmp_path, sqlite_url, valkey_url)


@pytest.fixture
def place_on_either_database(tmp_path: Path, database_url: str, valkey_url: str) -> Iterator[Place]:
    yield from _place(tmp_path, database_url, valkey_url)


def _place(tmp_path: Path, database_url: str, broker_url: str) -> Iterator[Place]:
    settings = Settings(
        data=tmp_path,
        database_url=database_url,
        broker_url=broker_url,
        storage_url=(tmp_path / "storage").as_uri(),
        lease_seconds=10.0,
        sweep_seconds=0.5,
        worker_device="cpu",
    )
    database = Database(database_url)
    yield Place(settings, database)
    database.dispose()


@pytest.fixture(scope="session")
def _environment() -> Iterator[None]:
    """A secret that every process of the tests has."""
    before = os.environ.get("HF_TOKEN")
    os.environ["HF_TOKEN"] = TOKEN
    yield
    if before is None:
        del os.environ["HF_TOKEN"]
    else:
        os.environ["HF_TOKEN"] = before


@pytest.fixture(scope="session")
def nasty_server(tmp_path_factory: pytest.TempPathFactory, _environment: None) -> Iterator[ForkServer]:
    """A fork server whose children do what a test asks for; shared, so that it is started once."""
    ledger = Ledger(tmp_path_factory.mktemp("nasty"), "nasty")
    server = ForkServer(ledger, NASTY)
    yield server
    server.close()
    ledger.close()


@contextmanager
def worker_here(place: Place, server: ForkServer, device: str = "cpu") -> Iterator[Worker]:
    """A worker in this process, without the queue: a test hands it the jobs."""
    ledger = Ledger(place.settings.scratch / "workers", "here")
    yield Worker(
        place.settings,
        app=celery_app(place.settings.broker_url),
        database=place.database,
        storage=open_storage(place.settings.storage_url),
        ledger=ledger,
        server=server,
        name="here",
        device=device,
    )
    ledger.close()


@pytest.fixture
def worker(place: Place, nasty_server: ForkServer) -> Iterator[Worker]:
    with worker_here(place, nasty_server) as worker:
        yield worker


class Running:
    """A job that a worker of this process runs, in a thread."""

    def __init__(self, worker: Worker, job_id: str) -> None:
        self._statuses: list[Status | None] = []
        self._thread = threading.Thread(target=lambda: self._statuses.append(worker.run_job(job_id)))
        self._thread.start()

    def status(self) -> Status | None:
        """Where the job went, once the attempt has ended."""
        self._thread.join(PATIENCE_SECONDS)
        assert self._statuses, "the attempt has not ended"
        return self._statuses[0]


@pytest.fixture(scope="module")
def warm_server(tmp_path_factory: pytest.TempPathFactory, hub: FaultyHub) -> Iterator[ForkServer]:
    """Jobs of it pull from the Hub that the module has as `hub`."""
    with pytest.MonkeyPatch.context() as environ:
        environ.setenv("HF_ENDPOINT", hub.url)
        ledger = Ledger(tmp_path_factory.mktemp("warm"), "warm")
        server = ForkServer(ledger, DEFAULT_ENTRY)
        server.start()
    yield server
    server.close()
    ledger.close()


@contextmanager
def worker_process(
    place: Place, name: str = "one", entry: str = NASTY, **environ: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """`python -m workers` as an operator starts it; killed at the end if it still runs."""
    settings = place.settings
    given = {
        "SQUEEZE_DATA": str(settings.data),
        "SQUEEZE_DATABASE_URL": settings.database_url,
        "SQUEEZE_BROKER_URL": settings.broker_url,
        "SQUEEZE_LEASE_SECONDS": "2",
        "SQUEEZE_SWEEP_SECONDS": "0.5",
        "HF_TOKEN": TOKEN,
    }
    command = [sys.executable, "-m", "workers", "--device", "cpu", "--name", name, "--entry", entry]
    with (settings.data / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(command, env={**os.environ, **given, **environ}, stdout=log, stderr=log)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def upload(place: Place, text: str = CODE) -> str:
    """A text whose uploader gave it a name that leads elsewhere."""
    file_id = new_id("file")
    stored = open_storage(place.settings.storage_url).put_stream(files.storage_key(file_id), [text.encode()])
    with place.database.write() as session:
        files.add(
            session,
            file_id=file_id,
            project=PROJECT,
            filename="../../evil.txt",
            size_bytes=stored.size_bytes,
            sha256=stored.sha256,
            purpose="calibration",
        )
    return file_id


def kill_child(worker: Worker, whose: str = "the fork server's") -> None:
    """The only child of the fork server, or that one's only child."""
    parent = worker.server.pid
    for _ in range(1 if whose == "the fork server's" else 2):
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        assert len(children) == 1, children
        parent = int(children[0])
    assert parent is not None
    os.kill(parent, signal.SIGKILL)


def weights(place: Place, job_id: str) -> dict[str, str]:
    with place.database.read() as session:
        artifacts = listing.artifacts(session, PROJECT, job_id)
    return {artifact.filename: artifact.sha256 for artifact in artifacts if artifact.filename.endswith(".safetensors")}
