"""What happens to a job: as a list, or as a stream that ends with the job."""

import time
from collections.abc import AsyncIterator
from typing import Annotated

import anyio
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.responses import StreamingResponse

from api.auth import Project
from api.problems import refusals
from api.routes import examples
from api.routes.jobs import ALWAYS
from api.service import Parts, Service
from jobs import lifecycle, views
from squeeze.errors import JobNotFound
from squeeze.objects import FINAL, Event, Page

POLL_SECONDS = 0.5
KEEPALIVE_SECONDS = 15.0
BATCH = 100
EVENT_STREAM = "text/event-stream"

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.get(
    "/{job_id}/events",
    summary="Follow a job",
    response_model=Page[Event],
    responses={
        200: {
            "description": "A list, or with `Accept: text/event-stream` a stream that ends with the job.",
            "content": {
                "application/json": {"example": examples.EVENTS},
                EVENT_STREAM: {"schema": {"type": "string"}, "example": examples.EVENT_STREAM},
            },
        },
        204: {"description": "The stream has nothing more to tell: the job has ended and you have seen all of it."},
        **refusals(*ALWAYS, JobNotFound),
    },
)
def events(
    job_id: str,
    request: Request,
    service: Parts,
    project: Project,
    after: Annotated[int, Query(ge=0, description="The last event that you have seen.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="Entries of a page; a stream has no pages.")] = BATCH,
    last_event_id: Annotated[
        str | None, Header(description="The last event that you have seen, as browsers send it when they reconnect.")
    ] = None,
) -> Page[Event] | Response:
    """The events of the job, oldest first: changes of status, stages, progress, warnings.

    As a stream: `curl -N -H 'Accept: text/event-stream' …`. Each event has an `id`; after a broken connection send the
    last one as `Last-Event-ID` and nothing is missed or told twice. The stream ends after the event that ends the job.
    """
    if last_event_id is not None and last_event_id.isdecimal() and last_event_id.isascii():
        after = max(after, int(last_event_id[:18]))
    if EVENT_STREAM not in request.headers.get("accept", ""):
        found, has_more, _ = _read(service, project, job_id, after, limit)
        return Page.of(found, has_more, lambda one: str(one.id))
    found, _, final = _read(service, project, job_id, after, 1)
    if final and not found:
        return Response(status_code=204)  # which also tells a browser to stop reconnecting
    return StreamingResponse(
        _stream(service, project, job_id, after),
        media_type=EVENT_STREAM,
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},  # proxies must not collect events
    )


async def _stream(service: Service, project: str, job_id: str, after: int) -> AsyncIterator[bytes]:
    """Asks the database again and again, in sessions that last for one question each."""
    told = time.monotonic()
    while not service.stopping.is_set():
        try:
            found, has_more, final = await run_in_threadpool(_read, service, project, job_id, after, BATCH)
        except JobNotFound:
            return  # deleted meanwhile
        for event in found:
            yield format_sse_event(data_str=event.model_dump_json(), event=event.type, id=str(event.id))
            after = event.id
        if final and not has_more:
            return
        if found:
            told = time.monotonic()
        elif time.monotonic() - told > KEEPALIVE_SECONDS:
            told = time.monotonic()
            yield KEEPALIVE_COMMENT
        if not has_more:
            await anyio.sleep(POLL_SECONDS)


def _read(service: Service, project: str, job_id: str, after: int, limit: int) -> tuple[list[Event], bool, bool]:
    """(events, whether more are there, whether the job has ended).

    The job is looked at before its events are: once it is final, the events that are read are all that there will be.
    """
    with service.database.read() as session:
        final = lifecycle.find(session, project, job_id).status in FINAL
        records = lifecycle.events(session, job_id, after, limit + 1)
    return [views.event(record) for record in records[:limit]], len(records) > limit, final
