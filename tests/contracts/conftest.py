"""The implementations of each seam; the suites know nothing else of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from cas.catalog import Catalog
from cas.catalog.local import CatalogSettings, LocalCatalog
from cas.clock import DAY_US
from cas.durable import DISK
from tests.clocks import HandClock


class OpenCatalog(Protocol):
    """Opens the test's one catalog, or opens it again after `close`."""

    def __call__(self) -> Catalog: ...


def _local(root: Path, clock: HandClock) -> Catalog:
    settings = CatalogSettings(clock_gap_us_max=30 * DAY_US, lock_wait_s=10)
    return LocalCatalog(root, settings, clock=clock, disk=DISK)


CATALOGS: dict[str, Callable[[Path, HandClock], Catalog]] = {"local": _local}


@pytest.fixture(params=CATALOGS)
def open_catalog(
    request: pytest.FixtureRequest, root: Path, clock: HandClock
) -> Iterator[OpenCatalog]:
    opened: list[Catalog] = []

    def open_it() -> Catalog:
        opened.append(CATALOGS[request.param](root, clock))
        return opened[-1]

    yield open_it
    for catalog in opened:
        catalog.close()


@pytest.fixture
def catalog(open_catalog: OpenCatalog) -> Catalog:
    return open_catalog()
