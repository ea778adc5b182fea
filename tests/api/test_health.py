"""What operators look at: alive, ready, metrics, methods."""

from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from squeeze.objects import Method
from squeeze.steps.every import STEPS, tag_of
from tests.api.serving import NOWHERE, SPEC, Running


def _samples(running: Running) -> dict[tuple[str, str], float]:
    """(metric, first label's value) -> value."""
    families = text_string_to_metric_families(running.client.get("/metrics").text)
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in families
        for sample in family.samples
    }


def test_a_service_with_all_its_parts_is_ready(shared: Running) -> None:
    for path in ("/healthz", "/readyz"):
        answer = shared.client.get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("part", ["queue", "storage", "database"])
def test_readiness_names_the_part_that_is_down_and_life_goes_on(
    start: Callable[..., Running], tmp_path: Path, part: str
) -> None:
    running = start(**({"broker_url": NOWHERE} if part == "queue" else {}))
    if part == "storage":
        for folder in (tmp_path / "storage").iterdir():
            folder.rmdir()
    if part == "database":
        running.service.database.dispose()
        (tmp_path / "squeeze.db").write_bytes(b"")
        for log in tmp_path.glob("squeeze.db-*"):
            log.unlink()
    answer = running.client.get("/readyz")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "service_unavailable")
    assert answer.json()["detail"].startswith(f"{part}: ")
    assert answer.headers["retry-after"]
    assert running.client.get("/healthz").status_code == 200


def test_metrics_count_jobs_messages_and_requests_by_route(running: Running) -> None:
    jobs = [running.submit() for _ in range(3)]
    running.client.post(f"/v1/jobs/{jobs[0]}/cancel")
    for job_id in jobs:
        running.client.get(f"/v1/jobs/{job_id}")
    running.client.get("/no/such/route")
    found = _samples(running)
    assert found["squeeze_jobs", "queued"] == 2
    assert found["squeeze_jobs", "cancelled"] == 1
    assert found["squeeze_jobs", "running"] == 0
    assert found["squeeze_queue_messages", "cpu"] == 3
    text = running.client.get("/metrics").text
    assert 'squeeze_http_request_seconds_count{method="GET",route="/v1/jobs/{job_id}",status="200"} 3.0' in text
    assert 'route="unmatched",status="404"} 1.0' in text
    assert jobs[0] not in text


def test_metrics_are_told_without_the_queue_too(start: Callable[..., Running]) -> None:
    found = _samples(start(broker_url=NOWHERE))
    assert ("squeeze_queue_messages", "cpu") not in found
    assert found["squeeze_jobs", "queued"] == 0


def test_every_method_is_listed_with_what_it_takes(shared: Running) -> None:
    listed = [Method.model_validate(each) for each in shared.client.get("/v1/methods").json()["data"]]
    assert {f"{each.kind}.{each.method}" for each in listed} == {tag_of(step) for step in STEPS}
    gptq = next(each for each in listed if each.method == "gptq")
    assert gptq.needs == ["calibration data"]
    assert gptq.parameters["properties"]["bits"]["enum"] == [2, 3, 4, 8, "auto"]
    assert "llama" in gptq.architectures
    assert "gpt2" in gptq.formats["compressed-tensors"]["architectures"]
    assert "gpt2" not in gptq.formats["gptq"]["architectures"]


def test_what_a_method_lists_is_what_submit_takes(shared: Running) -> None:
    rows = b'{"prompt": "why?", "completion": "so"}\n{"prompt": "how?", "completion": "thus"}'
    labelled = b'{"text": "good", "label": "yes"}\n{"text": "bad", "label": "no"}\n{"text": "fine", "label": "yes"}'
    sources = {
        need: shared.client.post(
            "/v1/files", data={"purpose": "training"}, files={"file": ("rows.jsonl", content)}
        ).json()["id"]
        for need, content in (
            ("training data", rows),
            ("training data with labels", labelled),
            ("a text of your own", rows),
        )
    }
    for each in shared.client.get("/v1/methods").json()["data"]:
        step, job = {"kind": each["kind"], "method": each["method"]}, {**SPEC, "formats": list(each["formats"])}
        for need in set(each["needs"]) & sources.keys():
            job |= {"data": {"source": sources[need]}}
        if {"peft", "safetensors"} <= set(each["formats"]):
            step |= {"merge": True}
        if each["method"] == "qlora":
            step |= {"base": "gptq"}
        if each["method"] in ("depth", "width", "svd", "experts"):
            step |= {"params_target": 0.75}
        if each["kind"] == "distill":
            step |= {"student": {"layers": 1}}
        if each["kind"] == "merge":
            step |= {"models": ["org/first", "org/second"]}
        answer = shared.client.post("/v1/jobs", json=job | {"steps": [step]})
        assert answer.status_code == 202, answer.text
