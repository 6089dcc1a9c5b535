"""What storing and reading cost in process. Small sizes: `blobcask bench` has the large ones."""

from __future__ import annotations

import os
from itertools import count
from typing import Any

import pytest

from bench.corpus import KIB, MIB, content, small_files
from cas.files import Files, PutItem
from cas.references import parse_reference
from cas.store import Store

SIZES = [4 * KIB, 64 * KIB, MIB, 8 * MIB]


@pytest.mark.parametrize("size_bytes", SIZES)
def test_put(benchmark: Any, files: Files, size_bytes: int) -> None:
    numbers = count()

    def fresh() -> tuple[tuple[bytes], dict[str, Any]]:
        return (content(size_bytes, next(numbers)),), {}

    def put(data: bytes) -> None:
        files.put(data, name="some.bin")

    benchmark.pedantic(put, setup=fresh, rounds=10)
    assert len(files.list().items) == next(numbers)


@pytest.mark.parametrize("size_bytes", SIZES)
def test_put_of_what_the_tenant_holds(benchmark: Any, files: Files, size_bytes: int) -> None:
    data = content(size_bytes, 1)
    first = files.put(data, name="some.bin")
    assert benchmark(files.put, data, name="some.bin").file_id == first.file_id


def test_put_of_what_another_tenant_holds(benchmark: Any, store: Store) -> None:
    data = content(64 * KIB, 1)
    store.files("first", "bench").put(data, name="some.bin")
    numbers = count()

    def as_a_new_tenant() -> None:
        store.files(f"tenant-{next(numbers)}", "bench").put(data, name="some.bin")

    benchmark.pedantic(as_a_new_tenant, rounds=10)


def test_put_many(benchmark: Any, files: Files) -> None:
    numbers = count()

    def fresh() -> tuple[tuple[list[PutItem]], dict[str, Any]]:
        return ([PutItem(data, "small.bin") for data in small_files(100, next(numbers))],), {}

    stored = benchmark.pedantic(files.put_many, setup=fresh, rounds=5)
    assert len({file.checksum_sha256 for file in stored}) == 100


@pytest.mark.parametrize("size_bytes", SIZES)
def test_open_and_read(benchmark: Any, files: Files, size_bytes: int) -> None:
    data = content(size_bytes, 1)
    reference = parse_reference(files.put(data, name="some.bin").storage_ref)

    def read() -> bytes:
        _, fd = files.open(reference)
        with open(fd, "rb", buffering=0) as file:
            return file.read(os.fstat(fd).st_size)

    assert benchmark(read) == data
