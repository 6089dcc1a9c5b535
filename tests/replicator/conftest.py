"""Where a node's target is, and where another node is made from it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "away"


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """Where the node is restored to: nothing was ever there."""
    return tmp_path / "new"
