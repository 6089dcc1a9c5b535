"""One server for all that is sent to harm it, looked at after each test."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.served import Served, serving, until


@pytest.fixture(scope="package")
def served(disk_folder: Path) -> Iterator[Served]:
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder,
        serving(Path(folder), GATEWAY__WORKERS="1", GATEWAY__THREADS="4") as server,
    ):
        assert server.ask("GET", "/healthz").status == 200  # its worker is there
        yield server


@pytest.fixture(autouse=True)
def unharmed(served: Served) -> Iterator[None]:
    """Whatever was sent, the same process serves on, and no half-written file is left."""
    workers = served.workers()
    yield
    assert served.ask("GET", "/healthz").status == 200
    assert served.workers() == workers
    # What a refusal rehearsed is cleaned up after its answer.
    until(lambda: not list((served.root / "partial").iterdir()))
    until(lambda: not [name for name in served.objects() if name.startswith(".tmp-")])


@pytest.fixture
def nothing_kept(served: Served) -> Iterator[None]:
    """What is sent in this test is refused whole."""
    before = served.objects()
    yield
    until(lambda: served.objects() == before)


@pytest.fixture
def slot(served: Served) -> str:
    """The path and query of a fresh slot's URL."""
    url: str = served.request_upload(max_files=2)["presigned_urls"][0]
    return url.removeprefix(served.address)
