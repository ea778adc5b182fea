"""Bodies that are too large are refused before they are read: by their Content-Length, or else while they stream."""

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import problem_response
from squeeze.errors import BodyTooLarge

FORM_OVERHEAD_BYTES = 64 * 1024
UPLOAD_PATH = "/v1/files"


class BodyLimit:
    """ASGI middleware; never holds more of a body than the chunk that just came.

    FastAPI's own `max_body_size` answers in plain text; this answers with a problem.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_upload_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        uploads = scope["path"] == UPLOAD_PATH and scope["method"] == "POST"
        limit = self.max_upload_bytes + FORM_OVERHEAD_BYTES if uploads else self.max_body_bytes
        advice = f"{scope['path']} takes at most {limit:,} bytes."
        if _announced(scope) > limit:
            error = BodyTooLarge(f"The body has {_announced(scope):,} bytes. {advice}")
            await problem_response(error, scope["path"])(scope, receive, send)
            return
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                # an HTTPException, because FastAPI turns any other that comes from reading a body into a 400
                raise HTTPException(413, f"The body is too large. {advice}")
            return message

        await self.app(scope, receive_limited, send)


def _announced(scope: Scope) -> int:
    """Content-Length; 0 where there is none. Servers refuse one that is no number."""
    value: bytes = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    return int(value) if value.isdigit() else 0
