"""Content over HTTP: whole or in part, resumable, checkable, never cached under a wrong name."""

from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from api.problems import problem_response
from api.ranges import content_range, parse_range
from squeeze.errors import RangeUnsatisfiable

PRESIGNED_SECONDS = 3600


@dataclass(frozen=True)
class Content:
    """Something to download. `etag` is strong: the same etag, the same bytes. `read(start, end)` gives them."""

    filename: str
    size_bytes: int
    etag: str
    media_type: str
    read: Callable[[int, int], Iterator[bytes]]
    sha256: str | None = None
    presign: Callable[[], str | None] = lambda: None


def answer(request: Request, content: Content) -> Response:
    """200, 206, 304, 307 or 416, by the request's method and headers."""
    headers = _headers(content)
    if _matches(request.headers.get("if-none-match"), content.etag):
        return Response(status_code=304, headers={name: headers[name] for name in ("ETag", "Cache-Control")})
    whole = {**headers, "Content-Length": str(content.size_bytes)}
    if request.method == "HEAD":
        return Response(headers=whole, media_type=content.media_type)
    url = content.presign()
    if url is not None:
        return RedirectResponse(url, 307, headers)
    condition = request.headers.get("if-range")
    wanted = request.headers.get("range") if condition in {None, _quoted(content.etag)} else None
    try:
        span = parse_range(wanted, content.size_bytes)
    except RangeUnsatisfiable as error:
        refused = {"Content-Range": content_range(None, content.size_bytes), "Accept-Ranges": "bytes"}
        return problem_response(error, request.url.path, refused)
    if span is None:
        return _stream(content, 0, content.size_bytes, 200, whole)
    start, end = span
    part = {
        **headers,
        "Content-Length": str(end - start),
        "Content-Range": content_range(span, content.size_bytes),
    }
    return _stream(content, start, end, 206, part)


# What the routes that download say of themselves in the contract.
HEADERS: dict[str, Any] = {
    "ETag": {"description": "Strong: it changes with the bytes.", "schema": {"type": "string"}},
    "Accept-Ranges": {"description": "`bytes`: resume with `Range`.", "schema": {"type": "string"}},
    "Content-Disposition": {"description": "The name to save under.", "schema": {"type": "string"}},
}
DIGEST: dict[str, Any] = {
    "Repr-Digest": {
        "description": "SHA-256 of the whole file (RFC 9530): `sha-256=:base64:`.",
        "schema": {"type": "string"},
    }
}
RANGE_PARAMETERS: list[dict[str, Any]] = [
    {
        "name": "Range",
        "in": "header",
        "required": False,
        "description": "One range, for example `bytes=1000-`; answered with 206. Several at once are answered whole.",
        "schema": {"type": "string"},
    },
    {
        "name": "If-Range",
        "in": "header",
        "required": False,
        "description": "An ETag: `Range` counts only while the content is still that one.",
        "schema": {"type": "string"},
    },
    {
        "name": "If-None-Match",
        "in": "header",
        "required": False,
        "description": "ETags; 304 where the content is one of them.",
        "schema": {"type": "string"},
    },
]


def downloads(media_type: str, *, digest: bool, redirects: bool) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that downloads, as far as they are no errors."""
    headers = {**HEADERS, **(DIGEST if digest else {})}
    body = {media_type: {"schema": {"type": "string", "format": "binary"}}}
    part = {"Content-Range": {"description": "Which bytes these are.", "schema": {"type": "string"}}}
    answers: dict[int | str, dict[str, Any]] = {
        200: {"description": "The whole content.", "headers": headers, "content": body},
        206: {"description": "The range that was asked for.", "headers": {**headers, **part}, "content": body},
        304: {"description": "You have it already (`If-None-Match`)."},
    }
    if redirects:
        answers[307] = {"description": "Where the object storage hands it out itself: follow `Location`."}
    return answers


def _headers(content: Content) -> dict[str, str]:
    headers = {
        "ETag": _quoted(content.etag),
        "Accept-Ranges": "bytes",
        "Content-Disposition": _disposition(content.filename),
        "Cache-Control": "private, no-cache",
        # The bytes are a user's: a browser must neither guess their type nor run them as a page of this service.
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; sandbox",
    }
    if content.sha256 is not None:
        headers["Repr-Digest"] = f"sha-256=:{b64encode(bytes.fromhex(content.sha256)).decode()}:"
    return headers


def _stream(content: Content, start: int, end: int, status: int, headers: dict[str, str]) -> Response:
    """Reads the first chunk before the headers go out, so that content that can't be read is still a problem."""
    chunks = content.read(start, end)
    first = next(chunks, b"") if end > start else b""
    return StreamingResponse(chain([first], chunks), status, headers, content.media_type)


def _quoted(etag: str) -> str:
    return f'"{etag}"'


def _matches(header: str | None, etag: str) -> bool:
    """If-None-Match compares weakly (RFC 9110 §13.1.2)."""
    if header is None:
        return False
    given = [each.strip().removeprefix("W/") for each in header.split(",")]
    return "*" in given or _quoted(etag) in given


def _disposition(filename: str) -> str:
    plain = "".join(each if each.isascii() and each.isprintable() and each not in '"\\' else "_" for each in filename)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"
