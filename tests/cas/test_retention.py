"""Retention policies: what they mean, and which can never be meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cas.clock import DAY_US, HOUR_US, rfc3339
from cas.errors import InvalidRetention
from cas.retention import FOREVER, Retention, Term, parse_retention

NOW_US = 20_454 * DAY_US  # 2026-01-01


@pytest.mark.parametrize(
    ("text", "expires_at"),
    [
        ("hours:1", NOW_US + HOUR_US),
        ("days:30", NOW_US + 30 * DAY_US),
        ("forever", None),
        ("until:2026-01-02T00:00:00Z", NOW_US + DAY_US),
        ("until:2026-01-02T01:00:00+01:00", NOW_US + DAY_US),
        ("until:2026-01-01T00:00:00.000001Z", NOW_US + 1),
        ("until:1970-01-01T00:00:00Z", 0),
    ],
)
def test_a_policy_says_when_a_file_expires(text: str, expires_at: int | None) -> None:
    policy = parse_retention(text)
    assert policy.expires_at(NOW_US) == expires_at
    assert policy.text == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "days",
        "days:",
        "days:0",
        "hours:0",
        "days:-1",
        "days:1.5",
        "days: 1",
        "days:1 ",
        "days:1\n",
        "days:99999999",
        "days:٣",
        "weeks:1",
        "Forever",
        "until:",
        "until:tomorrow",
        "until:2026-01-01",
        "until:2026-01-01T00:00:00",
        "until:2026-13-01T00:00:00Z",
        "until:1969-12-31T23:59:59Z",
        "until:0001-01-01T00:00:00Z",
        "until:9999-12-31T23:59:59-23:59",
        "until:10000-01-01T00:00:00Z",
    ],
)
def test_what_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(InvalidRetention) as error:
        parse_retention(text)
    assert error.value.value == text


@given(st.text(max_size=40) | st.from_regex(r"(days|hours|until):[-0-9TZ:.+]{0,30}"))
def test_every_expiry_can_be_kept_and_shown(text: str) -> None:
    try:
        policy = parse_retention(text)
    except InvalidRetention:
        return
    expires_at = policy.expires_at(NOW_US)
    if expires_at is not None:
        assert 0 <= expires_at < 1 << 63  # what an index key and a record hold
        assert rfc3339(expires_at)


policies = st.sampled_from(
    [
        parse_retention(text)
        for text in (
            *("hours:1", "hours:30", "days:2", "days:400", "forever"),
            *(f"until:{year}-01-02T00:00:00Z" for year in (1999, 2026, 2030)),
        )
    ]
)
storings = st.lists(st.tuples(policies, st.booleans()), min_size=1, max_size=6)


def over_at(term: Term, dated_us: int) -> int | None:
    return term.dated(dated_us).expires_at


@given(storings, st.integers(0, 1 << 50))
def test_what_is_stored_again_and_again_is_kept_for_the_longest(
    storings: list[tuple[Retention, bool]], waited_us: int
) -> None:
    """Counted from the dating where the clock was in doubt, and no policy without its expiry."""
    dated_us = NOW_US + waited_us
    term = None
    for policy, believed in storings:
        another = policy.term(NOW_US, believed=believed)
        term = another if term is None else term.longer(another)
    assert term is not None
    ends = [policy.expires_at(NOW_US if believed else dated_us) for policy, believed in storings]
    assert over_at(term, dated_us) == (None if None in ends else max(filter(None, ends)))
    text = term.dated(dated_us).retention_policy
    fitting = {policy.text for (policy, _), end in zip(storings, ends, strict=True)
               if end == over_at(term, dated_us)}  # fmt: skip
    assert text in fitting


@given(policies, policies, st.booleans(), st.booleans())
def test_while_undated_a_term_has_no_end(
    one: Retention, two: Retention, first: bool, second: bool
) -> None:
    term = one.term(NOW_US, believed=first).longer(two.term(NOW_US, believed=second))
    assert term.undated_at is None or term.expires_at is None
    if term.undated_at is None:
        assert term.dated(NOW_US + 1) == term


def test_forever_is_one_value() -> None:
    assert parse_retention("forever") is FOREVER
