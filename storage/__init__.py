"""Bytes under keys, in a local directory or an S3 bucket; knows nothing of jobs."""

import os
from collections.abc import Callable, Mapping
from urllib.parse import SplitResult, urlsplit

from squeeze.errors import SpecInvalid
from storage import local, s3
from storage.base import CHUNK_BYTES, InvalidKeyError, Storage, Stored

__all__ = ["BACKENDS", "CHUNK_BYTES", "InvalidKeyError", "Storage", "Stored", "open_storage"]

# A new backend is one file and one line here: the scheme of its URLs, and what opens them.
BACKENDS: dict[str, Callable[[SplitResult, Mapping[str, str]], Storage]] = {
    "file": local.open_url,
    "s3": s3.open_url,
}


def open_storage(url: str, environ: Mapping[str, str] = os.environ) -> Storage:
    """The storage that a `SQUEEZE_STORAGE_URL` names; `environ` holds the credentials that it may need."""
    parts = urlsplit(url)
    if parts.scheme not in BACKENDS:
        raise SpecInvalid(f"SQUEEZE_STORAGE_URL takes {' or '.join(f'{scheme}://…' for scheme in BACKENDS)}.")
    return BACKENDS[parts.scheme](parts, environ)
