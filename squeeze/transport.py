"""HTTP below the client: sends, repeats what may be repeated, turns problems into the errors of `squeeze.errors`."""

import json
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from squeeze import __version__
from squeeze.errors import (
    ConnectionFailed,
    InternalError,
    NotFound,
    RateExceeded,
    RequestRefused,
    ServiceUnavailable,
    SpecInvalid,
    SqueezeError,
    Unauthenticated,
    rebuild,
)

# No request was served when one of these comes: even a call that must not happen twice may be sent again.
NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
LONGEST_PAUSE_SECONDS = 30.0

Answered = TypeVar("Answered", bound=BaseModel)


class Transport:
    """One connection pool to one service. Safe to share between threads."""

    def __init__(self, base_url: str, api_key: str | None, *, timeout_seconds: float, retries: int) -> None:
        url = httpx.URL(base_url) if "://" in base_url else None
        if url is None or url.scheme not in ("http", "https") or not url.host:
            raise SpecInvalid(
                f"{base_url!r} is not an address of a service; write it as http://127.0.0.1:8000", param="SQUEEZE_URL"
            )
        headers = {"User-Agent": f"squeeze-python/{__version__}", "Accept": "application/json"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self.base_url = base_url.rstrip("/")
        self.retries = retries
        self._http = httpx.Client(
            base_url=self.base_url,
            headers=headers,
            timeout=httpx.Timeout(timeout_seconds, connect=5.0),
            follow_redirects=True,  # to presigned downloads; the key is not sent along to another host
        )

    def call(self, method: str, path: str, *, repeatable: bool = False, **request: Any) -> httpx.Response:
        """Sends and returns a successful answer, or raises what the service said.

        A call is sent again, after a growing pause, when no connection came about and when the service asks for
        patience (429); a `repeatable` one also when the answer was lost or a part of the service is away (503).
        """
        for attempt in range(self.retries + 1):
            last = attempt == self.retries
            try:
                response = self._http.request(method, path, **request)
            except httpx.TransportError as lost:
                if last or not (repeatable or isinstance(lost, NEVER_SENT)):
                    raise self.unreachable(lost) from lost
                time.sleep(pause_seconds(attempt))
                continue
            if response.is_success:
                return response
            again = response.status_code == 429 or (repeatable and response.status_code == 503)
            if last or not again:
                raise error_of(response)
            time.sleep(pause_seconds(attempt, response.headers))
        raise AssertionError("the last attempt returns or raises")

    def ask(
        self, kind: type[Answered], method: str, path: str, *, repeatable: bool = False, **request: Any
    ) -> Answered:
        """What `call` answers, as one of `squeeze.objects`."""
        response = self.call(method, path, repeatable=repeatable, **request)
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as wrong:
            raise InternalError(
                f"{response.request.url} answered something else than a {kind.__name__}. Is it a Squeeze service, and "
                f"of a version that fits this client ({__version__})?"
            ) from wrong

    @contextmanager
    def stream(self, path: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        """One GET whose body the caller reads as it comes. httpx's own errors pass: the caller knows how to resume."""
        with self._http.stream("GET", path, headers=dict(headers)) as response:
            if not response.is_success:
                response.read()
                raise error_of(response)
            yield response

    def unreachable(self, lost: httpx.TransportError) -> ConnectionFailed:
        """The error for a service that did not answer."""
        reason = str(lost) or type(lost).__name__
        return ConnectionFailed(
            f"No answer from {self.base_url} ({reason}). Check that the service runs there (`make serve` starts one), "
            "or name another address with SQUEEZE_URL."
        )

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def pause_seconds(attempt: int, headers: Mapping[str, str] | None = None) -> float:
    """What the service asked for (`Retry-After`), else a quarter of a second, doubled each time, with jitter."""
    asked = (headers or {}).get("retry-after", "")
    if asked.isdecimal():
        return min(float(asked), LONGEST_PAUSE_SECONDS)
    return random.uniform(0.5, 1.0) * min(0.25 * 2.0**attempt, LONGEST_PAUSE_SECONDS)


def error_of(response: httpx.Response) -> SqueezeError:
    """The error that an answer stands for: by its `error.code`, or by its status where a proxy answered."""
    try:
        detail = response.json()["error"]
        return rebuild(str(detail["code"]), str(detail["message"]), detail.get("param"))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        kind = _BY_STATUS.get(response.status_code, InternalError if response.status_code >= 500 else RequestRefused)
        return kind(f"{response.request.url} answered {response.status_code} {response.reason_phrase}")


_BY_STATUS: dict[int, type[SqueezeError]] = {
    401: Unauthenticated,
    404: NotFound,
    429: RateExceeded,
    502: ServiceUnavailable,
    503: ServiceUnavailable,
    504: ServiceUnavailable,
}
