"""Opening a ROOT, many processes at one, and a disk that is full."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cas.clock import DAY_US, HOUR_US
from cas.config import Duration, Settings, Size, StoreSettings
from cas.digest import digest_of
from cas.durable import DISK, Disk
from cas.errors import NotFound, StoreBusy, StoreFull, UnsuitableRoot
from cas.files import Files, PutItem
from cas.format import FORMAT_VERSION
from cas.references import parse_reference
from cas.store import Store
from cas.upload_links import UploadLink
from cas.uploads import UploadRequest
from tests.audit import audit
from tests.cas.interposed import InterposedDisk, collect
from tests.clocks import HandClock
from tests.conftest import CHECKOUT
from tests.crash.steps import FailingDisk
from tests.mounts import fill as fill_disk
from tests.mounts import mounted

SETTINGS = Settings(store=StoreSettings(grace=Duration(DAY_US), min_free=Size(0)))
DATA = b"some bytes" * 1000


def open_store(root: Path, clock: HandClock, disk: Disk = DISK) -> Store:
    return Store.open(root, SETTINGS, clock=clock, disk=disk)


# --- opening


def test_a_store_is_made_in_a_new_an_empty_or_a_keyed_folder(
    memory: Path, clock: HandClock
) -> None:
    (memory / "empty").mkdir()
    (memory / "keyed" / "keys").mkdir(parents=True)
    ids = set()
    for name in ("new", "deep/er", "empty", "keyed"):
        with open_store(memory / name, clock) as store:
            ids.add(store.store_id())
            store.files("acme", "ada").put(b"abc", name="it")
        assert (memory / name / "VERSION").read_text() == f"{FORMAT_VERSION}\n"
    assert len(ids) == 4


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(
    memory: Path, clock: HandClock
) -> None:
    (memory / "photo.jpg").write_bytes(b"precious")
    with pytest.raises(UnsuitableRoot, match=r"photo\.jpg"):
        open_store(memory, clock)
    assert [path.name for path in memory.iterdir()] == ["photo.jpg"]


@pytest.mark.parametrize("text", [str(FORMAT_VERSION + 1), "999", "one", "", "-1", "0", "1.0"])
def test_another_format_is_refused(memory: Path, clock: HandClock, text: str) -> None:
    open_store(memory / "store", clock).close()
    (memory / "store/VERSION").write_text(text)
    with pytest.raises(UnsuitableRoot, match="format"):
        open_store(memory / "store", clock)


def test_one_that_was_killed_while_writing_the_version_is_no_obstacle(
    memory: Path, clock: HandClock
) -> None:
    (memory / ".tmp-0123456789abcdef").write_bytes(b"")
    open_store(memory, clock).close()


def test_another_process_that_makes_the_same_store_is_no_obstacle(
    memory: Path, clock: HandClock
) -> None:
    # It has got as far as VERSION and its folders while this one looked around.
    real = Path.read_text
    root = memory / "store"
    root.mkdir()

    def late(path: Path) -> str:
        patch.undo()
        open_store(root, clock).close()
        raise FileNotFoundError(path)

    patch = pytest.MonkeyPatch()
    patch.setattr(Path, "read_text", late)
    try:
        open_store(root, clock).close()
    finally:
        patch.undo()
    assert real(root / "VERSION") == f"{FORMAT_VERSION}\n"


def test_eight_processes_make_one_store(memory: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cas.store import Store; "
        "store = Store.open(Path(sys.argv[1])); print(store.store_id()); store.close()"
    )
    makers = [
        subprocess.Popen(
            [sys.executable, "-c", code, memory / "store"],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    said = [maker.communicate() for maker in makers]
    assert {error for _, error in said} == {""}
    assert len({answer for answer, _ in said}) == 1


def test_a_store_is_opened_once_in_a_process(memory: Path, clock: HandClock) -> None:
    with open_store(memory / "store", clock), pytest.raises(StoreBusy):
        open_store(memory / "store", clock)
    store = open_store(memory / "store", clock)
    store.close()
    store.close()


def test_an_unknown_identifier_is_not_found(memory: Path, clock: HandClock) -> None:
    with open_store(memory / "store", clock) as store, pytest.raises(NotFound):
        store.file_by_id("0190b3c2-0000-7000-8000-000000000000")


def test_blobs_without_their_catalog_are_refused_not_forgotten(
    memory: Path, clock: HandClock
) -> None:
    with open_store(memory, clock) as store:
        store.files("acme", "ada").put(b"precious", name="it")
    shutil.rmtree(memory / "catalog")
    # A fresh catalog would make them orphans, and the scrub would remove them.
    with pytest.raises(UnsuitableRoot, match="their catalog is gone"):
        open_store(memory, clock)
    assert [path.read_bytes() for path in memory.glob("objects/*/*")] == [b"precious"]


def test_a_clock_that_leads_far_is_followed_once_it_is_accepted(
    memory: Path, clock: HandClock
) -> None:
    """Invariant 10: time stands still until a synchronised clock or an operator says so."""
    with open_store(memory, clock) as store:
        files = store.files("acme", "ada")
        before = files.put(b"one", name="it").created_at
        clock.trusted = False
        clock.advance(400 * DAY_US)
        assert files.put(b"two", name="it").created_at == before
        assert "400 days ahead" in store.clock_trouble()
        store.accept_clock()
        assert store.clock_trouble() == ""
        assert files.put(b"three", name="it").created_at == clock.now_us()


def test_time_that_is_asked_at_each_request_is_at_most_a_quarter_of_a_second_behind(
    memory: Path, clock: HandClock
) -> None:
    with open_store(memory, clock) as store:
        files = store.files("acme", "ada")
        assert store.about_now_us() == clock.now_us()
        clock.advance(1)
        assert store.about_now_us() == clock.now_us()
        last_us = files.put(b"one", name="it").created_at
        clock.advance(-HOUR_US)
        assert store.about_now_us() == last_us  # it never goes back, even within that time
        clock.trusted = False
        clock.advance(401 * DAY_US)
        assert store.about_now_us() == last_us  # and does not follow a clock in doubt
        store.accept_clock()
        clock.advance(249_999)
        assert store.about_now_us() == last_us  # what it looked at stands for so long
        clock.advance(1)
        assert store.about_now_us() == clock.now_us()


def test_an_index_may_be_deleted_while_the_store_is_closed(memory: Path, clock: HandClock) -> None:
    with open_store(memory / "store", clock) as store:
        files = store.files("acme", "ada")
        stored = files.put_many([PutItem(b"%d" % number, "it") for number in range(30)])
        listed = files.list().items
    for path in (memory / "store/catalog/index").iterdir():
        path.unlink()
    with open_store(memory / "store", clock) as store:
        files = store.files("acme", "ada")
        assert files.list().items == listed
        assert files.stat(parse_reference(stored[0].storage_ref)) == stored[0]
        audit(store)


# --- a disk that is full at one step


def put_one(files: Files, link: UploadLink) -> None:
    files.put(DATA, name="it")


def put_stream(files: Files, link: UploadLink) -> None:
    files.put(io.BytesIO(bytes(3 << 20)), name="it")


def put_many(files: Files, link: UploadLink) -> None:
    files.put_many([PutItem(b"%d" % number + DATA, "it") for number in range(5)])


def heal(files: Files, link: UploadLink) -> None:
    files.put(b"damaged", name="it", run="again")


def put_anothers(files: Files, link: UploadLink) -> None:
    files.put(b"another's", name="it")


def fill(files: Files, link: UploadLink) -> None:
    link.put(0, DATA, filename="a")


def complete(files: Files, link: UploadLink) -> None:
    link.complete()


Work = Callable[[Files, UploadLink], None]
# What takes space; a sync of the journal that fails is another story: nobody knows then.
TAKES_SPACE = ("temporary", "create", "write", "write_at", "allocate", "link", "rename")


class FullAt:
    """Once armed, says that the disk is full at the step `number` of those that take space."""

    def __init__(self, number: int, for_good: bool) -> None:
        self._number = number
        self._for_good = for_good
        self._steps = 0
        self.armed = False

    def __call__(self, name: str, step: int) -> bool:
        if not self.armed or name not in TAKES_SPACE:
            return False
        self._steps += 1
        return self._steps >= self._number if self._for_good else self._steps == self._number


WORKS: list[Work] = [put_one, put_stream, put_many, heal, put_anothers, fill, complete]


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
def test_a_full_disk_at_any_step_leaves_nothing_behind(
    memory: Path, clock: HandClock, work: Work, for_good: bool
) -> None:
    refused = 0
    for number in range(1, 200):
        root = memory / f"{number}"
        full_at = FullAt(number, for_good)
        disk = FailingDisk(errno.ENOSPC, full_at)
        with open_store(root, clock, disk) as store:
            files = store.files("acme", "ada")
            kept = files.put(b"kept", name="it")
            damaged = files.put(b"damaged", name="it")
            store.files("other", "bob").put(b"another's", name="it")
            upload = store.uploads("acme", "ada").request(UploadRequest("it"))
            link = store.upload_link(upload.upload_token)
            link.put(0, b"slot", filename="slot")
            os.truncate(store.blobs.path(damaged.checksum_sha256), 2)
            listed, slots = files.list().items, link.slots()
            full_at.armed = True
            try:
                work(files, link)
            except StoreFull as full:
                refused += 1
                assert full.free_bytes >= 0  # noqa: PT017
                full_at.armed = False
                assert files.list().items == listed
                assert store.upload_link(upload.upload_token).slots() == slots
                assert store.upload_link(upload.upload_token).upload == upload
                found = audit(store, damaged=frozenset({damaged.checksum_sha256}))
                assert found.orphans == [], disk.failed
                files.delete(parse_reference(kept.storage_ref))
                work(files, link)
            full_at.armed = False
            audit(store, damaged=frozenset({damaged.checksum_sha256}))
            if not disk.failed:
                break
    else:
        raise AssertionError("the work never ended")
    # The journal alone is helped once by the ballast.
    assert refused >= 1 or (work is complete and not for_good)


def test_a_batch_whose_barrier_fails_is_forgotten(memory: Path, clock: HandClock) -> None:
    disk = InterposedDisk()
    with open_store(memory / "store", clock, disk) as store:

        def fail() -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        disk.before["sync_filesystem"].append(fail)
        files = store.files("acme", "ada")
        with pytest.raises(OSError, match="Input/output"):
            files.put_many([PutItem(DATA, "it")])
        assert files.list().items == []
        assert audit(store).orphans == []


# --- a disk that a foreign process fills


@pytest.fixture(params=["tmpfs", "ext4"])
def small(
    request: pytest.FixtureRequest, tmp_path: Path, program: Callable[[str], str]
) -> Iterator[Path]:
    """A filesystem of 96 MiB; skipped where this user may not mount."""
    with mounted(tmp_path, 96 << 20, program, ext4=request.param == "ext4") as disk:
        yield disk


def test_a_foreign_process_fills_the_disk(small: Path, clock: HandClock) -> None:
    with open_store(small / "store", clock) as store:
        files = store.files("acme", "ada")
        stored = files.put_many([PutItem(b"%d" % n + DATA, "it") for n in range(300)])
        upload = store.uploads("acme", "ada").request(UploadRequest("it", max_files=2))
        link = store.upload_link(upload.upload_token)
        link.put(0, DATA, filename="a")
        filler = fill_disk(small)
        before = len(list((small / "store/objects").glob("*/*")))
        works: list[Callable[[], object]] = [
            lambda: files.put(os.urandom(100_000), name="it"),
            lambda: files.put(io.BytesIO(os.urandom(5 << 20)), name="it", promised_size=5 << 20),
            lambda: files.put_many([PutItem(os.urandom(50_000), "it") for _ in range(50)]),
            lambda: link.put(1, os.urandom(100_000), filename="b"),
        ]
        for work in works:
            with pytest.raises(StoreFull) as full:
                work()
            assert full.value.free_bytes < 5 << 20
            assert full.value.path.is_relative_to(small / "store")
        assert len(list((small / "store/objects").glob("*/*"))) == before
        assert len(link.slots()) == 1
        # Everything that needs no room for bytes goes on: that is what the ballast is for.
        link.complete()
        for file in stored:
            files.delete(parse_reference(file.storage_ref))
        clock.advance(DAY_US + 1)
        assert collect(store) == 300
        assert audit(store).orphans == []
        filler.unlink()
        again = files.put(os.urandom(1 << 20), name="it")
        assert files.stat(parse_reference(again.storage_ref)) == again
    with open_store(small / "store", clock) as store:
        assert store.blobs.stat(digest_of(DATA)) is not None
        audit(store)


def test_a_body_without_a_length_stops_at_the_watermark(small: Path, clock: HandClock) -> None:
    """Nothing is reserved for it, so the free space is looked at while it comes."""
    free = shutil.disk_usage(small).free
    settings = Settings(store=StoreSettings(min_free=Size(free // 2)))
    with Store.open(small / "store", settings, clock=clock) as store:
        endless = io.FileIO("/dev/zero")

        class Stream:
            def readinto(self, buffer: memoryview, /) -> int:
                return endless.readinto(buffer)

        with endless, pytest.raises(StoreFull):
            store.files("acme", "ada").put(Stream(), name="it")
        # Some MiB more may have come between two looks.
        assert shutil.disk_usage(small).free > free // 8
        assert not list(small.glob("store/objects/*/*"))
