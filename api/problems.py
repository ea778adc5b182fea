"""Errors as `application/problem+json` (RFC 9457): one table from code to HTTP status, and who answers with it."""

from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

from api.explain import explain
from squeeze.errors import (
    BodyInvalid,
    BodyTooLarge,
    InternalError,
    MethodNotAllowed,
    RequestRefused,
    RouteNotFound,
    SqueezeError,
    Unauthenticated,
)
from squeeze.objects import Problem, ProblemDetail
from squeeze.specs.job_spec import JobSpec

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:squeeze:error:"
RETRY_AFTER_SECONDS = 2

STATUS: dict[str, int] = {
    "error": 500,
    "request_refused": 400,
    "spec_invalid": 422,
    "format_unfit": 422,
    "body_invalid": 400,
    "body_too_large": 413,
    "cursor_invalid": 422,
    "range_unsatisfiable": 416,
    "idempotency_mismatch": 422,
    "unauthenticated": 401,
    "rate_exceeded": 429,
    "not_found": 404,
    "job_not_found": 404,
    "file_not_found": 404,
    "artifact_not_found": 404,
    "report_not_ready": 404,
    "route_not_found": 404,
    "method_not_allowed": 405,
    "conflict": 409,
    "job_final": 409,
    "job_not_final": 409,
    "job_not_retryable": 409,
    "file_in_use": 409,
    "move_illegal": 409,
    "service_fault": 503,
    "service_unavailable": 503,
    "storage_unavailable": 503,
    "connection_failed": 503,
    "download_corrupt": 503,
    "internal_error": 500,
    # Mostly these end a job and stand in its `error`; where a route can tell at once, this is its answer.
    "job_failure": 422,
    "model_not_found": 422,
    "model_gated": 422,
    "model_unsafe": 422,
    "model_malformed": 422,
    "model_already_compressed": 422,
    "model_directory_forbidden": 422,
    "hub_unavailable": 503,
    "architecture_unsupported": 422,
    "group_size_indivisible": 422,
    "data_unusable": 422,
    "vocabularies_differ": 422,
    "not_finite": 422,
    "factorisation_failed": 422,
    "disk_full": 507,
    "out_of_memory_host": 500,
    "out_of_memory_gpu": 500,
    "process_killed": 500,
    "runtime_exceeded": 422,
    "worker_lost": 500,
    "certification_failed": 500,
    "upload_failed": 503,
    "attempt_stale": 409,
    "compression_bug": 500,
}

_OPENAI_TYPES = {401: "authentication_error", 404: "not_found_error", 409: "conflict_error", 429: "rate_limit_error"}

log = structlog.get_logger(__name__)


def problem_of(error: SqueezeError, instance: str | None = None) -> Problem:
    """The body that an error is answered with."""
    status = STATUS[error.code]
    return Problem(
        type=TYPE_PREFIX + error.code,
        title=error.title,
        status=status,
        detail=error.message,
        instance=instance,
        error=ProblemDetail(
            message=error.message,
            type="api_error" if status >= 500 else _OPENAI_TYPES.get(status, "invalid_request_error"),
            param=error.param,
            code=error.code,
        ),
    )


def problem_response(
    error: SqueezeError, instance: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    """The whole answer to an error."""
    problem = problem_of(error, instance)
    added = dict(headers or {})
    if isinstance(error, Unauthenticated):
        added["WWW-Authenticate"] = 'Bearer realm="squeeze"'
    if error.retryable and problem.status in {429, 503}:
        added["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return Response(problem.model_dump_json(), problem.status, added, MEDIA_TYPE)


def refusals(*errors: type[SqueezeError]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that can answer with these errors, grouped by status, with an example for each."""
    grouped: dict[int | str, list[type[SqueezeError]]] = {}
    listed: tuple[type[SqueezeError], ...] = (*errors, InternalError)
    for cls in listed:
        grouped.setdefault(STATUS[cls.code], []).append(cls)
    return {
        status: {
            "description": "; or ".join(f"`{cls.code}`: {cls.title}" for cls in classes) + ".",
            "content": {
                MEDIA_TYPE: {
                    "schema": {"$ref": "#/components/schemas/Problem"},
                    "examples": {cls.code: {"$ref": f"#/components/examples/{cls.code}"} for cls in classes},
                }
            },
        }
        for status, classes in grouped.items()
    }


def example(cls: type[SqueezeError]) -> dict[str, Any]:
    """The example that the contract shows of an error."""
    problem = problem_of(cls(f"{cls.title}: what exactly, and what to do next."))
    return {"summary": cls.title, "value": problem.model_dump(mode="json")}


def install(app: FastAPI) -> None:
    """Make every error that the app can raise a problem. `app.state.routes` lists its routes."""
    app.add_exception_handler(SqueezeError, _answer_own)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)


async def _answer_own(request: Request, error: Exception) -> Response:
    assert isinstance(error, SqueezeError)
    if STATUS[error.code] >= 500:
        log.warning("request_failed", code=error.code, message=error.message)
    return problem_response(error, request.url.path)


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return problem_response(explain(error.errors(), JobSpec), request.url.path)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(_methods_at(request)))
    return problem_response(_of_status(request, error, headers), request.url.path, headers)


def _methods_at(request: Request) -> set[str]:
    """What the path takes; the framework names the methods of the first route that matches, not of all."""
    routes: list[APIRoute] = request.app.state.routes
    return {method for route in routes if route.path_regex.match(request.url.path) for method in route.methods or ()}


def _of_status(request: Request, error: HTTPException, headers: dict[str, str]) -> SqueezeError:
    """What an error of the framework is in our words."""
    if error.status_code == 404:
        return RouteNotFound(f"There is no {request.url.path}. /docs lists what there is.")
    if error.status_code == 405:
        return MethodNotAllowed(f"{request.url.path} does not take {request.method}; it takes {headers['Allow']}.")
    if error.status_code == 413:
        return BodyTooLarge(error.detail)
    if error.status_code == 400:
        return BodyInvalid(f"{error.detail}. Send UTF-8 JSON with `Content-Type: application/json`.")
    if error.status_code >= 500:
        return InternalError(error.detail)
    return RequestRefused(f"{HTTPStatus(error.status_code).phrase}: {error.detail}")
