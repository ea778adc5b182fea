"""Keys and projects: who may ask, and that nobody sees what is another's."""

from pathlib import Path

import httpx
import pytest

from jobs import keys
from tests.api.serving import SPEC, Running, report


def test_without_any_key_loopback_is_the_project_default(running: Running) -> None:
    job_id = running.submit()
    header = running.key("default")
    assert running.client.get(f"/v1/jobs/{job_id}", headers=header).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer sq-wrong"}, {"Authorization": "Basic c3E6c3E="}, {"Authorization": "Bearer"}],
)
def test_once_a_key_exists_every_route_wants_one(running: Running, headers: dict[str, str]) -> None:
    good = running.key("one")
    for method, path in (
        ("GET", "/v1/jobs"),
        ("POST", "/v1/jobs"),
        ("POST", "/v1/plan"),
        ("GET", "/v1/methods"),
        ("GET", "/v1/files"),
        ("POST", "/v1/files"),
        ("GET", "/v1/jobs/job-0/events"),
    ):
        body = SPEC if path in {"/v1/jobs", "/v1/plan"} and method == "POST" else None
        answer = running.client.request(method, path, headers=headers, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthenticated"), path
        assert answer.headers["www-authenticate"].startswith("Bearer")
    assert running.client.get("/v1/jobs", headers=good).status_code == 200
    for path in ("/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"):
        assert running.client.get(path, headers=headers).status_code == 200


def test_a_revoked_key_opens_nothing(running: Running) -> None:
    kept, header = running.key("one"), running.key("one")
    with running.service.database.write() as session:
        record = keys.find(session, header["Authorization"].removeprefix("Bearer "))
        assert record is not None
        keys.revoke(session, record.id)
    assert running.client.get("/v1/jobs", headers=header).status_code == 401
    assert running.client.get("/v1/jobs", headers=kept).status_code == 200


def test_a_key_remembers_when_it_was_used(running: Running) -> None:
    header = running.key("one")
    running.client.get("/v1/jobs", headers=header)
    with running.service.database.read() as session:
        assert keys.list_keys(session)[0].last_used_at is not None


def test_the_open_service_refuses_pages_of_other_sites(running: Running) -> None:
    for headers in (
        {"Host": "evil.example"},  # a name that was pointed at 127.0.0.1
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ):
        answer = running.client.post("/v1/jobs", json=SPEC, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthenticated"), headers
    own = running.client.post("/v1/jobs", json=SPEC, headers={"Origin": running.url})
    assert own.status_code == 202


def test_two_projects_see_nothing_of_each_other(running: Running, tmp_path: Path) -> None:
    mine, other = running.key("mine"), running.key("other")
    job_id = running.submit({**mine, "Idempotency-Key": "same"})
    assert running.submit({**other, "Idempotency-Key": "same"}) != job_id
    running.succeed(job_id, {"gptq/model.safetensors": b"secret"}, tmp_path, report())
    form = {"files": {"file": ("a.txt", b"secret")}, "data": {"purpose": "calibration"}}
    file_id = running.client.post("/v1/files", headers=mine, **form).json()["id"]  # type: ignore[arg-type]
    paths = [
        f"/v1/jobs/{job_id}{rest}"
        for rest in ("", "/events", "/artifacts", "/artifacts/gptq/model.safetensors", "/archive", "/report")
    ] + [f"/v1/files/{file_id}", f"/v1/files/{file_id}/content"]
    for path in paths:
        assert running.client.get(path, headers=mine).status_code == 200, path
        answers = [
            running.client.get(path, headers=other),
            running.client.get(path, headers={**other, "Accept": "text/event-stream"}),
            running.client.get(path, headers={**other, "Accept": "text/html"}),
        ]
        if "artifacts/" in path or "archive" in path:
            answers.append(running.client.head(path, headers=other))
        assert {answer.status_code for answer in answers} == {404}, path
        assert b"secret" not in b"".join(answer.content for answer in answers)
    for method, path in (
        ("POST", f"/v1/jobs/{job_id}/cancel"),
        ("POST", f"/v1/jobs/{job_id}/retry"),
        ("DELETE", f"/v1/jobs/{job_id}"),
        ("DELETE", f"/v1/files/{file_id}"),
    ):
        assert running.client.request(method, path, headers=other).status_code == 404, path
    for path in ("/v1/jobs", "/v1/files"):
        listed = running.client.get(path, headers=other).json()["data"]
        assert {job_id, file_id}.isdisjoint(each["id"] for each in listed)
        cursor = running.client.get(path, params={"after": job_id if "jobs" in path else file_id}, headers=other)
        assert cursor.status_code == 422
    for changes in ({"model": job_id}, {"data": {"source": file_id}}, {"evaluation": {"source": file_id}}):
        answer = running.client.post("/v1/jobs", json={**SPEC, **changes}, headers=other)
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "spec_invalid")
        plan = running.client.post("/v1/plan", json={**SPEC, **changes}, headers=other)
        assert not plan.json()["feasible"]


@pytest.mark.anyio
async def test_without_a_key_other_machines_are_refused_however_the_process_was_started(running: Running) -> None:
    for client, server in ((("192.0.2.7", 4000), "127.0.0.1"), (("127.0.0.1", 4000), "192.0.2.1")):
        transport = httpx.ASGITransport(running.app, client=client)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{server}:8000") as stranger:
            answer = await stranger.get("/v1/jobs", headers={"Host": "localhost"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthenticated")
