"""Who asks: a Bearer key belongs to a project; on loopback, while no key exists, everybody is the project `default`."""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.service import Parts, Service
from jobs import keys
from squeeze.errors import Unauthenticated

OPEN_PROJECT = "default"
USED_EVERY_SECONDS = 60.0  # how exact a key's `last_used_at` is
HOW_TO_MAKE_A_KEY = "python -m jobs keys create --project default --name first"

_bearer = HTTPBearer(
    auto_error=False,
    bearerFormat="sq-…",
    description=f"An API key of a project, made by `{HOW_TO_MAKE_A_KEY}`. Not needed on loopback while no key exists.",
)


def is_loopback(host: str) -> bool:
    """Whether a host name or address reaches this machine alone."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def project_of(
    request: Request,
    service: Parts,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> str:
    """The project that the request acts for; raises Unauthenticated."""
    if credentials is not None:
        return _project_of_key(service, credentials.credentials)
    if request.headers.get("authorization"):
        raise Unauthenticated("Send the API key as `Authorization: Bearer sq-…`.")
    with service.database.read() as session:
        keyed = keys.any_active(session)
    if keyed:
        raise Unauthenticated(f"Send an API key as `Authorization: Bearer sq-…`. Make one with `{HOW_TO_MAKE_A_KEY}`.")
    _refuse_strangers(request)
    return OPEN_PROJECT


Project = Annotated[str, Depends(project_of)]


def _project_of_key(service: Service, plaintext: str) -> str:
    with service.database.read() as session:
        key = keys.find(session, plaintext)
    if key is None:
        raise Unauthenticated(f"The API key is unknown or revoked. Make one with `{HOW_TO_MAKE_A_KEY}`.")
    at = datetime.now(UTC)
    if key.last_used_at is None or at - key.last_used_at > timedelta(seconds=USED_EVERY_SECONDS):
        with service.database.write() as session:
            keys.used(session, key.id, at=at, every_seconds=USED_EVERY_SECONDS)
    return key.project


def _refuse_strangers(request: Request) -> None:
    """Open means open to this machine: not to other hosts, nor to web pages that a browser here happens to show."""
    for side in ("server", "client"):
        address = request.scope.get(side)
        if address is not None and address[1] is not None and not is_loopback(address[0]):
            raise Unauthenticated(
                f"Without any API key the service answers on loopback alone. Make a key: `{HOW_TO_MAKE_A_KEY}`."
            )
    host = request.headers.get("host", "")
    # A page whose name was pointed at 127.0.0.1 sends its own name as Host; a form on a foreign page its Origin.
    if not is_loopback(urlsplit(f"//{host}").hostname or ""):
        raise Unauthenticated(f"Without any API key, ask for http://127.0.0.1 or http://localhost, not {host!r}.")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        raise Unauthenticated("Without any API key, pages of other sites can't use the service. Make a key.")
