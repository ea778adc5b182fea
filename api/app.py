"""The HTTP application: middleware, routes, errors, and what is opened at start and closed at the end."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from api import problems
from api.contract import DESCRIPTION, TAGS, describe
from api.limits import BodyLimit
from api.logs import RequestLog
from api.metrics import Metrics
from api.pages import docs
from api.routes import artifacts, events, files, health, jobs, methods, plan
from api.service import open_service
from jobs.settings import Settings
from squeeze import __version__


class App(FastAPI):
    """FastAPI whose contract speaks of our problems."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = describe(super().openapi())
        return self.openapi_schema


def create_app(settings: Settings) -> FastAPI:
    """The application; nothing is opened, connected or written before it starts."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = open_service(settings)
        if service.database.is_sqlite:
            service.database.migrate()  # a server's database is migrated by its operator; /readyz says when it is not
        health.register(metrics, service)
        app.state.service = service
        yield
        service.stopping.set()
        service.queue.close()
        service.database.dispose()

    app = App(
        title="Squeeze",
        version=__version__,
        summary="Makes language models smaller, cheaper and faster.",
        description=DESCRIPTION,
        openapi_tags=TAGS,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        servers=[{"url": settings.public_url}] if settings.public_url else None,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
        separate_input_output_schemas=False,
    )
    app.state.metrics = metrics
    problems.install(app)
    routers = [room.router for room in (jobs, events, artifacts, files, methods, plan, health, docs)]
    app.state.routes = [route for router in routers for route in router.routes]
    for router in routers:
        app.include_router(router)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, max_body_bytes=settings.max_body_bytes, max_upload_bytes=settings.max_upload_bytes)
    app.add_middleware(RequestLog, metrics=metrics)
    return app


def __getattr__(name: str) -> Any:
    """`api.app:app` for servers that take an application by name; made on demand: an import reads no settings."""
    if name == "app":
        return create_app(Settings.from_environment())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
