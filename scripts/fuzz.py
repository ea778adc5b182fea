"""Schemathesis against a running service's contract: `python scripts/fuzz.py`, or `make fuzz`.

Starts the API and its broker on a fresh data directory with a key, a file and a job that has succeeded, then sends it
what the contract allows and what it forbids: no 5xx, no undocumented status or body. Two runs: the ids of what is
there, then ids at random. Schemathesis lives in an environment of its own, made on the first call.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jobs import files, keys, lifecycle  # noqa: E402
from jobs.database import Database  # noqa: E402
from jobs.lifecycle import NewArtifact  # noqa: E402
from jobs.records import new_id  # noqa: E402
from jobs.settings import Settings  # noqa: E402
from scripts.hub import Hub  # noqa: E402
from squeeze.objects import Result, Usage  # noqa: E402
from squeeze.specs.job_spec import JobSpec  # noqa: E402
from storage import open_storage  # noqa: E402

SCHEMATHESIS = "schemathesis==4.32.5"
START_SECONDS = 60.0
REPORT = {
    "squeeze": "0",
    "libraries": {},
    "device": "cpu",
    "source": {
        "model": "org/name",
        "revision": None,
        "architecture": "llama",
        "parameters": 1,
        "bytes": 2,
        "dtype": "f",
    },
    "recipe": [],
    "seed": 0,
    "calibration": None,
    "quality": None,
    "bits_per_weight": 4.0,
    "sizes": [],
    "blocks": [],
    "damping_escalations": 0,
    "certificates": [],
    "warnings": [],
    "spent": {"seconds": {}, "cpu_seconds": 0.0, "gpu_seconds": 0.0, "peak_host_bytes": 0, "peak_gpu_bytes": 0},
}
SPEC = JobSpec.model_validate({"model": "org/name", "steps": [{"kind": "quantize", "method": "rtn"}]})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=50, help="at most this many of each operation and run")
    parser.add_argument("--seed", type=int, default=1, help="of what is sent")
    parser.add_argument("--schemathesis", type=Path, help="the program, where there is one already")
    arguments = parser.parse_args()
    program = arguments.schemathesis or _program()
    with tempfile.TemporaryDirectory(prefix="squeeze-fuzz-") as directory, Hub() as hub, ExitStack() as stack:
        data = Path(directory)
        port = _free_port()
        environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SQUEEZE_")},
            "SQUEEZE_DATA": str(data),
            "SQUEEZE_PORT": str(port),
            "HF_ENDPOINT": hub.url,
        }
        settings = Settings.from_environment(environ)
        key, known = _seed(settings)
        stack.enter_context(_running("jobs", ["broker"], environ, data / "broker.log"))
        stack.enter_context(_running("api", [], environ, data / "api.log"))
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/readyz", data / "api.log")
        common = [
            str(program), "--config-file", str(data / "known.toml"), "run", f"{url}/openapi.json",
            "--header", f"Authorization: Bearer {key}", "--max-examples", str(arguments.examples),
            "--seed", str(arguments.seed), "--generation-database", "none", "--no-color",
            # A contract can't say which ids exist, nor that a report comes only once its job has succeeded.
            "--exclude-checks", "positive_data_acceptance,ensure_resource_availability",
            "--suppress-health-check", "filter_too_much",  # few of the texts that it invents fit into a path
        ]  # fmt: skip
        runs = []
        for name, parameters, extra in (
            ("ids that exist", known, ["--include-method", "GET", "--include-method", "HEAD"]),
            ("ids at random", {}, []),  # and every method: what was there may be deleted
        ):
            lines = [f"{name} = {json.dumps(value)}" for name, value in parameters.items()]
            (data / "known.toml").write_text("[parameters]\n" + "\n".join(lines) + "\n")
            sys.stdout.write(f"\n=== {name} ===\n")
            sys.stdout.flush()
            runs.append(subprocess.run([*common, *extra], cwd=data, check=False).returncode)
        crashes = [line for line in (data / "api.log").read_text().splitlines() if "request_crashed" in line]
        sys.stdout.write("".join(f"{line}\n" for line in crashes))
    return 1 if any(runs) or crashes else 0


def _program() -> Path:
    """Schemathesis' own environment; its dependencies need not fit ours."""
    directory = Path(sys.prefix) / "fuzz"
    program = directory / "bin" / "schemathesis"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        subprocess.run([str(directory / "bin" / "python"), "-m", "pip", "install", "-q", SCHEMATHESIS], check=True)
    return program


def _seed(settings: Settings) -> tuple[str, dict[str, str]]:
    """(an API key, the path parameters of what is there)"""
    database, storage = Database(settings.database_url), open_storage(settings.storage_url)
    database.migrate()
    content = b'{"text": "some words"}\n'
    file_id, name = new_id("file"), "compressed-tensors/config.json"
    with database.write() as session:
        _, key = keys.create(session, "fuzz", "fuzz")
        job, _ = lifecycle.submit(session, project="fuzz", spec=SPEC, idempotency_key=None, body_hash="0")
        claim = lifecycle.claim(session, job.id, worker="fuzz", lease_seconds=60)
        assert claim is not None
        stored = storage.put_stream(f"jobs/{job.id}/1/{name}", [content])
        artifact = NewArtifact(name, stored.size_bytes, stored.sha256, "compressed-tensors", f"jobs/{job.id}/1/{name}")
        result = Result(source_bytes=2, result_bytes={"gptq": 1}, compression_ratio=2, bits_per_weight=4)
        lifecycle.publish(
            session, job.id, claim.attempt, artifacts=[artifact], result=result, report=REPORT, usage=Usage()
        )
        storage.put_stream(files.storage_key(file_id), [content])
        files.add(
            session,
            file_id=file_id,
            project="fuzz",
            filename="a.jsonl",
            size_bytes=stored.size_bytes,
            sha256=stored.sha256,
            purpose="calibration",
        )
    database.dispose()
    return key, {"job_id": job.id, "file_id": file_id, "filename": name}


@contextmanager
def _running(module: str, arguments: list[str], environ: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], cwd=ROOT, env=environ, stdout=file, stderr=file
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def _wait(url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310 (our own address)
                return
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > deadline:
                raise SystemExit(f"the service did not start:\n{log.read_text()}") from None
            time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
