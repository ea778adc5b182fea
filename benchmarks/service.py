"""What the service itself costs: a job's overhead, requests a second, downloads against nginx.

    python benchmarks/service.py [--write]

Starts the embedded service on a free port with a fresh data directory and the local Hub, and removes all of it. The
load comes from a process of its own. `--write` keeps the figures in `benchmarks/results/service.md`. Takes under four
minutes; nginx (`apt-get install nginx-light`) takes part where it is installed.
"""

import argparse
import json
import math
import os
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jobs import lifecycle  # noqa: E402
from jobs.database import Database  # noqa: E402
from jobs.lifecycle import NewArtifact  # noqa: E402
from scripts.chaos import COMMON, MODEL, RECIPES, make_model  # noqa: E402
from scripts.chaos_parts import children, command_of  # noqa: E402
from scripts.hub import Hub  # noqa: E402
from scripts.quickstart import running, service_environment, wait_until_ready  # noqa: E402
from squeeze import Client  # noqa: E402
from squeeze.objects import FINAL, Job, Result, Status, Usage  # noqa: E402
from squeeze.specs.job_spec import JobSpec  # noqa: E402
from storage import Storage, open_storage  # noqa: E402

LOAD = Path(__file__).with_name("load.py")
RESULTS = Path(__file__).with_name("results") / "service.md"
LONGEST_SECONDS = 235
JOBS, JOBS_SECONDS = 20, 140.0
POSTS, POLLS, CONNECTIONS, LOAD_SECONDS = 2000, 4000, 8, 10.0
DOWNLOADS, DOWNLOAD_BYTES = 9, 1 << 30
BLOCK_BYTES = 1 << 24
ARTIFACT = "compressed-tensors/model.safetensors"
NGINX = """
{user}daemon off;
worker_processes 1;
pid {place}/nginx.pid;
error_log {place}/nginx-error.log;
events {{}}
http {{
  access_log off;
  sendfile on;
  tcp_nopush on;
  client_body_temp_path {place}/b; proxy_temp_path {place}/p; fastcgi_temp_path {place}/f;
  uwsgi_temp_path {place}/u; scgi_temp_path {place}/s;
  server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {RESULTS.relative_to(ROOT)}")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LONGEST_SECONDS)
    lines = [machine(), ""]
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="squeeze-")))
        hub = stack.enter_context(Hub())
        hub.add(MODEL, make_model(place / "model"))
        environment = service_environment(place / "data", hub.url) | {"SQUEEZE_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
        for part in (overhead, throughput, downloads):
            for line in part(place, environment):
                print(line, flush=True)
                lines.append(line)
            lines.append("")
    if asked.write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text("# What the service itself costs\n\nMade by `make bench-service`. " + "\n".join(lines))


def machine() -> str:
    """One line about where the figures come from."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else "unknown processor"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    text = (
        f"{time.strftime('%Y-%m-%d')}: {cores} cores ({name}), {memory:.0f} GiB of memory, Python "
        f"{sys.version.split()[0]}; load average before the start {load:.1f}."
    )
    print(text + "\n", flush=True)
    return text


def overhead(place: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Of jobs that come one at a time to a worker that is warm."""
    log = place / "service.log"
    url = f"http://127.0.0.1:{environment['SQUEEZE_PORT']}"
    before: list[float] = []
    after: list[float] = []
    with running(["scripts/serve.py"], environment, log) as service, Client(url) as client:
        wait_until_ready(url, service, log)
        until = time.monotonic() + JOBS_SECONDS
        run_job(client, service.pid)  # warms up
        while len(before) < JOBS and time.monotonic() < until:
            seconds = run_job(client, service.pid)
            before.append(seconds[0])
            after.append(seconds[1])
    yield f"| overhead of a warm job ({len(before)} jobs, one at a time) | median | 95 % under |"
    yield "|---|---:|---:|"
    for name, each in (("submit until the child works", before), ("the child's end until the job is final", after)):
        yield f"| {name} | {1000 * statistics.median(each):.0f} ms | {1000 * percentile(each, 0.95):.0f} ms |"


def run_job(client: Client, launcher: int) -> tuple[float, float]:
    """Seconds from the submit to the first stage that the child told, and from the child's end to the job's."""
    submitted = client.jobs.create({**COMMON, **RECIPES["rtn 4 bits"]})
    ended_at = end_of(child_of(launcher))
    job = submitted
    while job.status not in FINAL:
        job = client.jobs.get(submitted.id)
        time.sleep(0.02)
    if job.status != Status.succeeded or job.finished_at is None:
        raise SystemExit(f"{job.id} {job.status}: {job.error}")
    stage = next(event for event in client.jobs.events(job.id, follow=False) if event.type == "stage")
    return (stage.created_at - job.created_at).total_seconds(), job.finished_at.timestamp() - ended_at


def child_of(launcher: int) -> int:
    """The process of the job that runs, as soon as there is one."""
    while True:
        for part in children(launcher):
            for server in children(part):
                if "workers.forkserver" in command_of(server) and (found := children(server)):
                    return found[0]
        time.sleep(0.01)


def end_of(pid: int) -> float:
    """Waits for a process that is not ours to end; the time of day when it did."""
    watch = os.pidfd_open(pid)
    try:
        select.select([watch], [], [])
        return time.time()
    finally:
        os.close(watch)


def throughput(place: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Of the API with no worker beside it."""
    with api_alone(place, environment) as url:
        spec = json.dumps({**COMMON, **RECIPES["rtn 4 bits"]})
        posts = load("requests", f"{url}/v1/jobs", "POST", POSTS, CONNECTIONS, LOAD_SECONDS, spec)
        with Client(url) as client:
            job: Job = next(client.jobs.list(limit=1))
        polls = load("requests", f"{url}/v1/jobs/{job.id}", "GET", POLLS, CONNECTIONS, LOAD_SECONDS)
    yield f"| requests over {CONNECTIONS} connections that are kept | a second | median | 95 % under | |"
    yield "|---|---:|---:|---:|---|"
    for name, done in (("`POST /v1/jobs`", posts), ("`GET /v1/jobs/{id}`", polls)):
        took = done["took"]
        wrong = f", **{len(done['wrong'])} refused**" if done["wrong"] else ""
        yield (
            f"| {name} | {len(took) / done['seconds']:.0f} | {1000 * statistics.median(took):.1f} ms | "
            f"{1000 * percentile(took, 0.95):.1f} ms | {len(took)} requests{wrong} |"
        )


def downloads(place: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """One large artifact, from the service and from nginx in turns; both read the same file, by then in the cache."""
    data = Path(environment["SQUEEZE_DATA"])
    storage = open_storage((data / "storage").as_uri())
    with api_alone(place, environment) as url, ExitStack() as stack:
        job_id, file = publish_large(place, data, storage)
        urls = {"Squeeze": f"{url}/v1/jobs/{job_id}/artifacts/{ARTIFACT}"}
        if shutil.which("nginx"):
            urls["nginx"] = f"{stack.enter_context(nginx(place, file.parent))}/{file.name}"
        rates: dict[str, list[float]] = {name: [] for name in urls}
        for turn in range(DOWNLOADS + 1):
            for name, target in urls.items():
                done = load("download", target)
                if (done["status"], done["bytes"]) != (200, DOWNLOAD_BYTES):
                    raise SystemExit(f"{name} answered {done}")
                if turn:  # the first ones warm up
                    rates[name].append(done["bytes"] / done["seconds"] / 1e6)
    size = f"{DOWNLOAD_BYTES / 2**30:.0f} GiB"
    yield f"| download of {size} over loopback ({DOWNLOADS} times, in turns) | median | range |"
    yield "|---|---:|---:|"
    for name, each in rates.items():
        yield f"| {name} | {statistics.median(each):,.0f} MB/s | {min(each):,.0f} – {max(each):,.0f} |"
    if "nginx" not in rates:
        yield "\nnginx is not installed, so there is nothing to compare with (`apt-get install nginx-light`)."
        return
    ratio = statistics.median(rates["Squeeze"]) / statistics.median(rates["nginx"])
    yield f"\nSqueeze serves {ratio:.2f} times what nginx does: {'a win' if ratio >= 1 else 'a loss'}."


@contextmanager
def api_alone(place: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Broker and API on the data directory; its URL."""
    url = f"http://127.0.0.1:{environment['SQUEEZE_PORT']}"
    log = place / "api.log"
    with (
        running(["-m", "jobs", "broker"], environment, place / "broker.log"),
        running(["-m", "api"], environment, log) as api,
    ):
        wait_until_ready(url, api, log)
        yield url


def publish_large(place: Path, data: Path, storage: Storage) -> tuple[str, Path]:
    """A finished job with one large artifact, as a worker would have left it; its id and the stored file."""
    source = place / "large"
    block = os.urandom(BLOCK_BYTES)
    with source.open("wb") as file:
        for _ in range(DOWNLOAD_BYTES // BLOCK_BYTES):
            file.write(block)
    database = Database(f"sqlite:///{data}/squeeze.db")
    spec = JobSpec.model_validate({**COMMON, **RECIPES["rtn 4 bits"]})
    with database.write() as session:
        job, _ = lifecycle.submit(session, project="default", spec=spec, idempotency_key=None, body_hash="-")
    with database.write() as session:
        claim = lifecycle.claim(session, job.id, worker="benchmark", lease_seconds=600.0)
    assert claim is not None
    key = f"jobs/{job.id}/{claim.attempt}/{ARTIFACT}"
    stored = storage.put_file(key, source)
    source.unlink()
    made = Result(source_bytes=1, result_bytes={}, compression_ratio=1.0, bits_per_weight=4.0)
    artifact = NewArtifact(ARTIFACT, stored.size_bytes, stored.sha256, "compressed-tensors", key)
    with database.write() as session:
        lifecycle.publish(session, job.id, claim.attempt, artifacts=[artifact], result=made, report={}, usage=Usage())
    database.dispose()
    path = storage.local_path(key)
    assert path is not None
    return job.id, path


@contextmanager
def nginx(place: Path, root: Path) -> Iterator[str]:
    """nginx as its manual has it for files: sendfile, one process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    user = "user root;\n" if os.geteuid() == 0 else ""
    configuration = place / "nginx.conf"
    configuration.write_text(NGINX.format(place=place, root=root, port=port, user=user))
    server = subprocess.Popen(["nginx", "-p", str(place), "-c", str(configuration)], stderr=subprocess.DEVNULL)
    try:
        while server.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def load(*arguments: object) -> dict[str, Any]:
    """What the loading process measured."""
    command = [sys.executable, str(LOAD), *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def percentile(values: Sequence[float], share: float) -> float:
    """By nearest rank."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def too_long(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(f"not done within {LONGEST_SECONDS} s: this machine is too busy for figures")


if __name__ == "__main__":
    main()
