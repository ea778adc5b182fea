"""The service spread out as docker-compose.yml does it.

PostgreSQL, Redis with a password, an S3 server, and each part of ours a process of its own that shares nothing else.
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from squeeze import Client
from squeeze.errors import FileNotFound, JobNotFound
from squeeze.objects import Event, File, Job
from storage import open_storage
from tests import servers
from tests.hub import FaultyHub
from tests.models import tiny
from tests.servers import free_port, wait_until
from tests.storage.radosgw import missing, radosgw
from tests.storage.servers import S3Server, moto

ROOT = Path(__file__).resolve().parents[1]
S3_SERVERS = ["moto", pytest.param("radosgw", marks=pytest.mark.slow)]
PATIENCE_SECONDS = 120.0
SPEC: dict[str, Any] = {
    "model": "tiny/llama",
    "steps": [{"kind": "quantize", "method": "rtn", "bits": 4, "group_size": 32}],
    "evaluation": {"samples": 4},
}


@dataclass
class Topology:
    """Where everything is, and what `python -m …` needs in its environment to find it.

    our_key, their_key: of two projects.
    """

    url: str
    bucket: str
    s3: S3Server
    hub: FaultyHub
    redis: "subprocess.Popen[bytes]"
    redis_port: int
    redis_password: str
    logs: Path
    stack: ExitStack
    our_key: str
    their_key: str

    def client(self, key: str) -> Client:
        return self.stack.enter_context(Client(self.url, key))

    def stored(self) -> list[str]:
        return list(open_storage(f"s3://{self.bucket}", self.s3.environ).list(""))

    def restart_redis(self) -> None:
        """Empty, on the port that the killed one had."""
        program = str(shutil.which("redis-server"))
        _, self.redis = self.stack.enter_context(
            servers.redis_server(program, port=self.redis_port, password=self.redis_password)
        )


@pytest.fixture(scope="module", params=S3_SERVERS)
def s3(request: pytest.FixtureRequest) -> Iterator[S3Server]:
    if request.param == "radosgw" and (absent := missing()):
        pytest.skip(f"not installed: {', '.join(absent)} (Debian: ceph-mon ceph-mgr ceph-osd radosgw ceph-common)")
    with moto() if request.param == "moto" else radosgw() as server:
        yield server


@pytest.fixture(scope="module")
def topology(s3: S3Server, _postgresql: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Topology]:
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    name, password, port = f"topology_{uuid4().hex}", uuid4().hex, free_port()
    home = tmp_path_factory.mktemp("topology")
    bucket = s3.make_bucket()
    servers.administer(_postgresql, f"CREATE DATABASE {name}")
    with ExitStack() as stack:
        hub = stack.enter_context(FaultyHub())
        hub.add("tiny/llama", tiny.llama(home / "llama"))
        redis_port = free_port()
        broker_url, redis = stack.enter_context(servers.redis_server(program, port=redis_port, password=password))
        environ = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SQUEEZE_", "AWS_", "HF_"))},
            **s3.environ,
            "SQUEEZE_DATABASE_URL": servers.with_database(_postgresql, name),
            "SQUEEZE_BROKER_URL": broker_url,
            "SQUEEZE_STORAGE_URL": f"s3://{bucket}/squeeze",
            "SQUEEZE_PORT": str(port),
            "SQUEEZE_SWEEP_SECONDS": "0.5",
            "HF_ENDPOINT": hub.url,
        }
        run(["jobs", "migrate"], environ)
        stack.enter_context(running("api", [], environ | {"SQUEEZE_DATA": str(home / "api")}, home / "api.log"))
        worker = environ | {"SQUEEZE_DATA": str(home / "worker")}
        stack.enter_context(running("workers", ["--device", "cpu"], worker, home / "worker.log"))
        url = f"http://127.0.0.1:{port}"
        keys = [make_key(project, environ) for project in ("search", "ads")]
        wait_until(lambda: is_ready(url))
        yield Topology(url, bucket, s3, hub, redis, redis_port, password, home, stack, *keys)
    servers.administer(_postgresql, f"DROP DATABASE {name} WITH (FORCE)")


def test_a_job_goes_its_whole_way_for_its_project_alone_and_leaves_nothing_behind(
    topology: Topology, tmp_path: Path
) -> None:
    ours, theirs = topology.client(topology.our_key), topology.client(topology.their_key)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"def function_{n}(argument):\n    return argument + {n}" for n in range(2000)))
    file = ours.files.upload(text, "evaluation")
    job = ours.jobs.create(**SPEC | {"evaluation": {"samples": 4, "source": file.id}})
    events = [*ours.jobs.events(job.id)]
    job = ours.jobs.get(job.id)
    assert job.status == "succeeded", (job.error, (topology.logs / "worker.log").read_text()[-3000:])
    assert job.model_revision == topology.hub.repos["tiny/llama"].refs["main"]
    assert [event.data["status"] for event in events if event.type == "status"] == ["queued", "running", "succeeded"]
    assert [event.id for event in events] == [event.id for event in ours.jobs.events(job.id, follow=False)]

    report = ours.jobs.report(job.id)
    assert report.quality is not None
    assert report.quality.text.origin == file.id
    assert ("compressed-tensors", "transformers", "passed") in [
        (c.format, c.consumer, c.outcome) for c in report.certificates
    ]

    come_by_presigned_links_and_in_the_archive(topology, ours, job, tmp_path / "out")
    sees_nothing(theirs, job, file)

    assert ours.jobs.delete(job.id).deleted
    assert ours.files.delete(file.id).deleted
    with pytest.raises(JobNotFound):
        ours.jobs.get(job.id)
    assert topology.stored() == []
    told = "".join((topology.logs / f"{part}.log").read_text() for part in ("api", "worker"))
    told += report.model_dump_json() + "".join(event.model_dump_json() for event in events)
    secrets = (topology.our_key, topology.their_key, topology.redis_password, topology.s3.secret_key)
    assert not [secret for secret in secrets if secret in told]


def come_by_presigned_links_and_in_the_archive(topology: Topology, client: Client, job: Job, out: Path) -> None:
    key = {"Authorization": f"Bearer {topology.our_key}"}
    artifacts = {artifact.filename: artifact for artifact in client.jobs.artifacts(job.id)}
    with httpx.Client(base_url=f"{topology.url}/v1/jobs/{job.id}", headers=key) as http:
        for name, artifact in artifacts.items():
            redirect = http.get(f"artifacts/{name}")
            assert redirect.status_code == 307
            link = redirect.headers["Location"]
            assert link.startswith(f"{topology.s3.endpoint}/{topology.bucket}/squeeze/")
            content = httpx.get(link).content  # without a key
            assert (len(content), hashlib.sha256(content).hexdigest()) == (artifact.bytes, artifact.sha256)
        archive = http.get("archive").content
    client.jobs.download(job.id, out)  # which checks each SHA-256 itself
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
        packed = {name: file.read() for name, file in members.items() if file is not None}
    assert packed == {f"{job.id}/{name}": (out / name).read_bytes() for name in artifacts}


def sees_nothing(client: Client, job: Job, file: File) -> None:
    """Of another project's job and file, not even that they are there."""
    assert [*client.jobs.list(), *client.files.list()] == []
    jobs = client.jobs
    for ask in (jobs.get, jobs.cancel, jobs.retry, jobs.delete, jobs.artifacts, jobs.report, follow(client)):
        with pytest.raises(JobNotFound):
            ask(job.id)
    for ask_file in (client.files.get, client.files.delete):
        with pytest.raises(FileNotFound):
            ask_file(file.id)


def follow(client: Client) -> Callable[[str], list[Event]]:
    return lambda job_id: [*client.jobs.events(job_id)]


def test_jobs_outlive_a_redis_that_is_killed_and_comes_back_empty(topology: Topology) -> None:
    client = topology.client(topology.our_key)
    topology.hub.faults.hold_after = 0
    running_job = client.jobs.create(**SPEC)
    wait_until(lambda: client.jobs.get(running_job.id).stage == "pulling")
    # Neither model exists: once a worker hears of these two they end at once, and say so.
    lost_message = client.jobs.create(**SPEC | {"model": "tiny/absent"})
    topology.redis.kill()
    topology.redis.wait()
    assert httpx.get(f"{topology.url}/readyz").status_code == 503
    unsent_message = client.jobs.create(**SPEC | {"model": "tiny/absent"})
    topology.restart_redis()
    topology.hub.faults.hold_after = None
    topology.hub.faults.let_go.set()

    ended = [
        client.jobs.wait(job.id, timeout_seconds=PATIENCE_SECONDS)
        for job in (running_job, lost_message, unsent_message)
    ]
    assert [(job.status, job.attempt) for job in ended] == [("succeeded", 1), ("failed", 1), ("failed", 1)]
    assert [job.error and job.error.code for job in ended] == [None, "model_not_found", "model_not_found"]
    assert httpx.get(f"{topology.url}/readyz").status_code == 200


def make_key(project: str, environ: dict[str, str]) -> str:
    return run(["jobs", "keys", "create", "--project", project, "--name", "test"], environ).stdout.strip()


def run(arguments: list[str], environ: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """`python -m …` to its end."""
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environ, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@contextmanager
def running(module: str, arguments: list[str], environ: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], cwd=ROOT, env=environ, stdout=output, stderr=output
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False
