"""The load generator counts only whole successes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.load import Refused, load
from bench.serving import Serving, serving

OK = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture
def bare(root: Path) -> Iterator[Serving]:
    with serving(root / "bare", bare=True) as server:
        yield server


@pytest.mark.parametrize(("requests", "connections"), [(1, 1), (50, 7), (3, 7)])
def test_every_request_is_answered_once(bare: Serving, requests: int, connections: int) -> None:
    done = load(bare.host, bare.port, [OK] * requests, connections)
    assert len(done.latencies_s) == requests
    assert 0 < max(done.latencies_s) <= done.seconds


def test_a_refusal_ends_the_load(bare: Serving) -> None:
    with pytest.raises(Refused, match="404"):
        load(bare.host, bare.port, [OK, OK.replace(b"/ ", b"/other ")], 1)
