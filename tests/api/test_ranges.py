"""Range headers against a plain reading of the RFC."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.ranges import content_range, parse_range
from squeeze.errors import RangeUnsatisfiable

sizes = st.integers(0, 10**6)
positions = st.integers(0, 2 * 10**6)


@given(size=sizes, first=positions, last=st.none() | positions)
def test_a_range_gives_the_bytes_that_it_names(size: int, first: int, last: int | None) -> None:
    header = f"bytes={first}-{'' if last is None else last}"
    named = range(first, size if last is None else last + 1)
    wanted = [byte for byte in (named.start, named.stop - 1) if named and byte < size]
    if last is not None and last < first:
        assert parse_range(header, size) is None
    elif not wanted or first >= size:
        with pytest.raises(RangeUnsatisfiable):
            parse_range(header, size)
    else:
        assert parse_range(header, size) == (first, min(named.stop, size))


@given(size=sizes, suffix=positions)
def test_a_suffix_gives_the_last_bytes(size: int, suffix: int) -> None:
    if suffix == 0 or size == 0:
        with pytest.raises(RangeUnsatisfiable):
            parse_range(f"bytes=-{suffix}", size)
    else:
        assert parse_range(f"bytes=-{suffix}", size) == (max(0, size - suffix), size)


@given(header=st.text(max_size=40) | st.from_regex(r"bytes=[-0-9, ]*", fullmatch=True), size=sizes)
def test_whatever_is_sent_the_span_lies_inside(header: str, size: int) -> None:
    try:
        span = parse_range(header, size)
    except RangeUnsatisfiable:
        return
    assert span is None or 0 <= span[0] < span[1] <= size


@pytest.mark.parametrize("header", [None, "", "bytes=", "bytes=-", "bytes=0-1,3-4", "lines=0-1", "bytes=a-b", "0-1"])
def test_what_is_not_one_range_is_ignored(header: str | None) -> None:
    assert parse_range(header, 10) is None


def test_content_range_counts_both_ends() -> None:
    assert content_range((2, 5), 10) == "bytes 2-4/10"
    assert content_range(None, 10) == "bytes */10"
