"""What a spec would need; runs nothing."""

from fastapi import APIRouter

from api.auth import Project
from api.body import Spec, documented
from api.planning import plan
from api.problems import refusals
from api.routes import examples
from api.routes.jobs import ALWAYS
from api.service import Parts
from squeeze.errors import BodyInvalid, BodyTooLarge
from squeeze.objects import Plan

router = APIRouter(prefix="/v1/plan", tags=["plan"])


@router.post(
    "",
    summary="Estimate a job",
    responses={
        200: {"content": {"application/json": {"example": examples.PLAN}}},
        **refusals(*ALWAYS, BodyInvalid, BodyTooLarge),
    },
    openapi_extra=documented(examples.SPECS),
)
def make_plan(spec: Spec, service: Parts, project: Project) -> Plan:
    """Looks at the model's config and the headers of its weights. Takes the body of `POST /v1/jobs`; keeps nothing.

    Says how large the result will be, what memory, disk and time the job will take, and everything that stands in its
    way: `obstacles`, with the codes that the job would fail with.
    """
    return plan(service, project, spec)
