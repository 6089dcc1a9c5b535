"""A clock that is wrong by years, under real processes: nothing goes, and the mirror goes on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cas.clock import DAY_US
from tests.clocks import wrong_clock
from tests.end_to_end.nodes import (
    judge_bucket,
    judge_doctor,
    judge_served,
    records_of,
    serving_node,
    settings_of,
    until,
    until_mirrored,
    until_shipped,
)
from tests.s3.ceph import Bucket

pytestmark = pytest.mark.slow

DAYS = 3_650
CLOCKS = [
    pytest.param(f"-{DAYS}d", id="10 years behind"),
    pytest.param(f"+{DAYS}d", id="10 years ahead", marks=pytest.mark.soak),
    pytest.param("@1970-01-02", id="1970", marks=pytest.mark.soak),
]


@pytest.mark.parametrize("fake", CLOCKS)
def test_a_wrong_clock_sweeps_nothing_and_does_not_stop_the_mirror(
    root: Path, bucket: Bucket, fake: str
) -> None:
    wrong = wrong_clock(fake)
    settings = settings_of(bucket)
    with serving_node(root / "node", settings) as node:
        node.store_many(4)
        until_mirrored(node)
        ledger, token = node.ledger, node.served.admin
    with serving_node(root / "node", settings, ledger=ledger, environ=wrong, token=token) as node:
        during = node.store_many(4)
        # Signed with the server's time, for ours it would refuse.
        until_mirrored(node)
        until_shipped(node.root, bucket)
        judge_served(node.served, ledger.stored)
    with serving_node(root / "node", settings, ledger=ledger, token=token) as node:
        judge_served(node.served, ledger.stored)
        judge_bucket(bucket, ledger.stored)
        relative = {one.reference: one for one in during if one.retention.startswith("days:")}
        assert relative

        def dated() -> bool:
            known = records_of(node.root)
            return all(known[reference].expires_at is not None for reference in relative)

        until("the terms are counted from a time that is believed", dated)
        now_us = time.time_ns() // 1000
        for reference, one in relative.items():
            expires_at = records_of(node.root)[reference].expires_at
            days = int(one.retention.removeprefix("days:"))
            assert expires_at is not None
            assert abs(expires_at - (now_us + days * DAY_US)) < DAY_US
    judge_doctor(root / "node", settings)
