"""Disks so small that they can be filled, and whoever fills them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(
    folder: Path, size_bytes: int, program: Callable[[str], str], *, ext4: bool = False
) -> Iterator[Path]:
    """A filesystem of its own below `folder`: in memory, or an ext4 in a file there.

    Skips the test where this user may not mount. `program` is the fixture of that name.
    """
    disk = folder / "small"
    disk.mkdir()
    if ext4:
        image = folder / "image"
        with image.open("wb") as file:
            file.truncate(size_bytes)
        subprocess.run([program("mkfs.ext4"), "-q", "-m", "0", image], check=True)
        what = ["-o", "loop", str(image)]
    else:
        what = ["-t", "tmpfs", "-o", f"size={size_bytes}", "blobcask-test"]
    done = subprocess.run(
        [program("mount"), *what, disk], check=False, capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run([program("umount"), "--lazy", disk], check=True)


def fill(disk: Path) -> Path:
    """Somebody else takes every byte that is left, into the file that is returned."""
    hog = disk / "hog"
    for size in ("64k", "512"):  # the last bytes are too few for a large block
        subprocess.run(
            ["sh", "-c", 'dd if=/dev/zero bs="$1" >> "$2" 2>/dev/null; true', "sh", size, hog],
            check=True,
        )
    return hog
