"""What a job made: the list, each file, all of it as one tar, and the report."""

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from fastapi import APIRouter, Request, Response

from api.auth import Project
from api.downloads import PRESIGNED_SECONDS, RANGE_PARAMETERS, Content, answer, downloads
from api.pages.report import CONTENT_SECURITY_POLICY, page
from api.problems import refusals
from api.routes import examples
from api.routes.jobs import ALWAYS
from api.service import Parts, Service
from api.tar import Member, Tar
from jobs import lifecycle, listing, views
from jobs.records import ArtifactRecord, JobRecord
from squeeze.errors import ArtifactNotFound, JobNotFound, RangeUnsatisfiable, ReportNotReady, StorageUnavailable
from squeeze.objects import Artifact, Page
from squeeze.reports.report import Report

TAR = "application/x-tar"
BINARY = "*/*"  # each has its own

router = APIRouter(prefix="/v1/jobs", tags=["artifacts"])

_GET_FILE: dict[str, Any] = {
    "responses": {
        **downloads(BINARY, digest=True, redirects=True),
        **refusals(*ALWAYS, JobNotFound, ArtifactNotFound, RangeUnsatisfiable, StorageUnavailable),
    },
    "response_class": Response,
    "openapi_extra": {"parameters": RANGE_PARAMETERS},
}
_GET_TAR: dict[str, Any] = {
    "responses": {
        **downloads(TAR, digest=False, redirects=False),
        **refusals(*ALWAYS, JobNotFound, ArtifactNotFound, RangeUnsatisfiable, StorageUnavailable),
    },
    "response_class": Response,
    "openapi_extra": {"parameters": RANGE_PARAMETERS},
}


@router.get(
    "/{job_id}/artifacts",
    summary="List what a job made",
    responses={
        200: {"content": {"application/json": {"example": examples.ARTIFACTS}}},
        **refusals(*ALWAYS, JobNotFound),
    },
)
def list_artifacts(job_id: str, service: Parts, project: Project) -> Page[Artifact]:
    """Every file with its size, SHA-256 and where to download it; empty until the job has succeeded."""
    with service.database.read() as session:
        found = [views.artifact(record) for record in listing.artifacts(session, project, job_id)]
    return Page.of(found, False, lambda one: one.filename)


@router.head("/{job_id}/artifacts/{filename:path}", summary="Size and digest of a file", **_GET_FILE)
@router.get("/{job_id}/artifacts/{filename:path}", summary="Download a file", **_GET_FILE)
def download(job_id: str, filename: str, request: Request, service: Parts, project: Project) -> Response:
    """The content. `Range` resumes a broken download (`curl -C - -O …`), `Repr-Digest` checks the whole.

    Where the artifacts lie in S3, GET answers 307 with a URL that needs no key for an hour.
    """
    with service.database.read() as session:
        record = listing.artifact(session, project, job_id, filename)
    name = PurePosixPath(record.filename).name
    return answer(
        request,
        Content(
            filename=name,
            size_bytes=record.bytes,
            etag=record.sha256,
            media_type=record.content_type,
            read=partial(service.storage.read, record.storage_key),
            sha256=record.sha256,
            presign=lambda: service.storage.presign(
                record.storage_key, expires_seconds=PRESIGNED_SECONDS, filename=name
            ),
        ),
    )


@router.head("/{job_id}/archive", summary="Size of the archive", **_GET_TAR)
@router.get("/{job_id}/archive", summary="Download everything as one tar", **_GET_TAR)
def archive(job_id: str, request: Request, service: Parts, project: Project) -> Response:
    """Every artifact in one tar, made while it is sent: `curl … | tar x`. Its bytes never change, so `Range` works."""
    with service.database.read() as session:
        job = lifecycle.find(session, project, job_id)
        records = listing.artifacts(session, project, job_id)
    if not records:
        raise ArtifactNotFound(f"{job_id} is {job.status.value} and has no artifacts; a job has some once it succeeded")
    for record in records:  # once the answer has begun, what is missing could only break it
        service.storage.size(record.storage_key)
    tar = _tar(service, job, records)
    contents = "\n".join(f"{record.sha256} {record.bytes} {record.filename}" for record in records)
    return answer(
        request,
        Content(
            filename=f"{job_id}.tar",
            size_bytes=tar.size_bytes,
            etag=hashlib.sha256(f"tar 1 {job_id}\n{contents}".encode()).hexdigest(),
            media_type=TAR,
            read=tar.chunks,
        ),
    )


@router.get(
    "/{job_id}/report",
    summary="What the job did to size, quality and speed",
    response_model=Report,
    responses={
        200: {
            "description": "The report; as a page where `Accept` asks for `text/html`.",
            "content": {"text/html": {"schema": {"type": "string"}}},
        },
        **refusals(*ALWAYS, JobNotFound, ReportNotReady),
    },
)
def report(job_id: str, request: Request, service: Parts, project: Project) -> Response:
    """The same as the artifact `report.json`; a browser gets it as a page."""
    with service.database.read() as session:
        found = listing.report(session, project, job_id)
    parsed = Report.model_validate(found)
    headers = {"Vary": "Accept", "X-Content-Type-Options": "nosniff"}
    if _asks_for_a_page(request.headers.get("accept", "")):
        headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
        return Response(page(job_id, parsed), headers=headers, media_type="text/html")
    return Response(parsed.model_dump_json(), headers=headers, media_type="application/json")


def _tar(service: Service, job: JobRecord, records: list[ArtifactRecord]) -> Tar:
    def member(record: ArtifactRecord) -> Member:
        def read(start: int, end: int) -> Iterator[bytes]:
            return service.storage.read(record.storage_key, start, end)

        return Member(f"{job.id}/{record.filename}", record.bytes, read)

    modified = job.finished_at or job.created_at
    return Tar([member(record) for record in records], int(modified.timestamp()))


def _asks_for_a_page(accept: str) -> bool:
    """Whether HTML is named before JSON, as browsers do."""
    kinds = [each.split(";")[0].strip() for each in accept.split(",")]
    if "text/html" not in kinds:
        return False
    return "application/json" not in kinds or kinds.index("text/html") < kinds.index("application/json")
