"""Jobs: submit, look, list, cancel, retry, delete."""

import hashlib
import re
from typing import Annotated

import structlog
from fastapi import APIRouter, Depends, Header, Query, Request, Response

from api.admission import directory_of
from api.auth import Project
from api.body import Spec, documented
from api.factoring import refuse_unfactorable
from api.learning import refuse_unusable
from api.merging import refuse_unlike
from api.problems import refusals
from api.routes import examples
from api.service import Parts, Service
from api.slimming import refuse_unmeetable
from api.sparsifying import refuse_unprunable
from jobs import lifecycle, views
from jobs.places import checkpoints_prefix
from jobs.queue import enqueue
from jobs.records import JobRecord
from squeeze.errors import (
    BodyInvalid,
    BodyTooLarge,
    Conflict,
    CursorInvalid,
    DataUnusable,
    FormatUnfit,
    IdempotencyMismatch,
    JobFinal,
    JobNotFinal,
    JobNotFound,
    JobNotRetryable,
    ModelAlreadyCompressed,
    ModelDirectoryForbidden,
    ModelMalformed,
    ModelUnsafe,
    ServiceUnavailable,
    SpecInvalid,
    StorageUnavailable,
    Unauthenticated,
)
from squeeze.objects import Deleted, Job, Page, Status
from squeeze.specs.formats import refuse_unfit
from squeeze.steps.every import Kind

ALWAYS = (Unauthenticated, ServiceUnavailable, SpecInvalid)
_METADATA = re.compile(r"metadata\[([^\[\]]+)\]")

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
log = structlog.get_logger(__name__)

After = Annotated[
    str | None, Query(description="The `last_id` of the page before.", max_length=128, examples=[examples.JOB_ID])
]
Limit = Annotated[int, Query(ge=1, le=100, description="Entries of a page.")]


@router.post(
    "",
    status_code=202,
    summary="Submit a job",
    responses={
        202: {
            "headers": {"Location": {"description": "Where the job is.", "schema": {"type": "string"}}},
            "content": {"application/json": {"example": examples.JOB}},
        },
        **refusals(
            *ALWAYS,
            BodyInvalid,
            BodyTooLarge,
            FormatUnfit,
            ModelDirectoryForbidden,
            DataUnusable,
            ModelAlreadyCompressed,
            ModelMalformed,
            ModelUnsafe,
            IdempotencyMismatch,
            StorageUnavailable,
        ),
    },
    openapi_extra=documented(examples.SPECS),
)
def submit(
    spec: Spec,
    response: Response,
    service: Parts,
    project: Project,
    idempotency_key: Annotated[
        str | None,
        Header(description="Any text of yours, at most 255 characters: the same key and body give the same job again."),
    ] = None,
) -> Job:
    """Takes a job. Only `model` and `steps` are required; what can be checked without the model is checked now, the
    records that an uploaded file gives a training, the settings of what is merged and the sizes that a model can be cut
    to included.

    Answers 202 with the queued job. Poll it, or follow its events, until its `status` is `succeeded`, `failed` or
    `cancelled`. With an `Idempotency-Key` a repeated request gives the job of the first one; with another body it is
    refused.
    """
    refuse_unfit(spec.steps, spec.formats)
    for param, name in spec.models.items():
        directory_of(name, service.settings.model_roots, param, adapter=".models." in param)
    refuse_unusable(service, project, spec)
    refuse_unlike(service, project, spec)
    refuse_unprunable(service, project, spec)
    refuse_unmeetable(service, project, spec)
    refuse_unfactorable(service, project, spec)
    body_hash = hashlib.sha256(spec.model_dump_json().encode()).hexdigest()
    with service.database.write() as session:
        record, created = lifecycle.submit(
            session, project=project, spec=spec, idempotency_key=idempotency_key, body_hash=body_hash
        )
    if created:
        log.info("job_submitted", job_id=record.id, project=project)
        _ring(service, record)
    response.headers["Location"] = f"/v1/jobs/{record.id}"
    return views.job(record)


def metadata_of(request: Request) -> dict[str, str]:
    """The `metadata[key]=value` parameters."""
    found: dict[str, str] = {}
    for name, value in request.query_params.items():
        if name != "metadata" and not name.startswith("metadata["):
            continue
        match = _METADATA.fullmatch(name)
        if match is None:
            raise SpecInvalid(f"{name[:60]!r} is no filter; write `metadata[key]=value`.", param="metadata")
        found[match[1]] = value
    return found


@router.get(
    "",
    summary="List jobs",
    responses={
        200: {"content": {"application/json": {"example": examples.JOBS}}},
        **refusals(*ALWAYS, CursorInvalid),
    },
    openapi_extra={
        "parameters": [
            {
                "name": "metadata",
                "in": "query",
                "required": False,
                "style": "deepObject",
                "explode": True,
                "description": "`metadata[team]=search`: only jobs with this entry; several must all be there.",
                "schema": {"type": "object", "additionalProperties": {"type": "string"}},
            }
        ]
    },
)
def list_jobs(
    service: Parts,
    project: Project,
    metadata: Annotated[dict[str, str], Depends(metadata_of)],
    after: After = None,
    limit: Limit = 20,
    status: Annotated[Status | None, Query(description="Only jobs that are so.")] = None,
    kind: Annotated[Kind | None, Query(description="Only jobs with a step of this kind.")] = None,
) -> Page[Job]:
    """The project's jobs, newest first. While `has_more` is true, ask again with `after` = `last_id`."""
    with service.database.read() as session:
        records, has_more = lifecycle.list_jobs(
            session, project, after=after, limit=limit, status=status, kind=kind, metadata=metadata
        )
    return Page.of([views.job(record) for record in records], has_more, lambda one: one.id)


@router.get(
    "/{job_id}",
    summary="Look at a job",
    responses={
        200: {"content": {"application/json": {"example": examples.JOB_DONE}}},
        **refusals(*ALWAYS, JobNotFound),
    },
)
def show(job_id: str, service: Parts, project: Project) -> Job:
    """Its status, progress, and when it has ended its headline figures or its error."""
    with service.database.read() as session:
        return views.job(lifecycle.find(session, project, job_id))


@router.post(
    "/{job_id}/cancel",
    summary="Cancel a job",
    responses={
        200: {"content": {"application/json": {"example": {**examples.JOB, "status": "cancelled"}}}},
        **refusals(*ALWAYS, JobNotFound, JobFinal),
    },
)
def cancel(job_id: str, service: Parts, project: Project) -> Job:
    """A queued job is cancelled at once; a running one becomes `cancelling` and stops within seconds.

    Asking again changes nothing. A job that succeeded or failed answers 409.
    """
    with service.database.write() as session:
        record = lifecycle.cancel(session, project, job_id)
    if record.status == Status.cancelled:  # it waited for another attempt, perhaps; a worker clears up after its own
        clear(service, checkpoints_prefix(job_id))
    return views.job(record)


@router.post(
    "/{job_id}/retry",
    summary="Try a job again",
    responses={
        200: {"content": {"application/json": {"example": examples.JOB}}},
        **refusals(*ALWAYS, JobNotFound, JobNotFinal, JobNotRetryable),
    },
)
def retry(job_id: str, service: Parts, project: Project) -> Job:
    """A failed or cancelled job is queued again and resumes from what its last attempt kept."""
    with service.database.write() as session:
        record = lifecycle.retry(session, project, job_id)
    _ring(service, record)
    return views.job(record)


@router.delete(
    "/{job_id}",
    summary="Delete a job and its artifacts",
    responses={
        200: {"content": {"application/json": {"example": {"id": examples.JOB_ID, "object": "job", "deleted": True}}}},
        **refusals(*ALWAYS, JobNotFound, JobNotFinal, Conflict),
    },
)
def delete(job_id: str, service: Parts, project: Project) -> Deleted:
    """Only a job that has ended; cancel it first otherwise. Its artifacts, events and report go too."""
    with service.database.write() as session:
        prefixes = lifecycle.delete(session, project, job_id)
    for prefix in prefixes:  # after the commit: a row without bytes would be worse than bytes without a row
        clear(service, prefix)
    log.info("job_deleted", job_id=job_id, project=project)
    return Deleted(id=job_id, object="job")


def clear(service: Service, prefix: str) -> None:
    """Removes bytes whose row is gone already; what can't be removed now is told to the operator."""
    try:
        service.storage.delete_prefix(prefix.rstrip("/"))
    except StorageUnavailable as error:
        log.error("bytes_left_behind", prefix=prefix, reason=error.message)


def _ring(service: Service, record: JobRecord) -> None:
    """Tells the workers. The database has the job already: where the broker is down, the sweep tells them later."""
    try:
        enqueue(service.queue, record.id, record.queue, record.priority)
    except ServiceUnavailable as error:
        log.warning("enqueue_failed", job_id=record.id, reason=error.message)
