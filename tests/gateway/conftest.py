"""One real server for each module of tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.served import Served, serving


@pytest.fixture(scope="module")
def served(disk_folder: Path) -> Iterator[Served]:
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder,
        serving(Path(folder)) as server,
    ):
        yield server
