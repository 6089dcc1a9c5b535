"""Fixtures of the crash tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_MEMORY = Path("/dev/shm")


@pytest.fixture
def platter() -> Iterator[Path]:
    """An empty folder in memory: a killed process and a simulated cut need no real disk.

    What the kernel holds survives a kill on any filesystem, and there are thousands of
    syncs to be made; the tests that need the real thing take `root`.
    """
    where = _MEMORY if _MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="blobcask-", dir=where) as folder:
        yield Path(folder)
