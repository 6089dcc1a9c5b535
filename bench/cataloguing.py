"""Workloads of the catalog: durable writes, lookups, and making the index anew."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from bench.measure import Run, Samples, Side, alternate, settle
from bench.peers import SlowDisk
from bench.report import Quantity, Row, Target
from bench.scale import Bench
from bench.storing import ACTOR, TENANT, rate
from cas.catalog import Transaction
from cas.catalog.journal import Frame, Segment, Tail, Write, encode_frame
from cas.catalog.layout import LAYOUTS, add_state, record_state
from cas.catalog.recovery import Folders
from cas.catalog.tuples import pack
from cas.digest import Digest
from cas.durable import DISK, Disk
from cas.identifiers import new_id
from cas.records import Blob, StoredFile
from cas.references import Reference, parse_reference
from cas.store import Store

SYNC_DELAY_S = 0.003  # a disk with an honest but slow flush, such as a busy SATA SSD
_THREADS = 16
_PUTS_A_FRAME = 16


def stored_file(digest: Digest, now_us: int, name: str) -> StoredFile:
    """A file record as `Files.put` makes it; `name` makes its reference unique."""
    return StoredFile(
        file_id=new_id(now_us),
        tenant_id=TENANT,
        workflow_run_id=name,
        storage_ref=str(Reference(TENANT, name, digest, "bin")),
        name="measured.bin",
        original_filename="measured.bin",
        content_type="application/octet-stream",
        size_bytes=4096,
        checksum_sha256=digest,
        retention_policy="days:30",
        expires_at=now_us + 30 * 86_400_000_000,
        created_at=now_us,
        created_by=ACTOR,
    )


def stored_blob(digest: Digest, now_us: int, refcount: int = 0) -> Blob:
    """A blob record as it is once `refcount` files name it."""
    return Blob(digest, 4096, digest[::-1], 12345, now_us, now_us, refcount=refcount)


def commits(bench: Bench) -> list[Row]:
    """Durable writes of one record each by 16 threads, against one thread."""
    return [
        _commits(bench, bench.scale.commits, DISK, Target(2), "as is"),
        _commits(
            bench,
            bench.scale.slow_commits,
            SlowDisk(SYNC_DELAY_S),
            Target(5),
            f"{SYNC_DELAY_S * 1e3:.0f} ms added to each sync",
        ),
    ]


def _commits(bench: Bench, count: int, disk: Disk, target: Target, how: str) -> Row:
    def side(threads: int, count: int) -> Side:
        def write_all(run: Run) -> None:
            with Store.open(run.folder / "root", disk=disk) as store:
                _write_records(store, threads, count, run)

        return Side(f"{threads} threads", write_all)

    # One thread does an eighth of the work: it takes as long, and the rates are compared.
    few = max(count // 8, 1)
    ours, limit = alternate(bench.folder, bench.scale.rounds, [side(_THREADS, count), side(1, few)])
    many_rate, one_rate = rate(ours, count, "writes/s"), rate(limit, few, "writes/s")
    return Row(
        "commits",
        f"durable writes of a stored-file record, {_THREADS} threads, {how}",
        many_rate,
        many_rate.value / one_rate.value,
        one_rate,
        "the same by 1 thread",
        target,
    )


def _write_records(store: Store, threads: int, count: int, run: Run) -> None:
    digest = Digest(hashlib.sha256(b"measured").digest())

    def insert(txn: Transaction, name: str) -> None:
        txn.insert(stored_file(digest, txn.now_us, name))

    def work(first: int) -> None:
        for number in range(first, count, threads):
            name = f"run-{number}"
            store.catalog.write(lambda txn: insert(txn, name), actor=ACTOR)  # noqa: B023

    store.catalog.write(lambda txn: txn.insert(stored_blob(digest, txn.now_us)))
    workers = [threading.Thread(target=work, args=(first,)) for first in range(threads)]
    with run.timed():
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()


def lookup(bench: Bench) -> list[Row]:
    """Finding one file by its reference, among as many as the scale has small files."""
    count = bench.scale.small_files
    digest = Digest(hashlib.sha256(b"measured").digest())
    with Store.open(bench.folder / "lookup") as store:
        store.catalog.write(lambda txn: txn.insert(stored_blob(digest, txn.now_us)))
        names = [f"run-{number}" for number in range(count)]
        for start in range(0, count, 1000):

            def insert(txn: Transaction, start: int = start) -> None:
                for name in names[start : start + 1000]:
                    txn.insert(stored_file(digest, txn.now_us, name))

            store.catalog.write(insert)
        files = store.files(TENANT, ACTOR)
        step = 7919  # a prime: every one in turn, and none beside the one before
        wanted = [
            parse_reference(str(Reference(TENANT, names[number * step % count], digest, "bin")))
            for number in range(bench.scale.lookups)
        ]
        took_us = []
        for reference in wanted:
            began = time.perf_counter_ns()
            files.stat(reference)
            took_us.append((time.perf_counter_ns() - began) / 1e3)
    median_us = statistics.median(took_us)
    return [
        Row(
            "lookup",
            f"lookup of a reference, in process, {count:,} files",
            Quantity(median_us, "µs"),
            median_us,
            target=Target(12, at_most=True, unit="µs"),
            note=f"99 of 100 under {statistics.quantiles(took_us, n=100)[98]:.1f} µs",
        )
    ]


def rebuild(bench: Bench) -> list[Row]:
    """Opening a store whose index was deleted, in a process of its own."""
    root = bench.folder / "rebuild"
    ops = write_journal(root, bench.scale.journal_ops)
    seconds: list[float] = []
    grown: list[float] = []
    for _ in range(min(3, bench.scale.rounds)):
        shutil.rmtree(root / "catalog" / "index")
        settle(bench.folder)
        answer = subprocess.run(
            [sys.executable, "-m", "bench.rebuilding", str(root)],
            stdout=subprocess.PIPE,
            check=True,
        )
        measured = json.loads(answer.stdout)
        seconds.append(measured["seconds"])
        grown.append(measured["grown_bytes"] / 2**20)
    median = Samples("rebuild", seconds).median_s
    memory = statistics.median(grown)
    return [
        Row(
            "rebuild",
            f"rebuild of the index from {ops:,} journal ops",
            Quantity(ops / median, "ops/s", [round(ops / s) for s in seconds]),
            ops / median,
            target=Target(80_000, unit="ops/s"),
        ),
        Row(
            "rebuild",
            "memory of the rebuild, above the process before it",
            Quantity(memory, "MiB", grown),
            memory,
            target=Target(64, at_most=True, unit="MiB"),
            note="without pages of the index file, which the kernel may take back",
        ),
    ]


def write_journal(root: Path, ops: int) -> int:
    """A store whose journal holds `ops` after-images of puts; the index is left behind.

    Written as the committer writes it, a few puts a frame, but not by it: what is measured is
    the reading. Returns the number of ops there are.
    """
    with Store.open(root) as store, store.catalog.inspect() as snapshot:
        head = snapshot.head
    position = head.position
    segment, end = Segment(head.segment_epoch, head.segment_first_seq), head.frame_end
    tail = Tail(Folders(root.resolve()).journal, DISK, 64 << 20)
    made = 0
    puts = _puts(ops // 2, position.at_us)
    while batch := list(itertools.islice(puts, _PUTS_A_FRAME)):
        state, writes = position.state, []
        for put in batch:
            state = add_state(state, sum(record_state(*op) for op in put))
            writes.append(Write(ACTOR, "", list(put)))
            made += len(put)
        frame = Frame(
            position.epoch, position.seq + 1, position.at_us, position.chain, state, writes
        )
        data, position = encode_frame(frame)
        segment, start = tail.append(data, segment, end, frame.seq)
        end = start + len(data)
    tail.sync()
    tail.close()
    return made


def _puts(count: int, now_us: int) -> Iterator[list[tuple[int, bytes, bytes]]]:
    encode = msgspec.msgpack.Encoder().encode
    for number in range(count):
        digest = Digest(hashlib.sha256(b"%d" % number).digest())
        records = (stored_blob(digest, now_us, 1), stored_file(digest, now_us, "direct"))
        yield [
            (LAYOUTS[type(record)].number, pack(record.primary_key()), encode(record))
            for record in records
        ]
