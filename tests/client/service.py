"""The real API under uvicorn in a thread, and jobs that move as a worker would move them."""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog
import uvicorn

from api.app import create_app
from jobs import lifecycle
from jobs.database import Database
from jobs.settings import Settings
from squeeze.objects import Result, Stage, Usage
from squeeze.reports.report import Report
from storage import Storage, open_storage

PATIENCE_SECONDS = 30.0
USAGE = Usage(cpu_seconds=1.5, peak_host_bytes=10_000_000)
RESULT = Result(
    source_bytes=1000,
    result_bytes={"gptq": 300},
    compression_ratio=3.33,
    bits_per_weight=4.25,
    perplexity_before=10.0,
    perplexity_after=10.5,
    divergence_nats=0.01,
    top1_agreement=0.95,
    certified={"gptq": {"transformers": "passed", "vllm": "not checked"}},
)


@dataclass(frozen=True)
class Service:
    """A running API, and the database and storage behind it."""

    url: str
    database: Database
    storage: Storage

    def start(self, job_id: str) -> int:
        """Claims the job; the attempt."""
        with self.database.write() as session:
            claimed = lifecycle.claim(session, job_id, worker="test", lease_seconds=60.0)
        assert claimed is not None
        return claimed.attempt

    def progress(self, job_id: str, attempt: int, stage: Stage, fraction: float) -> None:
        with self.database.write() as session:
            lifecycle.progress(
                session,
                job_id,
                attempt,
                stage=stage,
                fraction=fraction,
                done=1,
                total=4,
                unit="blocks",
                eta_seconds=9.0,
            )

    def warn(self, job_id: str, attempt: int, message: str) -> None:
        with self.database.write() as session:
            lifecycle.note(session, job_id, attempt, "warning", message, {})

    def succeed(self, job_id: str, attempt: int, files: Mapping[str, bytes], tmp_path: Path) -> None:
        """Stores the files and publishes them."""
        artifacts = []
        for filename, content in files.items():
            source = tmp_path / "published"
            source.write_bytes(content)
            key = f"jobs/{job_id}/{attempt}/{filename}"
            stored = self.storage.put_file(key, source)
            artifacts.append(
                lifecycle.NewArtifact(filename, stored.size_bytes, stored.sha256, filename.split("/")[0], key)
            )
        with self.database.write() as session:
            assert lifecycle.publish(
                session, job_id, attempt, artifacts=artifacts, result=RESULT, report=REPORT, usage=USAGE
            )


@contextmanager
def running(data: Path, database_url: str, broker_url: str) -> Iterator[Service]:
    """A service on a port of its own."""
    environment = {
        "SQUEEZE_DATA": str(data),
        "SQUEEZE_DATABASE_URL": database_url,
        "SQUEEZE_BROKER_URL": broker_url,
    }
    settings = Settings.from_environment(environment)
    config = uvicorn.Config(create_app(settings), host="127.0.0.1", port=0, log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    before = structlog.get_config()
    # The service's log must not land between the output of the commands that a test runs in this process.
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    thread.start()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the API did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    database = Database(database_url)
    try:
        yield Service(f"http://127.0.0.1:{port}", database, open_storage(settings.storage_url))
    finally:
        server.should_exit = True
        thread.join(PATIENCE_SECONDS)
        database.dispose()
        structlog.configure(**before)
        assert not thread.is_alive()


REPORT = json.loads(
    Report.model_validate(
        {
            "squeeze": "0.1.0",
            "libraries": {"torch": "2.13.0"},
            "device": "cpu",
            "source": {
                "model": "squeeze/bundled",
                "revision": "0" * 40,
                "architecture": "llama",
                "parameters": 5_000_000,
                "bytes": 10_000_000,
                "dtype": "bfloat16",
            },
            "recipe": [{"kind": "quantize", "method": "gptq", "bits": 4, "group_size": 128}],
            "seed": 0,
            "calibration": None,
            "quality": {
                "text": {
                    "origin": "standard library of Python 3.11",
                    "generic": True,
                    "sequences": 8,
                    "sequence_length": 512,
                    "tokens": 4096,
                    "sha256": "0" * 64,
                },
                "stride": 512,
                "protocol": "whole windows",
                "scored_tokens": 4088,
                "perplexity_before": 20.0,
                "perplexity_after": 21.0,
                "divergence_nats": 0.0123,
                "top1_agreement": 0.9,
            },
            "bits_per_weight": 4.25,
            "sizes": [{"format": "gptq", "bytes": 4_000_000, "weight_bytes": 3_500_000, "ratio": 2.86}],
            "blocks": [],
            "damping_escalations": 0,
            "certificates": [
                {
                    "format": "gptq",
                    "consumer": "transformers",
                    "version": "5.23.0",
                    "outcome": "passed",
                    "detail": "loaded, generated",
                }
            ],
            "warnings": ["Measured on generic text."],
            "spent": {
                "seconds": {"pulling": 1.0, "compressing": 8.0},
                "cpu_seconds": 9.0,
                "gpu_seconds": 0.0,
                "peak_host_bytes": 900_000_000,
                "peak_gpu_bytes": 0,
            },
        }
    ).model_dump_json()
)
