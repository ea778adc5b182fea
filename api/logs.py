"""The log of requests: one line each, with an id; headers, bodies and query strings are never logged."""

import re
import time
from secrets import token_hex

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
