"""Groups: what waits together shares one sync."""

from __future__ import annotations

import threading
from pathlib import Path

import lmdb
import pytest

from cas.catalog import Transaction, committer, recovery
from cas.catalog.committer import GROUP_BYTES
from cas.catalog.images import put_head as lmdb_put_head
from cas.durable import Disk
from cas.errors import StoreFull
from cas.records import Mark
from tests.crash.ledger import LARGE, TINY, audit, enter, labels, open_catalog


class GatedDisk(Disk):
    """Holds each sync of a file until the test lets it through."""

    def __init__(self) -> None:
        self.closed = False
        self.entered = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)
        self.syncs = 0

    def sync_data(self, fd: int) -> None:
        if self.closed:
            self.entered.release()
            self.gate.acquire()
        self.syncs += 1
        super().sync_data(fd)


def wait_for(catalog: object, count: int) -> None:
    """Until `count` writes wait for the committer."""
    queue = catalog._committer._queue  # type: ignore[attr-defined]
    done = threading.Event()
    while queue.qsize() < count and not done.wait(0.001):
        pass


@pytest.fixture
def disk() -> GatedDisk:
    return GatedDisk()


def start(work: object, *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments)  # type: ignore[arg-type]
    thread.start()
    return thread


def test_writes_that_wait_during_a_sync_share_the_next_one(root: Path, disk: GatedDisk) -> None:
    catalog = open_catalog(root, LARGE, disk)
    disk.closed = True
    threads = [start(catalog.write, enter("first"))]
    disk.entered.acquire()
    threads += [start(catalog.write, enter(f"waits-{number}")) for number in range(10)]
    wait_for(catalog, 10)
    before = disk.syncs
    disk.closed = False
    disk.gate.release()
    for thread in threads:
        thread.join()
    assert disk.syncs == before + 2
    assert catalog.commits == (2, 11)
    catalog.close()
    audit(root, ["first", *(f"waits-{number}" for number in range(10))])


def test_nothing_is_seen_before_it_is_synced(root: Path, disk: GatedDisk) -> None:
    catalog = open_catalog(root, LARGE, disk)
    disk.closed = True
    writer = start(catalog.write, enter("a"))
    disk.entered.acquire()
    with catalog.read() as snapshot:
        assert snapshot.position.seq == 0
    assert writer.is_alive()
    disk.closed = False
    disk.gate.release()
    writer.join()
    assert catalog.position().seq == 1
    catalog.close()


def test_a_group_stops_growing_so_that_nobody_waits_long(root: Path, disk: GatedDisk) -> None:
    catalog = open_catalog(root, LARGE, disk)
    disk.closed = True
    threads = [start(catalog.write, enter("first"))]
    disk.entered.acquire()

    def large(name: str) -> None:
        catalog.write(lambda txn: txn.insert(Mark(name, "x" * (GROUP_BYTES // 2 + 1))))

    threads += [start(large, str(number)) for number in range(6)]
    wait_for(catalog, 6)
    disk.closed = False
    disk.gate.release()
    for thread in threads:
        thread.join()
    assert catalog.commits == (1 + 3, 7)
    catalog.close()


def test_housekeeping_that_fails_does_not_stop_the_writers(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = open_catalog(root, TINY)

    def fail() -> bool:
        raise OSError(5, "the disk of the ballast is gone")

    monkeypatch.setattr(catalog.ballast, "restore", fail)
    for number in range(6):
        catalog.write(enter(f"w-{number}"))
    catalog.close()
    audit(root, [f"w-{number}" for number in range(6)])


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_whatever_a_change_raises_is_raised_to_its_caller_alone(
    root: Path, error: type[BaseException]
) -> None:
    catalog = open_catalog(root)

    def change(txn: Transaction) -> None:
        txn.insert(Mark("a", ""))
        raise error

    with pytest.raises(error):
        catalog.write(change)
    catalog.write(enter("next"))
    with catalog.read() as snapshot:
        assert snapshot.get(Mark, "a") is None
    catalog.close()


@pytest.mark.parametrize("error", [lmdb.DiskError, lmdb.MapFullError, lmdb.CorruptedError])
def test_a_synced_frame_is_a_commit_whatever_the_index_says(
    root: Path, monkeypatch: pytest.MonkeyPatch, error: type[lmdb.Error]
) -> None:
    """The index refuses just after the fdatasync: the write is done, and shown at once."""
    catalog = open_catalog(root)
    refusals = [error("refused once")]

    def put_head(txn: object, head: object) -> None:
        if refusals:
            raise refusals.pop()
        lmdb_put_head(txn, head)  # type: ignore[arg-type]

    monkeypatch.setattr(committer, "put_head", put_head)
    catalog.write(enter("a"))
    assert not refusals
    with catalog.read() as snapshot:
        assert labels(snapshot) == {"a"}
    catalog.write(enter("b"))
    catalog.close()
    audit(root, ["a", "b"])


def test_an_index_without_room_refuses_writes_until_there_is_some(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = open_catalog(root)
    full = [True]

    def put_head(txn: object, head: object) -> None:
        if full:
            raise lmdb.DiskError("no space")
        lmdb_put_head(txn, head)  # type: ignore[arg-type]

    monkeypatch.setattr(committer, "put_head", put_head)
    monkeypatch.setattr(recovery, "put_head", put_head)
    catalog.write(enter("synced"))
    with pytest.raises(StoreFull):
        catalog.write(enter("refused"))
    full.clear()
    catalog.write(enter("fits"))
    with catalog.read() as snapshot:
        assert labels(snapshot) == {"synced", "fits"}
    catalog.close()
    assert audit(root, ["synced", "fits"]) == {"synced", "fits"}
