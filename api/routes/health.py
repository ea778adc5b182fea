"""For operators: alive, ready, metrics. None of them asks for a key, none tells of any one project."""

from collections.abc import Callable, Mapping

import anyio
import structlog
from anyio import to_thread
from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from api.metrics import Metrics
from api.problems import refusals
from api.service import Parts, Service
from jobs import listing
from jobs.queue import QUEUES, waiting
from squeeze.errors import ServiceUnavailable, SqueezeError
from squeeze.objects import Status

CHECK_SECONDS = 3.0

router = APIRouter(tags=["operation"])
log = structlog.get_logger(__name__)


class Alive(BaseModel):
    status: str = "ok"


@router.get("/healthz", summary="Is the process alive?", responses=refusals())
async def healthz() -> Alive:
    """Looks at nothing else, so that a database that is down restarts no API."""
    return Alive()


@router.get("/readyz", summary="Can it serve?", responses=refusals(ServiceUnavailable))
async def readyz(service: Parts) -> Alive:
    """The database, the queue and the storage answer. 503 names those that don't."""
    checks: dict[str, Callable[[], object]] = {
        "database": service.database.check,
        "queue": lambda: waiting(service.queue, QUEUES[0]),
        "storage": service.storage.check,
    }
    faults: dict[str, str] = {}

    async def ask(name: str, check: Callable[[], object]) -> None:
        try:
            with anyio.fail_after(CHECK_SECONDS):
                await to_thread.run_sync(check, abandon_on_cancel=True)
        except SqueezeError as error:
            faults[name] = error.message
        except TimeoutError:
            faults[name] = f"no answer in {CHECK_SECONDS:g} seconds"

    async with anyio.create_task_group() as group:
        for name, check in checks.items():
            group.start_soon(ask, name, check)
    if faults:
        raise ServiceUnavailable("; ".join(f"{name}: {faults[name]}" for name in checks if name in faults))
    return Alive()


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={
        200: {"description": "The text format.", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **refusals(ServiceUnavailable),
    },
)
def metrics(request: Request) -> Response:
    """Jobs by status, messages by queue, and the time that requests took by route."""
    measured: Metrics = request.app.state.metrics
    return Response(measured.text(), media_type=CONTENT_TYPE_LATEST)


def register(metrics: Metrics, service: Service) -> None:
    """The gauges that are read at scrape time."""

    def jobs_by_status() -> Mapping[str, int]:
        with service.database.read() as session:
            counted = listing.count(session)
        return {
            status.value: sum(number for (_, each), number in counted.items() if each is status) for status in Status
        }

    def messages_by_queue() -> Mapping[str, int]:
        try:
            return {queue: waiting(service.queue, queue) for queue in QUEUES}
        except ServiceUnavailable as error:  # no figure is better than a wrong one; the others are still told
            log.warning("queue_unreadable", reason=error.message)
            return {}

    metrics.gauge("squeeze_jobs", "Jobs of all projects.", "status", jobs_by_status)
    metrics.gauge("squeeze_queue_messages", "Messages that no worker has taken.", "queue", messages_by_queue)
