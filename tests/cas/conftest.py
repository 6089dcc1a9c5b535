"""Fixtures of the engine's tests."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SMALL_DISK_BYTES = 8 << 20


@pytest.fixture
def small_disk(tmp_path: Path, program: Callable[[str], str]) -> Iterator[Path]:
    """A filesystem of 8 MiB, to be filled; skipped where this user may not mount."""
    folder = tmp_path / "small"
    folder.mkdir()
    options = f"size={SMALL_DISK_BYTES}"
    mounted = subprocess.run(
        [program("mount"), "-t", "tmpfs", "-o", options, "blobcask-test", folder],
        check=False,
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run([program("umount"), "--lazy", folder], check=True)
