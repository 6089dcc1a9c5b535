"""Rebuild: the index that comes out is the one that went, however it is made."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from bench.cataloguing import write_journal
from cas.catalog import Transaction, bulk, recovery
from cas.catalog.lmdb import Index
from cas.catalog.local import LocalCatalog
from cas.catalog.recovery import Folders
from cas.config import Settings, Size, StoreSettings
from cas.durable import Disk
from cas.errors import JournalDamaged, StoreBusy
from cas.files import PutItem
from cas.rebuild import rebuild
from cas.records import Mark, StoredFile
from cas.references import parse_reference
from cas.store import Store
from tests.clocks import HandClock
from tests.conftest import CHECKOUT

SETTINGS = Settings(store=StoreSettings(min_free=Size(0)))
HOLD = """
import sys
from pathlib import Path
from cas.store import Store

with Store.open(Path(sys.argv[1])):
    print("open", flush=True)
    sys.stdin.read()
"""
Content = tuple[list[tuple[int, bytes, bytes]], list[tuple[bytes, bytes]]]


def opened(root: Path) -> Store:
    return Store.open(root, SETTINGS, clock=HandClock())


def content(catalog: LocalCatalog) -> Content:
    """All that an index holds: records, and entries of unique keys and indexes."""
    with catalog.inspect() as snapshot:
        records = [(layout.number, key, raw) for layout, key, raw in snapshot.records()]
        return records, list(snapshot.entries())


def content_of(root: Path) -> Content:
    with opened(root) as store:
        return content(store.catalog)


def a_lot_happens(store: Store, seed: int, writes: int = 60) -> None:
    """Files come, change, go and come again; marks change often; some writes are large."""
    chance = random.Random(seed)
    files = store.files("t1", "test")
    kept: list[StoredFile] = []
    for number in range(writes):
        what = chance.random()
        if what < 0.5 or not kept:
            kept.append(files.put(chance.randbytes(chance.randint(0, 40)), name=f"n{number}"))
        elif what < 0.6:
            kept += files.put_many([PutItem(chance.randbytes(8), f"m{i}") for i in range(5)])
        elif what < 0.8:
            gone = kept.pop(chance.randrange(len(kept)))
            kept = [file for file in kept if file.file_id != gone.file_id]
            files.delete(parse_reference(gone.storage_ref))
        else:
            store.catalog.write(lambda txn, value=str(number): put_mark(txn, value))  # type: ignore[misc]


def put_mark(txn: Transaction, value: str) -> None:
    mark = Mark("often", value)
    if txn.get(Mark, "often") is None:
        txn.insert(mark)
    else:
        txn.replace(mark)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that records change within a batch, and from one to the next."""
    monkeypatch.setattr(bulk, "OPS_PER_BATCH", 7)


@pytest.mark.parametrize("seed", range(3))
def test_a_rebuilt_index_holds_what_the_old_one_held(
    root: Path, seed: int, small_batches: None
) -> None:
    with opened(root) as store:
        a_lot_happens(store, seed)
        before = content(store.catalog)
    made = rebuild(root, clock=HandClock())
    assert content_of(root) == before
    assert made.ops > len(before[0])


def test_a_checkpoint_and_the_journal_after_it_give_the_same(
    root: Path, small_batches: None
) -> None:
    with opened(root) as store:
        a_lot_happens(store, 1)
        store.catalog.checkpoint()
        a_lot_happens(store, 2)
        before = content(store.catalog)
    rebuild(root, clock=HandClock())
    assert content_of(root) == before


def test_unique_values_that_changed_hands_stay_where_they_came(
    root: Path, small_batches: None
) -> None:
    with opened(root) as store:
        files = store.files("t1", "test")
        one, two = files.put(b"1", name="one"), files.put(b"2", name="two")

        def swap(txn: Transaction) -> None:
            for file in (one, two):
                txn.delete(file)
            txn.insert(msgspec.structs.replace(one, storage_ref=two.storage_ref))
            txn.insert(msgspec.structs.replace(two, storage_ref=one.storage_ref))

        store.catalog.write(swap)
        before = content(store.catalog)
    rebuild(root, clock=HandClock())
    assert content_of(root) == before


def test_it_goes_on_where_others_left_off(root: Path) -> None:
    with opened(root) as store:
        file = store.files("t1", "test").put(b"x", name="x")
    made = rebuild(root, clock=HandClock())
    with opened(root) as store:
        assert store.catalog.position() == made.position
        assert store.files("t1", "test").list().items == [file]
        store.files("t1", "test").put(b"y", name="y")
        assert store.catalog.verify_state().seq == made.position.seq + 1


def test_progress_ends_where_the_files_do(root: Path, small_batches: None) -> None:
    with opened(root) as store:
        a_lot_happens(store, 3)
        store.catalog.checkpoint()
        a_lot_happens(store, 4, writes=20)
    told: list[tuple[int, int]] = []
    rebuild(root, clock=HandClock(), progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert len({total for _, total in told}) == 1
    assert 0 < told[-1][0] <= told[-1][1]


def test_it_needs_the_store_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cas.rebuild._LOCK_WAIT_S", 0.0)
    with opened(root) as store:
        file = store.files("t1", "test").put(b"x", name="x")
        with pytest.raises(StoreBusy):  # open in this process
            rebuild(root, clock=HandClock())
    holding = subprocess.Popen(
        [sys.executable, "-c", HOLD, root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=CHECKOUT,
    )
    try:
        assert holding.stdout is not None
        assert holding.stdout.readline() == b"open\n"
        with pytest.raises(StoreBusy):
            rebuild(root, clock=HandClock())
    finally:
        holding.communicate()
    with opened(root) as store:
        assert store.files("t1", "test").list().items == [file]


def test_a_damaged_journal_is_named_and_the_old_index_kept(root: Path) -> None:
    with opened(root) as store:
        for number in range(5):
            store.files("t1", "test").put(bytes([number]), name="x")
        before = content(store.catalog)
    [segment] = (root / "catalog/journal").iterdir()
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    with pytest.raises(JournalDamaged) as caught:
        rebuild(root, clock=HandClock())
    assert caught.value.path == segment
    assert content_of(root) == before


# --- the map that is written through


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write through the map, however small the journal is."""
    monkeypatch.setattr(recovery, "_ROOM_BYTES_MIN", 1)
    monkeypatch.setattr(recovery, "_ROOM_STEP_BYTES", 1 << 16)
    monkeypatch.setattr(bulk, "OPS_PER_BATCH", 100)


@pytest.mark.parametrize("factor", [64, 1])
def test_an_index_with_and_without_enough_room_is_the_same(
    root: Path, roomy: None, monkeypatch: pytest.MonkeyPatch, factor: int
) -> None:
    monkeypatch.setattr(recovery, "_ROOM_FACTOR", factor)  # 1 is too little: it is begun anew
    with opened(root) as store:
        a_lot_happens(store, 5, writes=300)
        before = content(store.catalog)
    rebuild(root, clock=HandClock())
    assert content_of(root) == before
    data = (root / "catalog/index/data.mdb").stat()
    assert data.st_size < 4 << 20
    with opened(root) as store:
        a_lot_happens(store, 6)
        store.catalog.verify_state()


def test_the_room_is_enough_for_an_index_of_nothing_but_puts(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "_ROOM_BYTES_MIN", 1)
    monkeypatch.setattr(bulk, "OPS_PER_BATCH", 5000)  # pages fill as those of a long journal do
    write_journal(root, 40_000)
    rooms: list[int] = []
    empty_index = recovery._empty_index

    def counted(folders: Folders, disk: Disk, source_bytes: int) -> Index:
        rooms.append(source_bytes)
        return empty_index(folders, disk, source_bytes)

    monkeypatch.setattr(recovery, "_empty_index", counted)
    assert rebuild(root).ops >= 40_000
    assert rooms
    assert 0 not in rooms  # it was not made a second time, the slow way
