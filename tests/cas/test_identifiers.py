"""Identifiers are UUIDs of version 7 that sort by the time they were made."""

from __future__ import annotations

import uuid

from hypothesis import given
from hypothesis import strategies as st

from cas.identifiers import new_id

times = st.integers(0, (1 << 48) * 1000 - 1)


@given(times)
def test_an_identifier_is_a_canonical_uuid_7(now_us: int) -> None:
    text = new_id(now_us)
    parsed = uuid.UUID(text)
    assert str(parsed) == text
    assert parsed.version == 7
    assert parsed.variant == uuid.RFC_4122
    assert parsed.int >> 80 == now_us // 1000


@given(times, times)
def test_identifiers_sort_by_their_milliseconds(one: int, other: int) -> None:
    if one // 1000 < other // 1000:
        assert new_id(one) < new_id(other)


def test_no_two_are_alike() -> None:
    assert len({new_id(0) for _ in range(10_000)}) == 10_000
