"""The body that a job is submitted with: read once the key was checked, taken strictly, explained where it is wrong."""

from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.openapi.models import Example
from pydantic import ValidationError

from api.auth import Project
from api.explain import explain
from squeeze.errors import BodyInvalid
from squeeze.specs.job_spec import JobSpec


async def spec_of(request: Request, project: Project) -> JobSpec:  # noqa: ARG001 (whoever has no key is refused first)
    """The spec in a JSON body. Strict: `true` is no number and `"4"` neither, as the contract says."""
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    # A page of another site can send any other type without asking first.
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise BodyInvalid("Send a JSON object with `Content-Type: application/json`.")
    try:
        return JobSpec.model_validate_json(await request.body(), strict=True)
    except ValidationError as error:
        raise explain(error.errors(include_url=False), JobSpec) from error


Spec = Annotated[JobSpec, Depends(spec_of)]


def documented(examples: dict[str, Example]) -> dict[str, Any]:
    """What the contract says of such a body."""
    content = {"schema": {"$ref": "#/components/schemas/JobSpec"}, "examples": examples}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}
