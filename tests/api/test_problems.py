"""Every error is a problem: one status for each code, and nothing of the framework shows through."""

import pytest
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient

from api import problems
from api.logs import RequestLog
from api.metrics import Metrics
from squeeze.errors import by_code, rebuild
from squeeze.objects import Problem
from tests.api.serving import Running


def test_every_code_has_a_status_and_no_other_has() -> None:
    assert set(problems.STATUS) == set(by_code())
    assert all(400 <= status < 600 for status in problems.STATUS.values())


@pytest.mark.parametrize("code", sorted(by_code()))
def test_a_problem_rebuilds_the_error_that_it_came_from(code: str) -> None:
    error = rebuild(code, "what and what next", "steps.0.bits")
    answer = problems.problem_response(error, "/v1/jobs")
    problem = Problem.model_validate_json(bytes(answer.body))
    back = rebuild(problem.error.code, problem.error.message, problem.error.param)
    assert (type(back), back.message, back.param) == (type(error), error.message, error.param)
    assert (answer.status_code, answer.media_type) == (problem.status, "application/problem+json")
    assert ("retry-after" in answer.headers) == (error.retryable and problem.status in {429, 503})
    assert ("www-authenticate" in answer.headers) == (problem.status == 401)


def test_an_unknown_route_is_a_problem(shared: Running) -> None:
    answer = shared.client.get("/v2/jobs")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "route_not_found")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/v1/jobs", "GET, POST"),
        ("PATCH", "/v1/jobs/job-x", "DELETE, GET"),
        ("POST", "/v1/jobs/job-x/artifacts/a/b", "GET, HEAD"),
        ("GET", "/v1/plan", "POST"),
    ],
)
def test_a_wrong_method_is_told_all_that_the_path_takes(shared: Running, method: str, path: str, allow: str) -> None:
    answer = shared.client.request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == allow
    assert allow in answer.json()["detail"]


@pytest.mark.anyio
async def test_an_error_that_nobody_foresaw_is_a_problem_without_its_text() -> None:
    app = FastAPI()
    metrics = Metrics()
    problems.install(app)

    @app.get("/broken")
    def broken() -> None:
        raise ZeroDivisionError("secret detail")

    app.add_middleware(RequestLog, metrics=metrics)
    transport = ASGITransport(app)
    async with AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.get("/broken", headers={"X-Request-Id": "mine-1"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert "mine-1" in answer.json()["detail"]
    assert answer.headers["x-request-id"] == "mine-1"
    assert b'route="/broken",status="500"} 1.0' in metrics.text()


def test_a_request_id_that_could_forge_a_log_line_is_replaced(shared: Running) -> None:
    for given in ("x" * 200, "a b", "a;b"):
        answer = shared.client.get("/healthz", headers={"X-Request-Id": given})
        assert answer.headers["x-request-id"] != given
