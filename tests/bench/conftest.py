"""A store to be measured, and a server before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.serving import Serving, serving
from bench.storing import ACTOR, TENANT
from cas.files import Files
from cas.store import Store


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with Store.open(root / "root") as store:
        yield store


@pytest.fixture
def files(store: Store) -> Files:
    return store.files(TENANT, ACTOR)


@pytest.fixture
def server(root: Path) -> Iterator[Serving]:
    with serving(root / "served") as server:
        yield server
