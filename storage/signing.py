"""Presigned S3 URLs with query parameters of our choice (AWS Signature Version 4), unlike those of obstore's `sign`.

Source: https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html
"""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from urllib.parse import quote, urlsplit

EXPIRES_SECONDS_MAX = 7 * 24 * 3600


@dataclass(frozen=True)
class Keys:
    """Static credentials; the secret parts stay out of reprs, and so out of logs."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)


def presigned(
    method: str, url: str, keys: Keys, *, region: str, expires_seconds: int, now: datetime, query: Mapping[str, str]
) -> str:
    """`url` (scheme, host and encoded path, no query) with `query` and a signature that holds for `expires_seconds`."""
    parts = urlsplit(url)
    moment = now.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")
    scope = f"{moment[:8]}/{region}/s3/aws4_request"
    signed = {
        **query,
        "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
        "X-Amz-Credential": f"{keys.access_key_id}/{scope}",
        "X-Amz-Date": moment,
        "X-Amz-Expires": str(expires_seconds),
        "X-Amz-SignedHeaders": "host",
    }
    if keys.session_token:
        signed["X-Amz-Security-Token"] = keys.session_token
    canonical_query = "&".join(
        f"{name}={value}" for name, value in sorted((_encoded(n), _encoded(v)) for n, v in signed.items())
    )
    request = "\n".join([method, parts.path, canonical_query, f"host:{parts.netloc}", "", "host", "UNSIGNED-PAYLOAD"])
    to_sign = "\n".join(["AWS4-HMAC-SHA256", moment, scope, sha256(request.encode()).hexdigest()])
    key = f"AWS4{keys.secret_access_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    return f"{parts.scheme}://{parts.netloc}{parts.path}?{canonical_query}&X-Amz-Signature={signature}"


def check_lifetime(expires_seconds: int) -> None:
    if not 1 <= expires_seconds <= EXPIRES_SECONDS_MAX:
        raise ValueError(f"a presigned URL lives for 1 to {EXPIRES_SECONDS_MAX} seconds, not {expires_seconds}")


def attachment(filename: str) -> str:
    """A Content-Disposition that makes browsers save rather than show (RFC 6266), whatever the name holds."""
    plain = "".join(
        letter if letter.isascii() and letter.isprintable() and letter not in '"\\%' else "_" for letter in filename
    )
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"


def _encoded(text: str) -> str:
    return quote(text, safe="-_.~")
