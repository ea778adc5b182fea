"""The contract: the snapshot is up to date, every route says what it answers, nothing of the framework shows."""

import json
import subprocess
import sys
from typing import Any

import pytest

from api import openapi
from squeeze.objects import Job
from squeeze.specs.job_spec import JobSpec

CONTRACT: dict[str, Any] = json.loads(openapi.text())
OPERATIONS = [
    (method, path, operation) for path, methods in CONTRACT["paths"].items() for method, operation in methods.items()
]
NAMES = [f"{method} {path}" for method, path, _ in OPERATIONS]


def test_the_snapshot_is_up_to_date() -> None:
    assert openapi.SNAPSHOT.read_text() == openapi.text(), "run `python -m api.openapi` and look at the difference"
    assert openapi.main(["--check"]) == 0


def test_the_contract_does_not_depend_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEEZE_PUBLIC_URL", "https://squeeze.example")
    assert json.loads(openapi.text()) == CONTRACT


def test_every_route_of_the_design_is_there() -> None:
    wanted = {
        "POST /v1/jobs", "GET /v1/jobs", "GET /v1/jobs/{job_id}", "POST /v1/jobs/{job_id}/cancel",
        "POST /v1/jobs/{job_id}/retry", "DELETE /v1/jobs/{job_id}", "GET /v1/jobs/{job_id}/events",
        "GET /v1/jobs/{job_id}/artifacts", "GET /v1/jobs/{job_id}/artifacts/{filename}",
        "HEAD /v1/jobs/{job_id}/artifacts/{filename}", "GET /v1/jobs/{job_id}/archive",
        "HEAD /v1/jobs/{job_id}/archive",
        "GET /v1/jobs/{job_id}/report", "POST /v1/plan", "GET /v1/methods", "POST /v1/files", "GET /v1/files",
        "GET /v1/files/{file_id}", "DELETE /v1/files/{file_id}", "GET /v1/files/{file_id}/content",
        "GET /healthz", "GET /readyz", "GET /metrics",
    }  # fmt: skip
    assert {f"{method.upper()} {path}" for method, path, _ in OPERATIONS} == wanted


@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS, ids=NAMES)
def test_a_route_says_what_it_does_and_what_it_refuses(method: str, path: str, operation: dict[str, Any]) -> None:
    assert operation["summary"]
    assert operation["description"]
    for status, answer in operation["responses"].items():
        assert answer["description"] not in {"", "Successful Response", "Validation Error"} or status in {"200", "202"}
        if int(status) >= 400:
            (media_type,) = answer["content"]
            assert media_type == "application/problem+json"
            assert answer["content"][media_type]["examples"]
    if path.startswith("/v1/"):
        assert "401" in operation["responses"]
        assert operation["security"] == [{"HTTPBearer": []}]


def test_every_reference_leads_somewhere_and_none_to_the_framework() -> None:
    schemas = CONTRACT["components"]["schemas"]
    text = json.dumps(CONTRACT)
    referenced = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert referenced <= set(schemas)
    assert not {"HTTPValidationError", "ValidationError"} & set(schemas)


def test_the_examples_are_valid() -> None:
    submit = CONTRACT["paths"]["/v1/jobs"]["post"]
    examples = [one["value"] for one in submit["requestBody"]["content"]["application/json"]["examples"].values()]
    assert [JobSpec.model_validate(one).model for one in examples] == [one["model"] for one in examples] != []
    taken = submit["responses"]["202"]["content"]["application/json"]["example"]
    shown = CONTRACT["paths"]["/v1/jobs/{job_id}"]["get"]["responses"]["200"]["content"]["application/json"]["example"]
    for example in (taken, shown):
        told = Job.model_validate(example).model_dump(mode="json")
        assert {name: told[name] for name in ("id", "status", "model")} == {
            name: example[name] for name in ("id", "status", "model")
        }


def test_the_api_imports_without_torch() -> None:
    code = (
        "import sys, api.app; assert not {'torch', 'transformers', 'models'} & set(sys.modules); api.app.app.openapi()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
