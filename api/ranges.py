"""Which bytes a `Range` header asks for (RFC 9110 §14): one range; anything that is not one is answered whole."""

import re

from squeeze.errors import RangeUnsatisfiable

_ONE_RANGE = re.compile(r"^bytes=\s*(?:(\d{1,20})-(\d{0,20})|-(\d{1,20}))\s*$", re.ASCII | re.IGNORECASE)


def parse_range(header: str | None, size_bytes: int) -> tuple[int, int] | None:
    """The span [start, end) that the header asks for; None where the whole is to be sent.

    Several ranges, other units and what can't be read are ignored, as the RFC allows. Raises RangeUnsatisfiable where
    the range is readable and lies outside.
    """
    match = _ONE_RANGE.match(header) if header else None
    if match is None:
        return None
    first, last, suffix = match.groups()
    if suffix is not None:
        start, end = max(0, size_bytes - int(suffix)), size_bytes
    else:
        if last and int(last) < int(first):
            return None  # not a valid range: as if it was not there
        start, end = int(first), min(int(last) + 1, size_bytes) if last else size_bytes
    if start >= end:
        raise RangeUnsatisfiable(f"{header} lies outside the {size_bytes:,} bytes that there are.")
    return start, end


def content_range(span: tuple[int, int] | None, size_bytes: int) -> str:
    """The `Content-Range` header of a part, or of a refusal."""
    return f"bytes */{size_bytes}" if span is None else f"bytes {span[0]}-{span[1] - 1}/{size_bytes}"
