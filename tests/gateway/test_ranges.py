"""Ranges and conditions as RFC 9110 has them, on values alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cas.digest import digest_of
from gateway.errors import RangeNotSatisfiable
from gateway.ranges import Span, entity_tag, names_tag, parse_range, range_applies

TAG = entity_tag(digest_of(b""))


@pytest.mark.parametrize(
    ("header", "size", "span"),
    [
        ("bytes=0-0", 10, (0, 1)),
        ("bytes=0-", 10, (0, 10)),
        ("bytes=3-5", 10, (3, 6)),
        ("bytes=9-", 10, (9, 10)),
        ("bytes=5-99999", 10, (5, 10)),
        ("bytes=-3", 10, (7, 10)),
        ("bytes=-99", 10, (0, 10)),
        ("Bytes=1-2", 10, (1, 3)),
    ],
)
def test_one_range_is_a_part(header: str, size: int, span: tuple[int, int]) -> None:
    assert parse_range(header, size) == span


@pytest.mark.parametrize(
    "header",
    [None, "", "bytes=", "bytes=-", "bytes=5-2", "bytes=0-1,3-4", "lines=0-1", "bytes=a-b", "0-1"],
)
def test_what_is_no_single_range_of_bytes_means_all(header: str | None) -> None:
    assert parse_range(header, 10) is None


@pytest.mark.parametrize(
    ("header", "size"), [("bytes=10-", 10), ("bytes=99-100", 10), ("bytes=-0", 10), ("bytes=0-", 0)]
)
def test_a_range_behind_the_end_cannot_be_satisfied(header: str, size: int) -> None:
    with pytest.raises(RangeNotSatisfiable) as caught:
        parse_range(header, size)
    assert caught.value.size_bytes == size


@given(st.integers(0, 2**70), st.integers(0, 2**70), st.integers(0, 2**40))
def test_no_range_reaches_beyond_the_bytes(first: int, last: int, size: int) -> None:
    for header in (f"bytes={first}-{last}", f"bytes={first}-", f"bytes=-{last}"):
        try:
            span = parse_range(header, size)
        except RangeNotSatisfiable:
            continue
        assert span is None or 0 <= span.start < span.stop <= size


def test_a_content_range_counts_as_http_does() -> None:
    assert Span(2, 5).content_range(10) == "bytes 2-4/10"


def test_tags_are_compared_weakly_or_strongly() -> None:
    assert names_tag(f'"other", {TAG}', TAG, weakly=True)
    assert names_tag(f"W/{TAG}", TAG, weakly=True)
    assert not names_tag(f"W/{TAG}", TAG, weakly=False)
    assert names_tag("*", TAG, weakly=False)
    assert not names_tag('"other"', TAG, weakly=True)
    assert not names_tag(None, TAG, weakly=True)


def test_if_range_wants_exactly_this_tag() -> None:
    assert range_applies(None, TAG)
    assert range_applies(TAG, TAG)
    assert not range_applies(f"W/{TAG}", TAG)
    assert not range_applies("Sat, 21 Nov 2026 07:00:00 GMT", TAG)
