"""Structured logs: one line a request, with an id; headers, bodies and query strings are never logged."""

import logging
import re
import sys
import time
from secrets import token_hex
from typing import Literal

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.metrics import Metrics
from api.problems import problem_response
from squeeze.errors import InternalError

REQUEST_ID = "X-Request-Id"
QUIET = {"/healthz", "/readyz", "/metrics"}
_PLAIN_ID = re.compile(rb"^[A-Za-z0-9_.:-]{1,128}$")

log = structlog.get_logger(__name__)


def configure(form: Literal["json", "console"]) -> None:
    """Every log of the process, the libraries' too, as structured lines on stderr."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if form == "json"
        else [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                # The default shows every local variable of every frame: keys and passwords too.
                exception_formatter=structlog.dev.plain_traceback,
            )
        ]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    for library in ("httpx", "httpx2", "alembic"):  # the first two log whole URLs
        logging.getLogger(library).setLevel(logging.WARNING)


class RequestLog:
    """ASGI middleware, outermost: request id, log line, latency; an error that nobody foresaw becomes a 500 problem."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (REQUEST_ID.lower().encode(), request_id.encode())]
            await send(message)

        started = time.perf_counter()
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            await self.app(scope, receive, send_marked)
        except ClientDisconnect:
            status = status or 499  # nobody is there to read an answer
        except Exception:
            log.exception("request_crashed", method=scope["method"], path=scope["path"])
            if status:
                raise  # the answer had begun: all that is left is to break the connection
            error = InternalError(f"The service made an error; its log tells more under the request id {request_id}.")
            await problem_response(error, scope["path"])(scope, receive, send_marked)
        finally:
            seconds = time.perf_counter() - started
            self.metrics.observe(scope["method"], _template(scope), status, seconds)
            if scope["path"] not in QUIET:
                log.info(
                    "request",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    milliseconds=round(1000 * seconds, 1),
                )


def _request_id(scope: Scope) -> str:
    given: bytes = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if _PLAIN_ID.match(given) else token_hex(8)


def _template(scope: Scope) -> str:
    """The route's path with its parameters' names, so that the metrics don't grow with every id."""
    route = scope.get("route")
    return str(getattr(route, "path", "unmatched"))
