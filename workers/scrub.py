"""Takes secrets out of text that came from a job's process before anybody reads it."""

import os
import re
from collections.abc import Mapping, Sequence
from urllib.parse import unquote, urlsplit

from huggingface_hub import get_token

HIDDEN = "[hidden]"

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|PRIVATE|(^|_)KEY(_|$)|API_?KEY", re.IGNORECASE)
_SHORTEST = 6  # shorter values would take ordinary words out of the text
_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{8,}"  # the Hub's tokens
    r"|\bsq-[A-Za-z0-9_-]{16,}"  # our own keys
    r"|(?<=Bearer )[A-Za-z0-9._~+/=-]{6,}"
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)",  # user:password in a URL
    re.IGNORECASE,
)


def secrets(environ: Mapping[str, str] = os.environ, urls: Sequence[str] = ()) -> tuple[str, ...]:
    """The secret values that this process knows: by the names of its environment and the passwords of its URLs."""
    found = {value for name, value in environ.items() if _SECRET_NAME.search(name)}
    for url in (*urls, *(value for value in environ.values() if "://" in value)):
        password = _password(url)
        if password:
            found |= {password, unquote(password)}
    token = get_token()
    if token:
        found.add(token)
    # The longest first, or the rest of a longer one would stay behind where one holds another.
    return tuple(sorted((value for value in found if len(value) >= _SHORTEST), key=len, reverse=True))


def scrub(text: str, known: tuple[str, ...]) -> str:
    """The text without the known secrets and without what has the shape of one."""
    for value in known:
        text = text.replace(value, HIDDEN)
    return _SHAPES.sub(HIDDEN, text)


def _password(url: str) -> str | None:
    try:
        return urlsplit(url).password
    except ValueError:
        return None
