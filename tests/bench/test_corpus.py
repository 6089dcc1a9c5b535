"""The corpus is the same everywhere, and all different within."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from bench.corpus import MIB, SMALL_BYTES_MAX, SMALL_BYTES_MIN, LargeFile, content, small_files


def test_small_files_are_seeded_and_of_the_promised_sizes() -> None:
    files = small_files(200)
    assert files == small_files(200)
    assert len(set(files)) == 200
    assert all(SMALL_BYTES_MIN <= len(data) <= SMALL_BYTES_MAX for data in files)


def test_contents_differ_by_number_and_within() -> None:
    data = content(3 * MIB + 5, 1)
    assert len(data) == 3 * MIB + 5
    assert data[:MIB] != data[MIB : 2 * MIB]
    assert data != content(3 * MIB + 5, 2)


def test_a_large_file_becomes_another_one_in_place(root: Path) -> None:
    large = LargeFile(root / "large", 2 * MIB)
    digests = {hashlib.sha256(large.path.read_bytes()).digest()}
    for _ in range(3):
        digests.add(hashlib.sha256(large.renew().read_bytes()).digest())
    assert len(digests) == 4
    assert large.path.stat().st_size == 2 * MIB


def test_a_size_that_is_no_whole_number_of_mib_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="MiB"):
        LargeFile(root / "large", MIB + 1)
