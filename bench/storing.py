"""Workloads of storing and reading in process: the engine without HTTP."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

from bench.corpus import KIB, MIB, LargeFile, content, small_files
from bench.measure import Run, Samples, Side, alternate
from bench.peers import copy_durably, hashfs_put_all, sha256_of, write_durably
from bench.report import Quantity, Row, Target
from bench.scale import Bench
from cas.files import PutItem
from cas.references import parse_reference
from cas.store import Store

TENANT = "bench"
ACTOR = "bench"


def rate(samples: Samples, amount: float, unit: str) -> Quantity:
    """The median speed, for runs that did `amount` each."""
    return Quantity(
        amount / samples.median_s, unit, [round(amount / s, 3) for s in samples.seconds]
    )


def put_unique(bench: Bench) -> list[Row]:
    """One large file that nobody has, against the slower of hashing and copying it."""
    source = LargeFile(bench.folder / "source", bench.scale.large_bytes)

    def put(run: Run) -> None:
        source.renew()
        with Store.open(run.folder / "root") as store:
            files = store.files(TENANT, ACTOR)
            with run.timed():
                files.put(source.path, name="large")

    def sha256(run: Run) -> None:
        source.renew()
        with run.timed():
            sha256_of(source.path)

    def copy(run: Run) -> None:
        source.renew()
        with run.timed():
            copy_durably(source.path, run.folder / "copy")

    ours, hashed, copied = alternate(
        bench.folder,
        bench.scale.rounds,
        [Side("put", put), Side("sha256", sha256), Side("copy", copy)],
    )
    limit = max(hashed, copied, key=lambda samples: samples.median_s)
    source.path.unlink()
    megabytes = source.size_bytes / 1e6
    return [
        Row(
            "put_unique",
            f"put of one unique file of {source.size_bytes >> 20} MiB, durable",
            rate(ours, megabytes, "MB/s"),
            limit.median_s / ours.median_s,
            rate(limit, megabytes, "MB/s"),
            "the slower of SHA-256 and copy + fdatasync: "
            + ("SHA-256" if limit is hashed else "the copy"),
            Target(0.9),
            f"SHA-256 {rate(hashed, megabytes, 'MB/s')}, copy {rate(copied, megabytes, 'MB/s')}",
        )
    ]


def put_held(bench: Bench) -> list[Row]:
    """A large file that the same tenant has already: hashed, and not written."""
    source = LargeFile(bench.folder / "source", bench.scale.large_bytes)
    with Store.open(bench.folder / "held") as store:
        files = store.files(TENANT, ACTOR)
        files.put(source.path, name="large")

        def put(run: Run) -> None:
            with run.timed():
                files.put(source.path, name="large")

        def sha256(run: Run) -> None:
            with run.timed():
                sha256_of(source.path)

        ours, limit = alternate(
            bench.folder, bench.scale.rounds, [Side("put", put), Side("sha256", sha256)]
        )
    source.path.unlink()
    megabytes = source.size_bytes / 1e6
    return [
        Row(
            "put_held",
            f"put of {source.size_bytes >> 20} MiB that the same tenant holds, seekable source",
            rate(ours, megabytes, "MB/s"),
            limit.median_s / ours.median_s,
            rate(limit, megabytes, "MB/s"),
            "SHA-256 of it",
            Target(0.9),
        )
    ]


def put_many(bench: Bench) -> list[Row]:
    """Many small files with one barrier, against a store that syncs nothing."""
    contents = small_files(bench.scale.small_files)

    def put(run: Run) -> None:
        items = [
            PutItem(data, f"{number}.bin", content_type="application/octet-stream")
            for number, data in enumerate(contents)
        ]
        with Store.open(run.folder / "root") as store:
            files = store.files(TENANT, ACTOR)
            with run.timed():
                files.put_many(items)

    def hashfs(run: Run) -> None:
        with run.timed():
            hashfs_put_all(run.folder, contents)

    ours, limit = alternate(
        bench.folder, bench.scale.rounds, [Side("put_many", put), Side("hashfs", hashfs)]
    )
    count = len(contents)
    return [
        Row(
            "put_many",
            f"put_many of {count:,} files of 0.6-16 KB, durable",
            rate(ours, count, "files/s"),
            limit.median_s / ours.median_s,
            rate(limit, count, "files/s"),
            "hashfs 0.7.2, put by put, nothing synced",
            Target(2),
        )
    ]


def put_by_size(bench: Bench) -> list[Row]:
    """Single durable puts of several sizes, against one durable file each."""
    rows = []
    for size_bytes, count in bench.scale.sizes:
        contents = [content(size_bytes, number) for number in range(count)]

        def put(run: Run, contents: list[bytes] = contents) -> None:
            with Store.open(run.folder / "root") as store:
                files = store.files(TENANT, ACTOR)
                with run.timed():
                    for data in contents:
                        files.put(data, name="some.bin")

        def write(run: Run, contents: list[bytes] = contents) -> None:
            with run.timed():
                for number, data in enumerate(contents):
                    write_durably(data, run.folder / f"{number}")

        ours, limit = alternate(
            bench.folder, min(3, bench.scale.rounds), [Side("put", put), Side("write", write)]
        )
        rows.append(
            Row(
                "put_by_size",
                f"put of {shown(size_bytes)}, one by one, durable",
                rate(ours, count, "/s"),
                limit.median_s / ours.median_s,
                rate(limit, count, "/s"),
                "write, fdatasync, fsync of the folder: no digest, no record",
            )
        )
    return rows


def get_by_size(bench: Bench) -> list[Row]:
    """Finding and reading files of several sizes, against reading plain files."""
    rows = []
    for size_bytes, count in bench.scale.sizes:
        folder = bench.folder / f"get-{size_bytes}"
        with Store.open(folder) as store:
            files = store.files(TENANT, ACTOR)
            stored = [
                files.put(content(size_bytes, number), name="some.bin") for number in range(count)
            ]
            references = [parse_reference(file.storage_ref) for file in stored]
            paths = [store.blobs.path(file.checksum_sha256) for file in stored]

            def get(run: Run) -> None:
                with run.timed():
                    for reference in references:  # noqa: B023  # runs inside this turn
                        _, fd = files.open(reference)  # noqa: B023
                        _read_to_end(fd)

            def read(run: Run) -> None:
                with run.timed():
                    for path in paths:  # noqa: B023
                        _read_to_end(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

            ours, limit = alternate(
                bench.folder, min(3, bench.scale.rounds), [Side("get", get), Side("read", read)]
            )
        rows.append(
            Row(
                "get_by_size",
                f"open by reference and read {shown(size_bytes)}",
                rate(ours, count, "/s"),
                limit.median_s / ours.median_s,
                rate(limit, count, "/s"),
                "open by path and read",
            )
        )
    return rows


def dedupe(bench: Bench) -> list[Row]:
    """The same bytes from another tenant, against new bytes: they must take as long."""
    size_bytes, count = MIB, dict(bench.scale.sizes)[MIB]
    rows = []
    with Store.open(bench.folder / "dedupe") as store:
        first = store.files("first", ACTOR)
        second = store.files("second", ACTOR)
        hits: list[float] = []
        misses: list[float] = []
        for number in range(count):
            known = content(size_bytes, number)
            first.put(known, name="some.bin")
            unknown = content(size_bytes, count + number)
            pair = ((known, hits), (unknown, misses))
            for data, seconds in pair if number % 2 == 0 else reversed(pair):
                began = time.perf_counter()
                second.put(data, name="some.bin")
                seconds.append(time.perf_counter() - began)
    hit, miss = statistics.median(hits) * 1e3, statistics.median(misses) * 1e3
    rows.append(
        Row(
            "dedupe",
            f"put of {shown(size_bytes)} that another tenant has",
            Quantity(hit, "ms", [round(s * 1e3, 3) for s in hits]),
            miss / hit,
            Quantity(miss, "ms", [round(s * 1e3, 3) for s in misses]),
            "put of as many new bytes (1.00 x: time tells nothing)",
        )
    )
    return rows


def _read_to_end(fd: int) -> None:
    try:
        while os.read(fd, MIB):
            pass
    finally:
        os.close(fd)


def shown(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB" if size_bytes >= MIB else f"{size_bytes // KIB} KiB"


def folder_of(bench: Bench, name: str) -> Path:
    folder = bench.folder / name
    folder.mkdir()
    return folder
