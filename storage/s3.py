"""Storage in an S3 bucket, or any server that speaks S3: `s3://bucket/prefix`.

Credentials, region and endpoint come from the usual environment: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
`AWS_SESSION_TOKEN`, `AWS_REGION`, `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`, and whatever else obstore reads (roles,
web identities). Options in the URL: `?public_endpoint=https://files.example.org` (where clients reach the server, when
that is not where we reach it) and `?presign=no` (clients can't reach it at all: the API streams).
"""

import ipaddress
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, parse_qs, urlsplit, urlunsplit

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from squeeze.errors import ArtifactNotFound, SpecInvalid, StorageUnavailable
from storage.base import CHUNK_BYTES, InvalidKeyError, Meter, Stored, check_key, chunks_of
from storage.files import disk_faults, write_whole
from storage.signing import Keys, attachment, check_lifetime, presigned

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Config

_MIB = 1 << 20
_PART_BYTES_MIN = 8 * _MIB
_PARTS_MAX = 9_000  # S3 takes 10,000 in one object
_IN_FLIGHT_BYTES = 256 * _MIB  # what the parts on their way may hold in memory, one part at least
_STREAM_BYTES_GUESS = 512 << 30  # a stream that announces no limit gets parts for this much
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


@dataclass(frozen=True)
class Place:
    """Where the bucket is and how it is reached."""

    bucket: str
    prefix: str | None
    region: str
    endpoint: str | None
    public_endpoint: str | None
    presigns: bool
    keys: Keys | None  # None: obstore finds credentials by itself (roles, web identities)


@dataclass(frozen=True)
class Patience:
    """How long a request may take, how long the server may be silent meanwhile, and how long to try again."""

    request_seconds: int
    silence_seconds: int
    retries: int
    retry_seconds: int


_MOVING = Patience(request_seconds=2 * 24 * 3600, silence_seconds=300, retries=6, retry_seconds=60)  # whole objects
_ASKING = Patience(request_seconds=20, silence_seconds=20, retries=4, retry_seconds=20)
_PROBING = Patience(request_seconds=3, silence_seconds=3, retries=0, retry_seconds=3)


class S3Storage:
    """Objects under a prefix of a bucket. Parts of uploads that were killed are left to the bucket's lifecycle rule."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._mover = _store(place, place.endpoint, _MOVING)
        self._asker = _store(place, place.endpoint, _ASKING)
        self._prober = _store(place, place.endpoint, _PROBING)
        self._signer = _store(place, place.public_endpoint or place.endpoint, _ASKING)

    def put_file(self, key: str, path: Path) -> Stored:
        return self._put(check_key(key), Meter(chunks_of(path)), expected_bytes=path.stat().st_size)

    def put_stream(self, key: str, chunks: Iterable[bytes], max_bytes: int | None = None) -> Stored:
        expected_bytes = _STREAM_BYTES_GUESS if max_bytes is None else max_bytes
        return self._put(check_key(key), Meter(chunks, max_bytes), expected_bytes=expected_bytes)

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        size = self.size(key)
        stop = size if end is None else min(end, size)
        if start >= stop:
            return iter(())
        with _faults(key):
            found = obstore.get(self._mover, key, options={"range": (start, stop)})
        return self._chunks(key, found, stop - start)

    def fetch(self, key: str, path: Path, sha256: str | None = None) -> None:
        chunks = self.read(key)
        with disk_faults():
            path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(chunks, path, path.parent, sha256=sha256)

    def size(self, key: str) -> int:
        with _faults(check_key(key)):
            return obstore.head(self._asker, key)["size"]

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except ArtifactNotFound:
            return False
        return True

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def presign(self, key: str, *, expires_seconds: int, filename: str) -> str | None:
        place = self._place
        check_lifetime(expires_seconds)
        if not place.presigns:
            return None
        with _faults(check_key(key)):
            url = obstore.sign(self._signer, "GET", key, timedelta(seconds=expires_seconds))
        if place.keys is None:
            return url  # of a role; the object itself says "attachment" and its key ends in its name
        return presigned(
            "GET",
            urlunsplit(urlsplit(url)._replace(query="")),
            place.keys,
            region=place.region,
            expires_seconds=expires_seconds,
            now=datetime.now(UTC),
            query={"response-content-disposition": attachment(filename)},
        )

    def delete(self, key: str) -> None:
        with _faults(check_key(key)):
            obstore.delete(self._asker, key)

    def delete_prefix(self, prefix: str) -> int:
        keys = list(self.list(check_key(prefix)))
        if keys:
            with _faults(prefix):
                obstore.delete(self._asker, keys)
        return len(keys)

    def list(self, prefix: str = "") -> Iterator[str]:
        if prefix and self.exists(prefix):
            yield prefix
        with _faults(prefix):
            for page in obstore.list(self._asker, prefix or None):
                yield from (found["path"] for found in page)

    def check(self) -> None:
        with _faults(""):
            next(iter(obstore.list(self._prober, chunk_size=1)), None)

    def _put(self, key: str, meter: Meter, *, expected_bytes: int) -> Stored:
        part_bytes = max(_PART_BYTES_MIN, math.ceil(expected_bytes / _PARTS_MAX / _MIB) * _MIB)
        with _faults(key, meter):
            start = list(_until(meter, part_bytes))
            small = sum(map(len, start)) < part_bytes
            obstore.put(
                self._mover,
                key,
                b"".join(start) if small else chain(start, meter),
                attributes={"Content-Disposition": "attachment"},
                use_multipart=not small,
                chunk_size=part_bytes,
                max_concurrency=min(4, max(1, _IN_FLIGHT_BYTES // part_bytes)),
            )
        return meter.stored()

    def _chunks(self, key: str, found: "obstore.GetResult", expected_bytes: int) -> Iterator[bytes]:
        received = 0
        with _faults(key):
            for chunk in found.stream(min_chunk_size=CHUNK_BYTES):
                received += len(chunk)
                yield bytes(chunk)
        if received != expected_bytes:
            raise StorageUnavailable(f"The object storage ended {key} after {received:,} of {expected_bytes:,} bytes.")


def open_url(url: SplitResult, environ: Mapping[str, str]) -> S3Storage:
    if not url.hostname or url.username is not None or url.port is not None or url.hostname != url.netloc:
        raise SpecInvalid("SQUEEZE_STORAGE_URL takes s3://bucket/prefix; credentials belong in AWS_ACCESS_KEY_ID and …")
    options = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
    presign = options.pop("presign", "yes")
    public_endpoint = options.pop("public_endpoint", None)
    if options or presign not in {"yes", "no"}:
        raise SpecInvalid(
            "The options that SQUEEZE_STORAGE_URL takes are presign=yes|no and public_endpoint=https://host."
        )
    prefix = url.path.strip("/")
    endpoint = next((environ[name].rstrip("/") for name in _ENDPOINTS if environ.get(name)), None)
    allow_http = environ.get("AWS_ALLOW_HTTP", "").lower() in {"1", "true", "yes"}
    if public_endpoint is not None and urlsplit(public_endpoint).path.strip("/"):
        raise SpecInvalid(
            "public_endpoint in SQUEEZE_STORAGE_URL takes no path: a signature covers the path of the bucket."
        )
    return S3Storage(
        Place(
            bucket=url.hostname,
            prefix=check_key(prefix) if prefix else None,
            region=environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or "us-east-1",
            endpoint=_reachable("AWS_ENDPOINT_URL", endpoint, allow_http),
            public_endpoint=_reachable("public_endpoint", public_endpoint and public_endpoint.rstrip("/"), allow_http),
            presigns=presign == "yes",
            keys=_keys(environ),
        )
    )


def _keys(environ: Mapping[str, str]) -> Keys | None:
    access, secret = environ.get("AWS_ACCESS_KEY_ID"), environ.get("AWS_SECRET_ACCESS_KEY")
    if not access and not secret:
        return None
    if not access or not secret:
        raise SpecInvalid("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY go together; one of them is missing.")
    return Keys(access, secret, environ.get("AWS_SESSION_TOKEN") or None)


def _reachable(name: str, endpoint: str | None, allow_http: bool) -> str | None:
    if endpoint is None:
        return None
    parts = urlsplit(endpoint)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username or parts.query:
        raise SpecInvalid(f"{name} takes https://host[:port], with no credentials in it.")
    if parts.scheme == "http" and not allow_http and not _is_loopback(parts.hostname):
        raise SpecInvalid(
            f"{name} names {parts.hostname} over plain http: everything would travel in the open. Use https, "
            "or set AWS_ALLOW_HTTP=true if the network between the two is your own."
        )
    return endpoint


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _store(place: Place, endpoint: str | None, patience: Patience) -> S3Store:
    config: S3Config = {"region": place.region}
    if endpoint is not None:
        config["aws_endpoint_url_s3"] = endpoint
    if place.keys is not None:
        config["access_key_id"] = place.keys.access_key_id
        config["secret_access_key"] = place.keys.secret_access_key
        if place.keys.session_token is not None:
            config["session_token"] = place.keys.session_token
    client: ClientConfig = {
        "allow_http": endpoint is not None and endpoint.startswith("http://"),
        "connect_timeout": timedelta(seconds=5),
        "timeout": timedelta(seconds=patience.request_seconds),
        "read_timeout": timedelta(seconds=patience.silence_seconds),
    }
    retry: RetryConfig = {
        "max_retries": patience.retries,
        "retry_timeout": timedelta(seconds=patience.retry_seconds),
    }
    return S3Store(place.bucket, prefix=place.prefix, config=config, client_options=client, retry_config=retry)


def _until(chunks: Iterable[bytes], size_bytes: int) -> Iterator[bytes]:
    """Chunks until they make up `size_bytes`; the rest stays where it is."""
    total = 0
    for chunk in chunks:
        yield chunk
        total += len(chunk)
        if total >= size_bytes:
            return


@contextmanager
def _faults(key: str, source: Meter | None = None) -> Iterator[None]:
    """Turn obstore's errors into ours. What the source of an upload raised is passed on as it was."""
    try:
        yield
    except (BaseError, OSError, ValueError) as fault:
        if source is not None and source.fault is not None:
            raise source.fault from None
        if isinstance(fault, InvalidKeyError):
            raise
        text = str(fault)
        if isinstance(fault, FileNotFoundError) and "NoSuchBucket" not in text:
            raise ArtifactNotFound(f"Nothing is stored under {key}.") from fault
        raise StorageUnavailable(_advice(fault, text)) from fault


def _advice(fault: Exception, text: str) -> str:
    code, status = re.search(r"<Code>(\w+)</Code>", text), re.search(r"status code: (\d{3})", text)
    reason = code.group(1) if code else f"status {status.group(1)}" if status else type(fault).__name__
    refused = isinstance(fault, PermissionDeniedError | UnauthenticatedError)
    if refused or (status and status.group(1) in {"401", "403"}):
        return f"The object storage refused us ({reason}). Check AWS_ACCESS_KEY_ID, its secret and its rights."
    if reason == "NoSuchBucket":
        return f"The bucket does not exist ({reason}). Create it, or correct SQUEEZE_STORAGE_URL."
    return f"The object storage failed ({reason}). Check that its server runs and that AWS_ENDPOINT_URL is right."
