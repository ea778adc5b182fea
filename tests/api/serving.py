"""A running service for the tests: uvicorn on a free port of loopback, real database, real storage."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from api.app import create_app
from api.service import Service
from jobs import keys, lifecycle
from jobs.lifecycle import NewArtifact
from jobs.settings import Settings
from squeeze.objects import Result, Usage
from tests.hub import FaultyHub

PATIENCE_SECONDS = 20.0
SPEC: dict[str, Any] = {"model": "org/name", "steps": [{"kind": "quantize", "method": "gptq", "bits": 4}]}
NOWHERE = "redis+socket:///nonexistent/broker.sock"


@dataclass
class Running:
    """The service and a client that talks to it."""

    url: str
    client: httpx.Client
    app: FastAPI
    service: Service

    @property
    def address(self) -> tuple[str, int]:
        parts = httpx.URL(self.url)
        return parts.host, parts.port or 80

    def submit(self, headers: dict[str, str] | None = None, **changes: Any) -> str:
        answer = self.client.post("/v1/jobs", json={**SPEC, **changes}, headers=headers or {})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def succeed(self, job_id: str, files: dict[str, bytes], tmp_path: Path, report: dict[str, Any]) -> None:
        """What a worker does, without the work."""
        with self.service.database.write() as session:
            claim = lifecycle.claim(session, job_id, worker="w", lease_seconds=60)
            assert claim is not None
        artifacts = []
        for name, content in files.items():
            path = tmp_path / "made"
            path.write_bytes(content)
            key = f"jobs/{job_id}/{claim.attempt}/{name}"
            stored = self.service.storage.put_file(key, path)
            artifacts.append(NewArtifact(name, stored.size_bytes, stored.sha256, name.split("/")[0], key))
        with self.service.database.write() as session:
            assert lifecycle.publish(
                session, job_id, claim.attempt, artifacts=artifacts, result=RESULT, report=report, usage=Usage()
            )

    def key(self, project: str) -> dict[str, str]:
        """The header with a new key of the project."""
        with self.service.database.write() as session:
            _, plaintext = keys.create(session, project, "test")
        return {"Authorization": f"Bearer {plaintext}"}


RESULT = Result(
    source_bytes=1000,
    result_bytes={"compressed-tensors": 300},
    compression_ratio=3.3,
    bits_per_weight=4.25,
    perplexity_before=10.0,
    perplexity_after=10.5,
)


@contextmanager
def serve(settings: Settings) -> Iterator[Running]:
    app = create_app(settings)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the service did not start"
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, timeout=PATIENCE_SECONDS) as client:
        yield Running(url, client, app, app.state.service)
    app.state.service.stopping.set()
    server.should_exit = True
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()


def report() -> dict[str, Any]:
    """A report as a worker writes it, with text that a page must escape."""
    text = {
        "origin": "<script>alert(1)</script>",
        "generic": True,
        "sequences": 4,
        "sequence_length": 128,
        "tokens": 512,
        "sha256": "0" * 64,
    }
    layer = {"name": "model.layers.0.mlp.down_proj", "bits": 4, "group_size": 128, "relative_error": 0.0123}
    return {
        "schema_version": 1,
        "job": None,
        "squeeze": "0.1.0",
        "libraries": {"torch": "2.13.0"},
        "device": "cpu",
        "source": {
            "model": "org/<b>name</b>",
            "revision": "0" * 40,
            "architecture": "llama",
            "parameters": 4_200_000,
            "bytes": 8_400_000,
            "dtype": "bfloat16",
            "license": "apache-2.0",
        },
        "recipe": [{"kind": "quantize", "method": "gptq", "bits": 4}],
        "seed": 0,
        "calibration": text,
        "quality": {
            "text": text,
            "stride": 128,
            "protocol": "windows of 128 tokens",
            "scored_tokens": 508,
            "perplexity_before": 10.0,
            "perplexity_after": 10.5,
            "divergence_nats": 0.05,
            "top1_agreement": 0.93,
        },
        "bits_per_weight": 4.25,
        "sizes": [{"format": "compressed-tensors", "bytes": 2_500_000, "weight_bytes": 2_400_000, "ratio": 3.5}],
        "blocks": [
            {
                "index": number,
                "seconds": 1.5,
                "peak_host_bytes": 1_000_000_000,
                "peak_gpu_bytes": 0,
                "relative_error": 0.001 * (number + 1),
                "layers": [layer],
            }
            for number in range(3)
        ],
        "damping_escalations": 0,
        "certificates": [
            {
                "format": "compressed-tensors",
                "consumer": "transformers",
                "version": "5.23.0",
                "outcome": "passed",
                "detail": "loads, generates, same perplexity",
                "perplexity": 10.5001,
                "expected_perplexity": 10.5,
                "tolerance": 0.01,
                "sample": "def f(x):\n    return '<i>'",
                "seconds": 3.0,
            }
        ],
        "warnings": ["calibrated on generic text <img src=x>"],
        "spent": {
            "seconds": {"compressing": 12.0},
            "cpu_seconds": 20.0,
            "gpu_seconds": 0.0,
            "peak_host_bytes": 1_500_000_000,
            "peak_gpu_bytes": 0,
            "certifier_peak_host_bytes": None,
        },
    }


@contextmanager
def asking(
    models: Mapping[str, Mapping[str, bytes]], folders: pytest.TempPathFactory, broker_url: str
) -> Iterator[Callable[..., Any]]:
    """Posts steps to a route of a service whose Hub has these models."""
    data = folders.mktemp("asking")
    settings = Settings(data, f"sqlite:///{data}/squeeze.db", broker_url, (data / "storage").as_uri())
    with FaultyHub() as hub, pytest.MonkeyPatch.context() as environment:
        for name, files in models.items():
            hub.add_files(name, dict(files), folders.mktemp("hub"))
        environment.setenv("HF_ENDPOINT", hub.url)
        with serve(settings) as running:

            def ask(route: str, *steps: dict[str, Any], model: str = "org/llama", **fields: Any) -> Any:
                return running.client.post(f"/v1/{route}", json={"model": model, "steps": steps, **fields})

            yield ask
