"""/docs: the contract in Swagger UI, with every asset from this very service, so that it works without a network."""

import gzip
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.responses import RedirectResponse

from squeeze.errors import RouteNotFound

_ASSETS = Path(__file__).parent / "swagger"
_MEDIA_TYPES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
_START = """window.onload = () => {
  window.ui = SwaggerUIBundle({
    url: "openapi.json", dom_id: "#docs", deepLinking: true, tryItOutEnabled: true, persistAuthorization: false,
    presets: [SwaggerUIBundle.presets.apis], layout: "BaseLayout", validatorUrl: null,
  });
};
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Squeeze API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="docs"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
# Swagger UI sets styles on its elements and draws its icons from data: URLs; scripts come from here alone.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

router = APIRouter(include_in_schema=False)


@router.get("/")
async def home() -> Response:
    """For people who open the service's address in a browser."""
    return RedirectResponse("docs", 307)


@router.get("/docs")
async def docs() -> Response:
    return Response(_PAGE, media_type="text/html", headers={"Content-Security-Policy": _POLICY})


@router.get("/docs/start.js")
async def start() -> Response:
    return Response(_START, media_type="text/javascript")


@router.get("/docs/{name}")
def asset(name: str, request: Request) -> Response:
    """Kept compressed, and sent so to everybody who takes it."""
    if name not in _MEDIA_TYPES:
        raise RouteNotFound(f"There is no {request.url.path}.")
    content = (_ASSETS / f"{name}.gz").read_bytes()
    headers = {"Cache-Control": "public, max-age=3600", "Vary": "Accept-Encoding"}
    if "gzip" in request.headers.get("accept-encoding", ""):
        headers["Content-Encoding"] = "gzip"
    else:
        content = gzip.decompress(content)
    return Response(content, media_type=_MEDIA_TYPES[name], headers=headers)
