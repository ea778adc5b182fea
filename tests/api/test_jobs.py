"""Jobs over HTTP: what is taken, what is refused and in which words, lists, cancel, retry, delete."""

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import lifecycle
from jobs.places import checkpoints_prefix
from jobs.queue import waiting
from squeeze.errors import ModelNotFound
from squeeze.objects import Job, Status
from tests.api.serving import NOWHERE, SPEC, Running, report

STEP = SPEC["steps"][0]


def test_a_submitted_job_is_queued_and_rung_for(running: Running) -> None:
    answer = running.client.post("/v1/jobs", json=SPEC)
    assert answer.status_code == 202
    job = Job.model_validate(answer.json())
    assert job.status is Status.queued
    assert answer.headers["location"] == f"/v1/jobs/{job.id}"
    assert running.client.get(answer.headers["location"]).json() == answer.json()
    assert waiting(running.service.queue, "cpu") == 1


def test_a_job_is_taken_while_the_broker_is_down(start: Callable[..., Running]) -> None:
    running = start(broker_url=NOWHERE)
    job_id = running.submit()
    assert running.client.get(f"/v1/jobs/{job_id}").json()["status"] == "queued"


def test_the_same_key_and_body_give_the_same_job_and_ring_once(running: Running) -> None:
    header = {"Idempotency-Key": "mine"}
    first = running.submit(header)
    assert running.submit(header, seed=0) == first  # a default written out is the same request
    assert waiting(running.service.queue, "cpu") == 1
    other = running.client.post("/v1/jobs", json={**SPEC, "seed": 7}, headers=header)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_mismatch")


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({**SPEC, "steps": [{**STEP, "bitz": 4}]}, "steps.0.bitz", "did you mean `bits`"),
        ({**SPEC, "steps": [{**STEP, "method": "gptqq"}]}, "steps.0.method", "did you mean `gptq`"),
        ({**SPEC, "steps": [{**STEP, "kind": "quantise"}]}, "steps.0.kind", "did you mean `quantize`"),
        ({**SPEC, "steps": [{"method": "gptq"}]}, "steps.0.kind", "is missing"),
        ({**SPEC, "steps": [{"kind": "quantize"}]}, "steps.0.method", "There is `rtn`, `gptq`"),
        ({**SPEC, "steps": ["gptq"]}, "steps.0", "an object with `kind` and `method`"),
        ({**SPEC, "steps": [{**STEP, "bits": 5}]}, "steps.0.bits", "it takes 2, 3, 4, 8 or 'auto'."),
        ({**SPEC, "steps": [{**STEP, "group_size": "chanel"}]}, "steps.0.group_size", "Did you mean `channel`"),
        ({**SPEC, "steps": []}, "steps", "at least 1 item"),
        ({**SPEC, "steps": [STEP, STEP]}, None, "all quantize"),
        ({**SPEC, "formats": ["gptqs"]}, "formats.0", "Did you mean `gptq`"),
        ({**SPEC, "data": {"sample": 3}}, "data.sample", "did you mean `samples`"),
        ({**SPEC, "seed": -1}, "seed", "greater than or equal to 0"),
        ({**SPEC, "metadata": {"team": 4}}, "metadata.team", "valid string"),
        ({"modle": "org/name", "steps": [STEP]}, "modle", "did you mean `model`"),
        ({**SPEC, "model": "../etc"}, "model", "Hub id"),
        ({**SPEC, "data": {"source": "file-00000000"}}, "data.source", "file-00000000"),
        ({**SPEC, "data": {"source": "hub:org/name:a/b/c"}}, "data.source", "hub:org/name:subset/split"),
        ({**SPEC, "data": {"source": "hub:../name"}}, "data.source", "hub:org/name"),
        ({**SPEC, "data": {"source": "org/name"}}, "data.source", "hub:org/name"),
        ({**SPEC, "data": {"column": "body"}}, None, "data.source names no file or dataset"),
        ({**SPEC, "evaluation": {"source": "self"}}, "evaluation.source", "text of its own making"),
        ({**SPEC, "model": "job-00000000"}, "model", "job-00000000"),
    ],
)
def test_a_wrong_spec_is_refused_by_field_and_in_words(
    shared: Running, body: dict[str, object], param: str | None, words: str
) -> None:
    answer = shared.client.post("/v1/jobs", json=body)
    problem = answer.json()
    assert answer.status_code == 422, problem
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["error"]["code"] == "spec_invalid"
    assert problem["error"]["param"] == param
    assert words in problem["detail"]
    assert problem["detail"] == problem["error"]["message"]


def test_many_errors_are_told_at_once(shared: Running) -> None:
    body = {"model": "org/name", "steps": [{**STEP, "bits": 5, "group_size": 7}], "seed": "x"}
    detail = shared.client.post("/v1/jobs", json=body).json()["detail"]
    assert all(f"`{field}`" in detail for field in ("steps.0.bits", "steps.0.group_size", "seed"))


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{", 400, "body_invalid"),
        (b"[]", 400, "body_invalid"),
        (b"", 400, "body_invalid"),
        (b"\xff\xfe", 400, "body_invalid"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "body_invalid"),
        (b"[" * 30000, 400, "body_invalid"),
        (b'{"model": "a/b", "steps": [], "seed": NaN}', 422, "spec_invalid"),
        (b'{"model": "\\ud800", "steps": []}', 400, "body_invalid"),
        (b'{"model": "a/b", "steps": [], "seed": true}', 422, "spec_invalid"),
        (b'{"model": "a/b", "steps": [], "seed": "1"}', 422, "spec_invalid"),
    ],
)
def test_a_body_that_is_no_spec_is_refused(shared: Running, content: bytes, status: int, code: str) -> None:
    answer = shared.client.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_zero_byte_in_metadata_is_refused(shared: Running) -> None:
    answer = shared.client.post("/v1/jobs", json={**SPEC, "metadata": {"a": "\0"}})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "spec_invalid")


def test_a_directory_is_taken_only_under_an_allowed_root(start: Callable[..., Running], tmp_path: Path) -> None:
    root, outside = tmp_path / "models", tmp_path / "outside"
    for directory in (root / "good", outside):
        directory.mkdir(parents=True)
        (directory / "config.json").write_text("{}")
    (root / "link").symlink_to(outside)
    running = start(model_roots=(root,))
    running.submit(model=str(root / "good"))
    for model in (outside, root / "link", root / ".." / "outside", tmp_path / "models-else", Path("/etc")):
        answer = running.client.post("/v1/jobs", json={**SPEC, "model": str(model)})
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "model_directory_forbidden"), model
        assert answer.json()["error"]["param"] == "model"
    answer = running.client.post("/v1/jobs", json={**SPEC, "model": str(root / "absent")})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "model_not_found")


def test_an_earlier_job_is_a_source_once_it_has_succeeded(running: Running, tmp_path: Path) -> None:
    first = running.submit()
    early = running.client.post("/v1/jobs", json={**SPEC, "model": first})
    assert (early.status_code, early.json()["error"]["param"]) == (422, "model")
    running.succeed(first, {"gptq/config.json": b"{}"}, tmp_path, report())
    running.submit(model=first)


def test_lists_go_page_by_page_from_the_newest(running: Running) -> None:
    made = [running.submit(metadata={"team": "a" if number % 2 else "b"}) for number in range(5)]
    first = running.client.get("/v1/jobs", params={"limit": 2}).json()
    assert [job["id"] for job in first["data"]] == made[:2:-1]
    assert (first["has_more"], first["first_id"], first["last_id"]) == (True, made[4], made[3])
    rest = running.client.get("/v1/jobs", params={"after": first["last_id"]}).json()
    assert [job["id"] for job in rest["data"]] == made[2::-1]
    assert not rest["has_more"]
    team = running.client.get("/v1/jobs", params={"metadata[team]": "a"}).json()
    assert [job["id"] for job in team["data"]] == [made[3], made[1]]
    running.client.post(f"/v1/jobs/{made[0]}/cancel")
    cancelled = running.client.get("/v1/jobs", params={"status": "cancelled", "kind": "quantize"}).json()
    assert [job["id"] for job in cancelled["data"]] == [made[0]]


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("after=nothing", "cursor_invalid"),
        ("after=%00", "cursor_invalid"),
        (f"after={'x' * 200}", "cursor_invalid"),
        ("limit=0", "spec_invalid"),
        ("limit=101", "spec_invalid"),
        ("status=done", "spec_invalid"),
        ("metadata=search", "spec_invalid"),
        ("metadata[a][b]=search", "spec_invalid"),
    ],
)
def test_a_wrong_list_parameter_is_refused(shared: Running, query: str, code: str) -> None:
    answer = shared.client.get(f"/v1/jobs?{query}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, code)
    assert answer.json()["error"]["param"] == query.partition("=")[0].partition("[")[0]


def test_cancel_is_idempotent_and_knows_the_end(running: Running, tmp_path: Path) -> None:
    waits, works, done = running.submit(), running.submit(), running.submit()
    with running.service.database.write() as session:
        lifecycle.claim(session, works, worker="w", lease_seconds=60)
    running.succeed(done, {"a/b": b"x"}, tmp_path, report())
    for _ in range(2):
        assert running.client.post(f"/v1/jobs/{waits}/cancel").json()["status"] == "cancelled"
        assert running.client.post(f"/v1/jobs/{works}/cancel").json()["status"] == "cancelling"
    answer = running.client.post(f"/v1/jobs/{done}/cancel")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "job_final")


def test_a_checkpoint_is_no_artifact_and_goes_with_a_job_that_is_cancelled_while_it_waits(running: Running) -> None:
    job_id = running.submit()
    storage, name = running.service.storage, "train/000001-checkpoint-00000007/state.safetensors"
    storage.put_stream(f"{checkpoints_prefix(job_id)}/{name}", [b"private"])
    for path in (f"checkpoints/{name}", f"../checkpoints/{name}", name):
        assert running.client.get(f"/v1/jobs/{job_id}/artifacts/{path}").status_code == 404
    assert running.client.get(f"/v1/jobs/{job_id}/artifacts").json()["data"] == []
    running.client.post(f"/v1/jobs/{job_id}/cancel")
    assert not list(storage.list())


def test_a_failed_job_tells_why_and_is_tried_again(running: Running) -> None:
    job_id = running.submit()
    with running.service.database.write() as session:
        claim = lifecycle.claim(session, job_id, worker="w", lease_seconds=60)
        assert claim is not None
        lifecycle.fail(session, job_id, claim.attempt, ModelNotFound("there is no org/name"))
    job = running.client.get(f"/v1/jobs/{job_id}").json()
    assert (job["status"], job["error"]["code"]) == ("failed", "model_not_found")
    before = waiting(running.service.queue, "cpu")
    again = running.client.post(f"/v1/jobs/{job_id}/retry")
    assert (again.status_code, again.json()["status"], again.json()["error"]) == (200, "queued", None)
    assert waiting(running.service.queue, "cpu") == before + 1
    twice = running.client.post(f"/v1/jobs/{job_id}/retry")
    assert (twice.status_code, twice.json()["error"]["code"]) == (409, "job_not_final")


def test_delete_takes_the_artifacts_too(running: Running, tmp_path: Path) -> None:
    job_id = running.submit()
    early = running.client.delete(f"/v1/jobs/{job_id}")
    assert (early.status_code, early.json()["error"]["code"]) == (409, "job_not_final")
    running.succeed(job_id, {"gptq/model.safetensors": b"x"}, tmp_path, report())
    answer = running.client.delete(f"/v1/jobs/{job_id}")
    assert answer.json() == {"id": job_id, "object": "job", "deleted": True}
    assert list(running.service.storage.list(f"jobs/{job_id}")) == []
    assert running.client.get(f"/v1/jobs/{job_id}").status_code == 404
