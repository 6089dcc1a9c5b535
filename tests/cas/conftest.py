"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mounts import mounted

SMALL_DISK_BYTES = 8 << 20


@pytest.fixture
def small_disk(tmp_path: Path, program: Callable[[str], str]) -> Iterator[Path]:
    """A filesystem of 8 MiB, to be filled; skipped where this user may not mount."""
    with mounted(tmp_path, SMALL_DISK_BYTES, program) as disk:
        yield disk
