"""Uploaded text for calibration, training and evaluation."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any, Literal, get_args

import structlog
from anyio import from_thread, to_thread
from fastapi import APIRouter, Query, Request, Response

from api.auth import Project
from api.downloads import PRESIGNED_SECONDS, RANGE_PARAMETERS, Content, answer, downloads
from api.multipart import Form, Part
from api.problems import refusals
from api.routes import examples
from api.routes.jobs import ALWAYS, After, Limit, clear
from api.service import Parts, Service
from api.sniff import checked, content_type, plain_name
from jobs import files, views
from jobs.records import new_id
from squeeze.errors import (
    BodyInvalid,
    BodyTooLarge,
    CursorInvalid,
    DataUnusable,
    DiskFull,
    FileInUse,
    FileNotFound,
    RangeUnsatisfiable,
    SpecInvalid,
    StorageUnavailable,
)
from squeeze.objects import Deleted, File, Page
from storage import CHUNK_BYTES, Stored

Purpose = Literal["calibration", "training", "evaluation"]
PURPOSES: tuple[str, ...] = get_args(Purpose)
BINARY = "*/*"  # by the ending of its name

router = APIRouter(prefix="/v1/files", tags=["files"])
log = structlog.get_logger(__name__)

_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "purpose": {"type": "string", "enum": list(PURPOSES), "description": "What it is for."},
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "`.jsonl` (one object with `text` a line), `.txt` or `.parquet`.",
                        },
                    },
                }
            }
        },
    }
}


@router.post(
    "",
    summary="Upload text",
    response_model=File,
    responses={
        200: {"content": {"application/json": {"example": examples.FILE}}},
        **refusals(*ALWAYS, BodyInvalid, BodyTooLarge, DataUnusable, StorageUnavailable, DiskFull),
    },
    openapi_extra=_FORM,
)
async def upload(request: Request, service: Parts, project: Project) -> File:
    """A form with `file` and `purpose`: `curl -F purpose=calibration -F file=@texts.jsonl …`.

    JSON lines with `text`, plain UTF-8 text, or Parquet with a column `text`; the name's ending tells which. The
    answer's `id` is what a job's `data.source` or `evaluation.source` names.
    """
    return await to_thread.run_sync(
        partial(_receive, request, service, project), limiter=service.upload_turns, abandon_on_cancel=False
    )


@router.get(
    "",
    summary="List files",
    responses={
        200: {"content": {"application/json": {"example": examples.FILES}}},
        **refusals(*ALWAYS, CursorInvalid),
    },
)
def list_files(
    service: Parts,
    project: Project,
    after: After = None,
    limit: Limit = 20,
    purpose: Annotated[Purpose | None, Query(description="Only files for this.")] = None,
) -> Page[File]:
    """The project's files, newest first. While `has_more` is true, ask again with `after` = `last_id`."""
    with service.database.read() as session:
        records, has_more = files.list_files(session, project, after=after, limit=limit, purpose=purpose)
    return Page.of([views.file(record) for record in records], has_more, lambda one: one.id)


@router.get(
    "/{file_id}",
    summary="Look at a file",
    responses={
        200: {"content": {"application/json": {"example": examples.FILE}}},
        **refusals(*ALWAYS, FileNotFound),
    },
)
def show(file_id: str, service: Parts, project: Project) -> File:
    """Its name, size, SHA-256 and purpose."""
    with service.database.read() as session:
        return views.file(files.find(session, project, file_id))


@router.get(
    "/{file_id}/content",
    summary="Download a file",
    response_class=Response,
    responses={
        **downloads(BINARY, digest=True, redirects=True),
        **refusals(*ALWAYS, FileNotFound, RangeUnsatisfiable, StorageUnavailable),
    },
    openapi_extra={"parameters": RANGE_PARAMETERS},
)
def content(file_id: str, request: Request, service: Parts, project: Project) -> Response:
    """What was uploaded, byte for byte."""
    with service.database.read() as session:
        record = files.find(session, project, file_id)
    return answer(
        request,
        Content(
            filename=record.filename,
            size_bytes=record.bytes,
            etag=record.sha256,
            media_type=content_type(record.filename),
            read=partial(service.storage.read, record.storage_key),
            sha256=record.sha256,
            presign=lambda: service.storage.presign(
                record.storage_key, expires_seconds=PRESIGNED_SECONDS, filename=record.filename
            ),
        ),
    )


@router.delete(
    "/{file_id}",
    summary="Delete a file",
    responses={
        200: {
            "content": {"application/json": {"example": {"id": examples.FILE_ID, "object": "file", "deleted": True}}}
        },
        **refusals(*ALWAYS, FileNotFound, FileInUse),
    },
)
def delete(file_id: str, service: Parts, project: Project) -> Deleted:
    """Refused while a job that has not ended names it."""
    with service.database.write() as session:
        key = files.remove(session, project, file_id)
    clear(service, key)
    return Deleted(id=file_id, object="file")


def _receive(request: Request, service: Service, project: str) -> File:
    """Takes the form from the network into the storage; what was stored is removed unless all of it is right."""
    form = Form(request.headers.get("content-type"), _body(request))
    file_id = new_id("file")
    key = files.storage_key(file_id)
    purpose: str | None = None
    filename = ""
    stored: Stored | None = None
    with ExitStack() as undo:
        for part in form:
            if part.filename is None:
                purpose = _purpose(part) if part.name == "purpose" else purpose
            elif part.name != "file" or stored is not None:
                raise BodyInvalid(f"The form has a file `{part.name}`; send one, named `file`.")
            else:
                filename = plain_name(part.filename)
                chunks = checked(filename, form.data(part))
                undo.callback(clear, service, key)
                stored = service.storage.put_stream(key, chunks, service.settings.max_upload_bytes)
        if stored is None:
            raise BodyInvalid("The form has no part `file` with a file name.")
        if purpose is None:
            raise SpecInvalid(f"The part `purpose` is missing; it takes {', '.join(PURPOSES)}.", param="purpose")
        with service.database.write() as session:
            record = files.add(
                session,
                file_id=file_id,
                project=project,
                filename=filename,
                size_bytes=stored.size_bytes,
                sha256=stored.sha256,
                purpose=purpose,
            )
        undo.pop_all()
    log.info("file_uploaded", file_id=file_id, project=project, bytes=stored.size_bytes)
    return views.file(record)


def _purpose(part: Part) -> str:
    purpose = part.value.decode(errors="replace").strip()
    if purpose == "model":
        raise SpecInvalid("Models can't be uploaded yet; name one of the Hub, a job or a directory.", param="purpose")
    if purpose not in PURPOSES:
        raise SpecInvalid(f"`purpose` is {purpose[:60]!r}; it takes {', '.join(PURPOSES)}.", param="purpose")
    return purpose


def _body(request: Request) -> Iterator[bytes]:
    """The body for a thread, about a chunk of the storage at a time."""
    stream = request.stream()

    async def gather() -> bytes:
        gathered = bytearray()
        async for chunk in stream:
            gathered += chunk
            if len(gathered) >= CHUNK_BYTES:
                break
        return bytes(gathered)

    while chunk := from_thread.run(gather):
        yield chunk
