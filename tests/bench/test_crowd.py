"""The workloads of many clients run, and speak of what they say they do."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bench.crowd import get_small, put_small, slow_crowd, upload_memory
from bench.report import Row
from bench.scale import QUICK, Bench
from bench.workloads import Workload

TINY = msgspec.structs.replace(
    QUICK,
    rounds=1,
    requests=10,
    crowd_requests=40,
    slow_clients=10,
    memory_uploads=5,
    memory_bytes=1 << 20,
)


@pytest.mark.slow
@pytest.mark.parametrize("workload", [put_small, get_small, slow_crowd, upload_memory])
def test_a_crowd_is_served_and_measured(workload: Workload, root: Path) -> None:
    folder = root / "space"
    folder.mkdir()
    (row,) = workload(Bench(folder, TINY))
    assert isinstance(row, Row)
    assert row.figure > 0
    assert row.target is not None
