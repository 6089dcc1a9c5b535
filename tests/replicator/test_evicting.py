"""A full cache lets go of what is idle and held elsewhere, and of nothing else (invariant 8)."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from cas.catalog import Snapshot
from cas.clock import HOUR_US, SECOND_US
from cas.config import CacheSettings, Duration, Settings, Size, StoreSettings
from cas.digest import Digest
from cas.doctor import examine_store
from cas.errors import StoreFull
from cas.recency import Recency
from cas.records import StoredFile
from cas.replicas import want_again
from cas.scrub import Scrub
from cas.store import Store
from cas.uploads import UploadRequest
from replicator.evicting import Evict
from tests.clocks import HandClock
from tests.replicator.crates import Background, Node, background

KIB = 1024
CACHED = Settings(cache=CacheSettings(Size(64 * KIB)))


@pytest.fixture
def store(root: Path, clock: HandClock) -> Iterator[Store]:
    with Store.open(root, CACHED, clock=clock) as opened:
        yield opened


@pytest.fixture
def node(store: Store) -> Node:
    return Node(store)


def content(number: int, size_bytes: int = 10 * KIB) -> bytes:
    return bytes([number]) * size_bytes


def mirrored(node: Node, number: int, idle_us: int, size_bytes: int = 10 * KIB) -> StoredFile:
    """A file of its own bytes, last read so long ago."""
    file = node.mirrored(content(number, size_bytes))
    read_at_ns = (node.store.clock.now_us() - idle_us) * 1000
    path = node.store.blobs.path(file.checksum_sha256)
    os.utime(path, ns=(read_at_ns, path.stat().st_mtime_ns))
    return file


def evict_of(node: Node, max_bytes: int = 64 * KIB) -> Evict:
    job = Evict(node.store, node.links, max_bytes)

    async def story() -> None:
        while await job.step(0):
            pass
        await job.close()

    asyncio.run(story())
    return job


def here(node: Node, files: list[StoredFile]) -> list[int]:
    """Which of the files are here, by their place in the list."""
    return [number for number, file in enumerate(files) if node.blob(file).local]


def test_the_longest_idle_go_until_the_rest_fits(node: Node) -> None:
    files = [mirrored(node, number, number * HOUR_US + HOUR_US) for number in range(10)]
    job = evict_of(node)
    assert here(node, files) == [0, 1, 2, 3, 4, 5]
    assert job.evicted == 4
    assert job.local_bytes() == 60 * KIB
    objects = {path.name for path in (node.store.root / "objects").rglob("*") if path.is_file()}
    assert objects == {files[number].checksum_sha256.hex() for number in range(6)}
    assert [found for found in examine_store(node.store) if found.wrong] == []


def test_within_the_limit_and_without_one_nothing_goes(node: Node) -> None:
    files = [mirrored(node, number, HOUR_US) for number in range(6)]
    evict_of(node)
    evict_of(node, max_bytes=0)
    assert here(node, files) == [0, 1, 2, 3, 4, 5]


def test_reading_keeps_a_blob(node: Node) -> None:
    files = [mirrored(node, number, (10 - number) * HOUR_US) for number in range(7)]
    os.close(node.store.opener.here(files[0].checksum_sha256))
    evict_of(node)
    assert here(node, files) == [0, 2, 3, 4, 5, 6]


def test_what_a_proxy_was_promised_stays_until_it_has_opened_it(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it was when the eviction chose what goes."""
    file, other = (mirrored(node, number, HOUR_US) for number in range(2))
    digest = file.checksum_sha256
    job = Evict(node.store, node.links, 1)
    chosen = job._sample

    def promised() -> tuple[list[tuple[int, int, Digest]], bool]:
        sample = chosen()
        assert node.store.opener.named(digest)
        return sample

    monkeypatch.setattr(job, "_sample", promised)
    asyncio.run(job.step(0))
    assert here(node, [file, other]) == [0]
    assert node.store.blobs.path(digest).exists()


def test_what_a_proxy_was_promised_between_record_and_file_keeps_its_file(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = mirrored(node, 1, HOUR_US)
    digest = file.checksum_sha256
    alone = node.store.catalog.alone

    def promised(change: Callable[[Snapshot], None]) -> None:
        assert node.store.opener.named(digest)
        alone(change)

    monkeypatch.setattr(node.store.catalog, "alone", promised)
    asyncio.run(Evict(node.store, node.links, 1).step(0))
    assert not node.blob(file).local
    assert node.store.blobs.path(digest).exists()


def test_what_went_while_it_was_looked_at_is_not_promised(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = mirrored(node, 1, HOUR_US).checksum_sha256

    def late(*_: object, by_name: bool) -> None:
        assert by_name
        node.store.blobs.path(digest).unlink()

    monkeypatch.setattr(Recency, "used", late)
    assert not node.store.opener.named(digest)


def test_bytes_are_read_also_where_the_time_of_reading_cannot_be_written(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = mirrored(node, 1, 48 * HOUR_US)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    os.close(node.store.opener.here(file.checksum_sha256))


def test_no_descriptor_is_left_where_noting_a_reading_fails(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = mirrored(node, 1, HOUR_US)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Recency, "used", fail)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="Input"):
        node.store.opener.here(file.checksum_sha256)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_hashing_by_the_scrub_is_no_reading(node: Node) -> None:
    file = mirrored(node, 1, 48 * HOUR_US)
    path = node.store.blobs.path(file.checksum_sha256)
    before_ns = path.stat().st_atime_ns
    node.store.blobs.check(file.checksum_sha256)
    assert path.stat().st_atime_ns == before_ns


def test_noting_a_reading_leaves_the_blob_the_file_that_its_record_knows(node: Node) -> None:
    file = mirrored(node, 1, 48 * HOUR_US)
    os.close(node.store.opener.here(file.checksum_sha256))
    assert node.store.adoption.is_here(node.blob(file))
    noted_ns = node.store.blobs.path(file.checksum_sha256).stat().st_atime_ns
    assert noted_ns == node.store.clock.now_us() * 1000


def test_what_is_not_held_at_every_target_stays(store: Store) -> None:
    node = Node(store, ("a", "b"))
    files = [mirrored(node, number, (9 - number) * HOUR_US) for number in range(8)]
    want_again(store.catalog, "b", [files[0].checksum_sha256])
    evict_of(node)
    assert here(node, files) == [0, 3, 4, 5, 6, 7]


def test_what_the_journal_there_does_not_tell_stays(node: Node) -> None:
    files = [mirrored(node, number, (9 - number) * HOUR_US) for number in range(8)]
    (link,) = node.links
    link.shipped_seq = node.row(files[4], "a").seq
    evict_of(node, max_bytes=1)
    assert here(node, files) == [5, 6, 7]


def test_where_another_node_ships_or_no_target_is_nothing_goes(node: Node) -> None:
    files = [mirrored(node, number, HOUR_US) for number in range(8)]
    (link,) = node.links
    link.fenced = "another node ships there"
    evict_of(node)
    node.links.clear()
    evict_of(node)
    assert here(node, files) == list(range(8))


def test_what_was_just_used_stays_for_a_moment(node: Node) -> None:
    files = [mirrored(node, number, 30 * SECOND_US) for number in range(8)]
    evict_of(node)
    assert here(node, files) == list(range(8))


def test_a_clock_that_was_wrong_keeps_nothing_for_ever(node: Node) -> None:
    files = [mirrored(node, number, -24 * 365 * HOUR_US) for number in range(8)]
    evict_of(node)
    assert len(here(node, files)) == 6


def test_a_fetch_makes_room_for_itself(node: Node) -> None:
    wanted = node.evicted(content(99, 20 * KIB))
    files = [mirrored(node, number, (9 - number) * HOUR_US) for number in range(6)]
    with (
        background(node, max_bytes=64 * KIB),
        node.store.opener.stream(wanted.checksum_sha256, wanted.size_bytes) as stream,
    ):
        assert stream.read(wanted.size_bytes) == content(99, 20 * KIB)
    assert node.blob(wanted).local
    assert here(node, files) == [2, 3, 4, 5]


def test_a_full_disk_is_emptied_first(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = node.evicted(content(99))
    files = [mirrored(node, number, (9 - number) * HOUR_US) for number in range(5)]

    def need_room(needed_bytes: int) -> None:
        if len(here(node, files)) > 3:
            raise StoreFull(0, needed_bytes, node.store.root)

    monkeypatch.setattr(node.store.blobs, "need_room", need_room)
    with (
        background(node, max_bytes=64 * KIB),
        node.store.opener.stream(wanted.checksum_sha256, wanted.size_bytes) as stream,
    ):
        assert stream.read(wanted.size_bytes) == content(99)
    assert node.blob(wanted).local
    assert here(node, files) == [2, 3, 4]


def test_what_is_larger_than_the_cache_passes_through_it(node: Node) -> None:
    wanted = node.evicted(content(99, 65 * KIB))
    files = [mirrored(node, number, HOUR_US) for number in range(6)]
    with (
        background(node, max_bytes=64 * KIB),
        node.store.opener.stream(wanted.checksum_sha256, wanted.size_bytes) as stream,
    ):
        taken = b"".join(iter(lambda: stream.read(10_000) or b"", b""))
    assert taken == content(99, 65 * KIB)
    assert not node.blob(wanted).local
    assert here(node, files) == [0, 1, 2, 3, 4, 5]


def test_who_reads_when_it_goes_reads_on(node: Node) -> None:
    file = mirrored(node, 1, HOUR_US)
    fd = node.store.opener.here(file.checksum_sha256)
    try:
        path = node.store.blobs.path(file.checksum_sha256)
        os.utime(path, ns=(0, path.stat().st_mtime_ns))
        evict_of(node, max_bytes=1)
        assert not node.blob(file).local
        assert os.pread(fd, file.size_bytes, 0) == content(1)
    finally:
        os.close(fd)


def test_who_brings_the_bytes_again_has_them_here_again(node: Node) -> None:
    file = mirrored(node, 1, HOUR_US)
    evict_of(node, max_bytes=1)
    node.put(content(1))
    blob = node.blob(file)
    assert blob.local
    assert blob.evicted_at is None
    os.close(node.store.opener.here(file.checksum_sha256, file.size_bytes))


def test_an_upload_is_judged_by_bytes_that_were_evicted_meanwhile(node: Node) -> None:
    store = node.store
    request = UploadRequest(name="papers", allowed_types=["pdf"])
    requested = store.uploads("t1", "tests").request(request)
    link = store.upload_link(requested.upload_token)
    document = b"%PDF-1.7\n" + bytes(10 * KIB) + b"%%EOF\n"
    slot = link.put(0, document, filename="a.pdf")
    assert slot.checksum_sha256 is not None
    file = node.evicted(document)
    assert file.checksum_sha256 == slot.checksum_sha256
    with background(node):
        assert len(link.complete().files) == 1


def test_readers_writers_evictions_and_scrubs_at_once_lose_and_mix_up_nothing(
    root: Path,
) -> None:
    """Every reading gives the right bytes, whatever else is being done to them."""
    settings = Settings(store=StoreSettings(grace=Duration(1)), cache=CacheSettings(Size(64 * KIB)))
    with Store.open(root, settings) as store:
        node = Node(store)
        files = [node.mirrored(content(number)) for number in range(16)]
        stop = threading.Event()
        job = Evict(store, node.links, 64 * KIB)

        def evicting() -> None:
            while not stop.is_set():
                for file in files:
                    with suppress(FileNotFoundError):
                        path = store.blobs.path(file.checksum_sha256)
                        os.utime(path, ns=(0, path.stat().st_mtime_ns))
                asyncio.run(job.step(0))

        def writing() -> None:
            while not stop.is_set():
                number = random.randrange(16)
                store.files("t2", "tests").put(content(number), name="b")

        def scrubbing() -> None:
            while not stop.is_set():
                scrub = Scrub(store)
                while scrub.step():
                    pass
                assert scrub.report.well

        def reading() -> None:
            while store.opener.misses < 300 and not stop.is_set():
                number = random.randrange(16)
                file = files[number]
                with store.opener.stream(file.checksum_sha256, file.size_bytes) as stream:
                    assert b"".join(iter(lambda: stream.read(4096) or b"", b"")) == content(number)

        with background(node, room=lambda _size: True) as back, ThreadPoolExecutor(8) as pool:
            troubles = [pool.submit(work) for work in (evicting, writing, scrubbing)]
            try:
                readings = [pool.submit(reading) for _ in range(4)]
                for one in readings:
                    one.result(200)
            finally:
                stop.set()
            for trouble in troubles:
                trouble.result(60)
            finish(back)
        assert job.evicted > 50
        assert [found for found in examine_store(store, read_data=True) if found.wrong] == []


def finish(back: Background) -> None:
    """Wait until no fetch runs."""

    async def story() -> None:
        for _, task in list(back.fetches._running.values()):
            await task

    back.do(story())
