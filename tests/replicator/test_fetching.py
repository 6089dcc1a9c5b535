"""Bytes that are at targets only: one fetch for all who read, and never a wrong last byte."""

from __future__ import annotations

import errno
import hashlib
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cas.blobs import Placed
from cas.digest import Digest
from cas.durable import Disk
from cas.elsewhere import Fetched
from cas.errors import BlobElsewhere, BlobMissing
from cas.records import StoredFile
from cas.references import parse_reference
from cas.store import Store
from replicator.fetching import Fetch
from replicator.folder import FolderTarget
from replicator.healing import Heal
from replicator.targets import TargetUnreachable, object_key
from tests.clocks import HandClock
from tests.replicator.crates import Background, Node, background

MIB = 1 << 20
SMALL = b"bytes that are elsewhere"


@pytest.fixture
def store(root: Path, clock: HandClock) -> Iterator[Store]:
    with Store.open(root, clock=clock) as opened:
        yield opened


@pytest.fixture
def node(store: Store) -> Node:
    return Node(store)


@pytest.fixture
def two(store: Store) -> Node:
    return Node(store, ("a", "b"))


def large(seed: int = 1) -> bytes:
    """3 MiB that no two seeds share."""
    return hashlib.shake_128(bytes([seed])).digest(3 * MIB)


def read(node: Node, file: StoredFile) -> bytes:
    with node.store.opener.stream(file.checksum_sha256, file.size_bytes) as stream:
        return read_all(stream)


def read_all(stream: object) -> bytes:
    pieces = []
    while piece := stream.read(64 << 10):  # type: ignore[attr-defined]
        pieces.append(piece)
    return b"".join(pieces)


def fetched(node: Node, file: StoredFile) -> Fetched:
    return node.store.elsewhere.open(file.checksum_sha256, file.size_bytes)


def broken_off(stream: Fetched) -> tuple[bytes, str]:
    """What came before the error that must come, and the error."""
    got = b""
    try:
        while piece := stream.read(64 << 10):
            got += piece
    except BlobElsewhere as error:
        return got, error.reason
    raise AssertionError(f"{len(got)} bytes came, and no error")


def spoiled(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def closed(back: Background) -> None:
    """Wait until no fetch runs, so that what follows one is done."""

    async def story() -> None:
        for _, task in list(back.fetches._running.values()):
            await task

    back.do(story())


def test_what_was_evicted_is_read_and_is_here_again(node: Node) -> None:
    file = node.evicted(SMALL)
    with pytest.raises(BlobMissing):
        node.store.opener.here(file.checksum_sha256)
    with background(node) as back:
        assert read(node, file) == SMALL
        closed(back)
    blob = node.blob(file)
    assert blob.local
    assert blob.evicted_at is None
    seen = node.store.blobs.stat(file.checksum_sha256)
    assert seen == Placed(blob.inode, blob.size_bytes, blob.mtime_ns)
    assert read(node, file) == SMALL  # without anybody to ask
    assert (node.store.opener.hits, node.store.opener.misses) == (1, 1)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "too large for the cache"])
def test_a_hundred_readers_cause_one_fetch(node: Node, kept: bool) -> None:
    content = large()
    file = node.evicted(content)
    asked = threading.Barrier(101)
    go_on = threading.Event()
    node.crates["a"].before = lambda _position: go_on.wait(60)

    def reader() -> bytes:
        with fetched(node, file) as stream:
            asked.wait(60)
            return hashlib.sha256(read_all(stream)).digest()

    with background(node, room=lambda _size: kept) as back, ThreadPoolExecutor(100) as pool:
        readings = [pool.submit(reader) for _ in range(100)]
        asked.wait(60)
        go_on.set()
        assert {reading.result(60) for reading in readings} == {bytes(file.checksum_sha256)}
        closed(back)
        assert node.blob(file).local is kept
    assert node.crates["a"].asked == [0]


def test_a_range_in_the_middle_is_given_while_the_rest_is_fetched(node: Node) -> None:
    content = large()
    file = node.evicted(content)
    go_on = threading.Event()
    node.crates["a"].before = lambda position: position < 2 * MIB or go_on.wait(60)
    start, stop = MIB // 2, MIB + 100
    with background(node) as back, fetched(node, file) as stream:
        stream.only(start, stop)
        got = b""
        while len(got) < stop - start - 1:
            got += stream.read(64 << 10)
        # All but the last byte, for which all must have been seen.
        assert got == content[start : stop - 1]
        assert not node.blob(file).local
        go_on.set()
        assert read_all(stream) == content[stop - 1 : stop]
        closed(back)


def test_a_reader_that_goes_away_takes_nothing_from_the_others(node: Node) -> None:
    content = large()
    file = node.evicted(content)
    go_on = threading.Event()
    node.crates["a"].before = lambda position: position < MIB or go_on.wait(60)
    with background(node) as back:
        with fetched(node, file) as leaving, fetched(node, file) as staying:
            assert leaving.read(100) == content[:100]
            leaving.close()
            go_on.set()
            assert read_all(staying) == content
        closed(back)
        assert node.blob(file).local


def test_a_fetch_goes_on_though_all_readers_have_left(node: Node) -> None:
    file = node.evicted(large())
    go_on = threading.Event()
    node.crates["a"].before = lambda position: position < MIB or go_on.wait(60)
    with background(node) as back:
        with fetched(node, file) as leaving:
            leaving.read(1)
        go_on.set()
        closed(back)
        assert node.blob(file).local


def test_one_that_breaks_off_is_gone_on_with_where_it_stopped(two: Node) -> None:
    content = large()
    file = two.evicted(content)

    def break_off(position: int) -> None:
        if position >= MIB:
            raise TargetUnreachable("a", "cut")

    two.crates["a"].before = break_off
    with background(two):
        assert read(two, file) == content
    assert two.crates["a"].asked == [0]
    (asked,) = two.crates["b"].asked
    assert asked >= MIB
    assert all(two.row(file, name).held for name in "ab")


def test_one_that_dies_ends_in_an_error_before_the_last_byte(node: Node) -> None:
    content = large()
    file = node.evicted(content)
    crate = node.crates["a"]

    def die(position: int) -> None:
        if position >= 2 * MIB:
            raise TargetUnreachable("a", "the uplink is gone")

    crate.before = die
    with background(node) as back:
        with fetched(node, file) as stream:
            got, reason = broken_off(stream)
        closed(back)
        assert "the uplink is gone" in reason
        assert len(got) < len(content)
        assert content.startswith(got)
        blob = node.blob(file)
        assert not blob.local
        assert blob.missing_at is None  # the copy is believed in
        assert node.row(file, "a").held
        assert not any(path.is_file() for path in (node.store.root / "objects").rglob("*"))
        crate.before = lambda _position: None
        assert read(node, file) == content


def test_the_next_target_is_asked_after_wrong_bytes_whose_copy_is_wanted_again(two: Node) -> None:
    file = two.evicted(SMALL)
    two.crates["a"].hold(file.checksum_sha256, spoiled(SMALL))
    with background(two) as back:
        assert read(two, file) == SMALL
        closed(back)
    assert not two.row(file, "a").held
    assert two.row(file, "b").held
    assert two.blob(file).local


def test_a_target_that_has_no_such_object_is_passed_over(two: Node) -> None:
    file = two.evicted(SMALL)
    two.crates["a"].objects.clear()
    with background(two) as back:
        assert read(two, file) == SMALL
        closed(back)
    assert not two.row(file, "a").held


def test_a_reader_in_the_middle_of_wrong_bytes_gets_an_error_and_the_next_one_is_well(
    two: Node,
) -> None:
    content = large()
    file = two.evicted(content)
    two.crates["a"].hold(file.checksum_sha256, spoiled(content))
    seen = threading.Event()
    two.crates["a"].before = lambda position: position < 2 * MIB or seen.wait(60)
    with background(two) as back:
        with fetched(two, file) as stream:
            stream.read(1)
            seen.set()
            got, reason = broken_off(stream)
        assert "anew" in reason
        assert 1 + len(got) < len(content)
        assert read(two, file) == content
        closed(back)
    assert not two.row(file, "a").held


def test_bytes_that_were_spoiled_on_the_way_once_cost_a_second_try_only(node: Node) -> None:
    file = node.evicted(SMALL)
    crate = node.crates["a"]
    crate.hold(file.checksum_sha256, spoiled(SMALL))

    def mend(_position: int) -> None:
        if len(crate.asked) == 2:
            crate.hold(file.checksum_sha256, SMALL)

    crate.before = mend
    with background(node) as back:
        assert read(node, file) == SMALL
        closed(back)
    assert crate.asked == [0, 0]
    assert node.row(file, "a").held


def test_what_no_target_has_is_missing_until_one_has_it_again(node: Node) -> None:
    file = node.evicted(SMALL)
    node.crates["a"].hold(file.checksum_sha256, spoiled(SMALL))
    with background(node) as back:
        with pytest.raises(BlobElsewhere):
            read(node, file)
        closed(back)
        assert node.blob(file).missing_at is not None
        node.crates["a"].hold(file.checksum_sha256, SMALL)
        heal = Heal(node.store, node.links, back.fetches)
        assert back.do(heal.step(0)) is False
        closed(back)
    blob = node.blob(file)
    assert blob.local
    assert blob.missing_at is None


def test_rot_that_the_scrub_set_aside_is_healed_from_a_target(node: Node) -> None:
    file = node.mirrored(SMALL)
    node.store.blobs.quarantine(file.checksum_sha256)
    with background(node) as back:
        assert read(node, file) == SMALL
        closed(back)
    assert read(node, file) == SMALL


def test_a_copy_that_is_not_kept_serves_who_comes_while_anybody_reads(node: Node) -> None:
    content = large()
    file = node.evicted(content)
    crate = node.crates["a"]
    with background(node, max_bytes=MIB) as back:
        with fetched(node, file) as first:
            assert first.read(100) == content[:100]
            ((fetch, _),) = back.fetches._running.values()
            closed(back)
            with fetched(node, file) as second:
                assert read_all(second) == content
            assert read_all(first) == content[100:]
            assert crate.asked == [0]
        assert fetch.left.wait(60)
        assert read(node, file) == content
    assert crate.asked == [0, 0]
    assert not node.blob(file).local
    assert not any(path.is_file() for path in (node.store.root / "objects").rglob("*"))


def test_what_is_not_kept_is_broken_off_when_its_last_reader_leaves(node: Node) -> None:
    content = large()
    file = node.evicted(content)
    crate = node.crates["a"]
    go_on = threading.Event()
    crate.before = lambda position: position < MIB or go_on.wait(60)
    with background(node, room=lambda _size: False) as back:
        with fetched(node, file) as leaving, fetched(node, file) as last:
            assert leaving.read(1) == last.read(1) == content[:1]
            ((fetch, _),) = back.fetches._running.values()
            leaving.close()
            assert last.read(1) == content[1:2]
            assert not fetch.left.is_set()
        assert fetch.left.wait(60)
        go_on.set()
        assert read(node, file) == content
        assert crate.asked == [0, 0]


def test_healing_keeps_what_it_brings_or_brings_nothing(node: Node) -> None:
    file = node.mirrored(SMALL)
    node.store.blobs.quarantine(file.checksum_sha256)
    with background(node, room=lambda _size: False) as back:
        assert back.do(back.fetches.bring(file.checksum_sha256)) is False


def test_without_room_the_bytes_pass_through_and_nothing_is_kept(node: Node) -> None:
    content = large()
    file = node.evicted(content)
    with background(node, room=lambda _size: False):
        assert read(node, file) == content
        with fetched(node, file) as stream:
            stream.only(MIB, 2 * MIB)
            assert read_all(stream) == content[MIB : 2 * MIB]
        small = node.evicted(SMALL)
        assert read(node, small) == SMALL
    assert not node.blob(file).local
    assert not any(path.is_file() for path in (node.store.root / "objects").rglob("*"))


class FullDisk(Disk):
    full = False

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "full")
        super().write(fd, data)


def test_a_disk_that_is_full_all_the_same_keeps_no_reader_from_the_bytes(
    root: Path, clock: HandClock
) -> None:
    disk = FullDisk()
    with Store.open(root, clock=clock, disk=disk) as store:
        node = Node(store)
        files = {content: node.evicted(content) for content in (SMALL, large())}
        disk.full = True
        with background(node):
            for content, file in files.items():
                assert read(node, file) == content
                assert not node.blob(file).local
        disk.full = False


@pytest.mark.parametrize("full", [True, False], ids=["full disk", "too large for the cache"])
def test_wrong_bytes_that_pass_through_end_before_the_last_one(
    root: Path, clock: HandClock, full: bool
) -> None:
    disk = FullDisk()
    with Store.open(root, clock=clock, disk=disk) as store:
        node = Node(store)
        content = large()
        file = node.evicted(content)
        node.crates["a"].hold(file.checksum_sha256, spoiled(content))
        disk.full = full
        with background(node, room=lambda _size: False):
            for start, stop in ((0, len(content)), (MIB, 2 * MIB)):
                with fetched(node, file) as stream:
                    stream.only(start, stop)
                    got, _ = broken_off(stream)
                assert len(got) < stop - start
        disk.full = False


def test_who_brings_the_bytes_meanwhile_is_not_disturbed(node: Node) -> None:
    content = large()
    file = node.evicted(content)
    go_on = threading.Event()
    node.crates["a"].before = lambda position: position < MIB or go_on.wait(60)
    with background(node) as back, fetched(node, file) as stream:
        stream.read(1)
        node.put(content, "again")
        seen = node.store.blobs.stat(file.checksum_sha256)
        go_on.set()
        assert len(read_all(stream)) == len(content) - 1
        closed(back)
        assert node.store.blobs.stat(file.checksum_sha256) == seen
    assert node.blob(file).local


def test_no_growth_is_told_of_a_copy_that_no_reader_was_given_yet(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread may write a good part of it before the loop has a turn."""
    content = large()
    file = node.evicted(content)
    grown = threading.Event()
    node.crates["a"].before = lambda position: grown.set() if position >= MIB else None
    with background(node) as back:
        ask = back.fetches.asked

        def ask_and_be_slow(digest: Digest) -> Fetch | int:
            asked = ask(digest)
            assert grown.wait(60)
            return asked

        monkeypatch.setattr(back.fetches, "asked", ask_and_be_slow)
        with fetched(node, file) as stream:
            assert stream.read(1) == content[:1]
            assert read_all(stream) == content[1:]


def test_what_nobody_needs_any_more_is_not_kept(node: Node, clock: HandClock) -> None:
    content = large()
    file = node.evicted(content)
    go_on = threading.Event()
    node.crates["a"].before = lambda position: position < MIB or go_on.wait(60)
    with background(node) as back, fetched(node, file) as stream:
        stream.read(1)
        files = node.store.files("t1", "tests")
        files.delete(parse_reference(file.storage_ref))
        clock.advance(2 * 86_400_000_000)
        with node.store.catalog.read() as snapshot:
            plan = node.store.collector.plan(snapshot, clock.now_us())
        assert node.store.collector.execute(plan).blobs == 1
        go_on.set()
        assert len(read_all(stream)) == len(content) - 1
        closed(back)
    assert not any(path.is_file() for path in (node.store.root / "objects").rglob("*"))


def test_a_stop_breaks_a_fetch_off_with_an_error(node: Node) -> None:
    file = node.evicted(large())
    going = threading.Event()

    def wait(position: int) -> None:
        if position >= MIB:
            going.set()
            raise TargetUnreachable("a", "cut") if stopped.wait(60) else AssertionError

    stopped = threading.Event()
    node.crates["a"].before = wait
    errors: list[BaseException] = []

    def reader() -> None:
        try:
            read(node, file)
        except BlobElsewhere as error:
            errors.append(error)

    thread = threading.Thread(target=reader)
    with background(node):
        thread.start()
        assert going.wait(60)
        stopped.set()
    thread.join(60)
    assert len(errors) == 1


def test_a_folder_gives_back_what_it_was_given(store: Store, tmp_path: Path) -> None:
    node = Node(store)
    folder = FolderTarget("a", tmp_path / "there")
    (tmp_path / "there").mkdir()
    (link,) = node.links
    link.target = folder
    for content in (SMALL, large()):
        file = node.evicted(content)
        key = object_key(file.checksum_sha256)
        folder.put(key, io.BytesIO(content), len(content))
        with background(node) as back:
            assert read(node, file) == content
            closed(back)
        assert node.blob(file).local


def test_an_empty_file_needs_no_target(node: Node) -> None:
    file = node.evicted(b"")
    with background(node):
        assert read(node, file) == b""


def test_the_object_is_asked_for_by_its_digest_alone(node: Node) -> None:
    file = node.evicted(SMALL)
    assert list(node.crates["a"].objects) == [object_key(file.checksum_sha256)]
