"""What every route works with: the settings, the database, the storage, the queue."""

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from anyio import CapacityLimiter
from celery import Celery
from fastapi import Depends, Request

from jobs.database import Database
from jobs.queue import celery_app
from jobs.settings import Settings
from storage import Storage, open_storage

UPLOADS_AT_ONCE = 16
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Service:
    """The parts of one running API process. Nothing is connected before its first use."""

    settings: Settings
    database: Database
    storage: Storage
    queue: Celery
    hub: str
    """The Hub's address."""
    upload_turns: CapacityLimiter
    """Uploads hold a thread while they wait for their client; these are not the threads of the other requests."""
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set when the process is told to end, so that streams of events end too."""


def open_service(settings: Settings, environ: Mapping[str, str] = os.environ) -> Service:
    return Service(
        settings=settings,
        database=Database(settings.database_url),
        storage=open_storage(settings.storage_url),
        queue=celery_app(settings.broker_url),
        hub=environ.get("HF_ENDPOINT") or HUB,
        upload_turns=CapacityLimiter(UPLOADS_AT_ONCE),
    )


async def service_of(request: Request) -> Service:
    """The service of the app that got the request; async, because that costs no thread."""
    service: Service = request.app.state.service
    return service


Parts = Annotated[Service, Depends(service_of)]
