"""A tenant's files: stored once, found by their reference, gone when nobody needs them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cas.clock import DAY_US
from cas.config import Duration, Settings, Size, StoreSettings, UploadSettings
from cas.digest import Digest, digest_of
from cas.durable import SupportsRead
from cas.errors import (
    BlobDamaged,
    BlobMissing,
    DigestMismatch,
    Held,
    InvalidName,
    NotFound,
    SizeMismatch,
    StoreFull,
    TooLarge,
)
from cas.files import Files, PutItem
from cas.records import CONDEMNED, Blob, StoredFile
from cas.references import Reference, check_name, parse_reference
from cas.retention import FOREVER, parse_retention
from cas.store import Store
from cas.sweep import execute_sweep, plan_sweep
from tests.audit import audit
from tests.cas.interposed import collect
from tests.clocks import KEEP_US, START_US, HandClock

SETTINGS = Settings(store=StoreSettings(grace=Duration(DAY_US), min_free=Size(0)))


@pytest.fixture
def store(memory: Path, clock: HandClock) -> Iterator[Store]:
    with Store.open(memory / "store", SETTINGS, clock=clock) as store:
        yield store


@pytest.fixture
def files(store: Store) -> Files:
    return store.files("acme", "ada")


@pytest.fixture
def strangers(store: Store) -> Files:
    return store.files("other", "bob")


def ref(file: StoredFile) -> Reference:
    return parse_reference(file.storage_ref)


def content(files: Files, file: StoredFile) -> bytes:
    _, fd = files.open(ref(file))
    with open(fd, "rb") as stream:
        return stream.read()


def objects(store: Store) -> list[str]:
    store.blobs.close()  # what is thrown away after the answer is gone on return
    return sorted(path.name for path in (store.root / "objects").glob("*/*"))


def refcount(store: Store, data: bytes) -> int:
    with store.catalog.read() as snapshot:
        blob = snapshot.get(Blob, digest_of(data))
    assert blob is not None
    return blob.refcount


def sweep(store: Store) -> int:
    with store.catalog.read() as snapshot:
        plan = plan_sweep(snapshot, store.now_us(snapshot), keep_us=KEEP_US)
    return execute_sweep(store.catalog, plan).files


class Stream:
    """A stream that can be read once; may break on the way."""

    def __init__(self, data: bytes, breaks_after: int | None = None) -> None:
        self._inner = io.BytesIO(data)
        self._left = breaks_after

    def readinto(self, buffer: memoryview, /) -> int:
        if self._left is not None:
            if self._left == 0:
                raise ConnectionResetError("the client went away")
            buffer = buffer[: self._left]
        count = self._inner.readinto(buffer)
        if self._left is not None:
            self._left -= count
        return count


# --- storing


def test_a_file_is_what_was_put(store: Store, files: Files) -> None:
    file = files.put(
        b"abc", name="letters", run="run-1", filename="a.TXT", content_type="text/plain"
    )
    digest = digest_of(b"abc")
    assert file.storage_ref == f"hwy://uploads/acme/run-1/{digest.hex()}.txt"
    assert (file.name, file.original_filename, file.content_type) == (
        "letters",
        "a.TXT",
        "text/plain",
    )
    assert (file.size_bytes, file.checksum_sha256) == (3, digest)
    assert (file.created_at, file.created_by) == (START_US, "ada")
    assert file.expires_at == START_US + 30 * DAY_US  # default_retention_days
    assert files.stat(ref(file)) == file
    assert store.file_by_id(file.file_id) == file
    assert content(files, file) == b"abc"
    assert objects(store) == [digest.hex()]


@pytest.mark.parametrize("data", [b"", b"x", b"y" * (1 << 20), b"z" * ((3 << 20) + 1)])
def test_any_kind_of_source_gives_the_same_file(
    store: Store, files: Files, memory: Path, data: bytes
) -> None:
    path = memory / "source"
    path.write_bytes(data)
    with path.open("rb") as opened, path.open("rb", buffering=0) as raw:
        sources: list[bytes | bytearray | memoryview | Path | SupportsRead] = [
            data,
            bytearray(data),
            memoryview(data),
            path,
            io.BytesIO(data),
            Stream(data),
            opened,
            raw,
        ]
        stored = [files.put(source, name="it") for source in sources]
    assert {file.file_id for file in stored} == {stored[0].file_id}
    assert content(files, stored[0]) == data
    assert len(audit(store).orphans) == 0


def test_putting_again_is_the_same_file_with_the_longer_retention(
    store: Store, files: Files, clock: HandClock
) -> None:
    first = files.put(b"abc", name="one", retention=parse_retention("days:10"))
    shorter = files.put(b"abc", name="two", retention=parse_retention("hours:1"))
    assert shorter == first
    clock.advance(DAY_US)
    longer = files.put(b"abc", name="three", retention=parse_retention("days:10"))
    assert longer.file_id == first.file_id
    assert longer.name == "one"
    assert longer.expires_at == START_US + 11 * DAY_US
    for_ever = files.put(b"abc", name="four", retention=FOREVER)
    assert for_ever.expires_at is None
    assert for_ever.retention_policy == "forever"
    assert files.put(b"abc", name="five", retention=parse_retention("days:1")) == for_ever
    assert refcount(store, b"abc") == 1
    assert len(files.list().items) == 1


def test_other_runs_extensions_and_tenants_are_other_files_of_one_blob(
    store: Store, files: Files, strangers: Files
) -> None:
    stored = [
        files.put(b"abc", name="it"),
        files.put(b"abc", name="it", run="run-1"),
        files.put(b"abc", name="it", filename="it.txt"),
        strangers.put(b"abc", name="it"),
    ]
    assert len({file.file_id for file in stored}) == 4
    assert refcount(store, b"abc") == 4
    assert len(objects(store)) == 1


def test_bytes_that_the_tenant_holds_are_not_written_again(
    store: Store, files: Files, memory: Path
) -> None:
    source = memory / "source"
    source.write_bytes(b"x" * (2 << 20))
    first = files.put(source, name="one", run="one")
    inode = store.blobs.stat(first.checksum_sha256)
    files.put(source, name="two", run="two")
    files.put(Stream(source.read_bytes()), name="three", run="three")
    assert store.blobs.stat(first.checksum_sha256) == inode
    assert refcount(store, source.read_bytes()) == 3


def test_a_stream_is_stored_from_where_it_stands(files: Files) -> None:
    first = files.put(io.BytesIO(b"abcdef"), name="it")
    for _ in range(2):  # the second time the tenant holds bytes of this length
        stream = io.BytesIO(b"xxxabcdef")
        stream.seek(3)
        assert files.put(stream, name="it") == first


# --- promises and limits


@pytest.mark.parametrize("held", [False, True])
def test_a_wrong_promise_stores_nothing(store: Store, files: Files, held: bool) -> None:
    if held:
        files.put(b"abc", name="held", run="held")
    before = audit(store), objects(store), len(files.list().items)
    with pytest.raises(DigestMismatch) as mismatch:
        files.put(b"abc", name="it", promised_digest=digest_of(b"abd"))
    assert mismatch.value.received == digest_of(b"abc").hex()
    for promised in (2, 4):
        for source in (b"abc", Stream(b"abc")):
            with pytest.raises(SizeMismatch):
                files.put(source, name="it", promised_size=promised)
    for source in (b"abc", Stream(b"abc")):
        with pytest.raises(TooLarge) as large:
            files.put(source, name="it", limit_bytes=2)
        assert large.value.limit_bytes == 2
    assert (audit(store), objects(store), len(files.list().items)) == before
    file = files.put(b"abc", name="it", promised_size=3, promised_digest=digest_of(b"abc"))
    assert content(files, file) == b"abc"


def test_a_digest_alone_gets_nobody_the_bytes(store: Store, files: Files, strangers: Files) -> None:
    secret = files.put(b"secret", name="it")
    with pytest.raises(DigestMismatch):
        strangers.put(b"guess!", name="it", promised_digest=secret.checksum_sha256)
    assert strangers.list().items == []


def test_a_source_that_breaks_off_leaves_nothing(store: Store, files: Files) -> None:
    for length in (0, 5, 2 << 20):
        with pytest.raises(ConnectionResetError):
            files.put(Stream(bytes(3 << 20), breaks_after=length), name="it")
    assert audit(store).orphans == []
    assert files.list().items == []


def test_the_limit_of_the_store_is_the_limit_of_every_put(memory: Path, clock: HandClock) -> None:
    settings = Settings(
        store=StoreSettings(min_free=Size(0)), uploads=UploadSettings(max_file_size_mb=1)
    )
    with Store.open(memory / "small", settings, clock=clock) as store:
        files = store.files("acme", "ada")
        files.put(bytes(1 << 20), name="just fits")
        with pytest.raises(TooLarge):
            files.put(bytes((1 << 20) + 1), name="it")
        with pytest.raises(TooLarge):
            files.put(bytes((1 << 20) + 1), name="it", limit_bytes=5 << 20)
        with pytest.raises(TooLarge):
            files.put_many([PutItem(b"a", "a"), PutItem(bytes((1 << 20) + 1), "b")])
        assert audit(store).orphans == []
        assert len(files.list().items) == 1


# --- names


BAD_NAMES = [
    "",
    " ",
    " a",
    "a ",
    ".",
    "..",
    "a/b",
    "a\\b",
    "../etc/passwd",
    "a\x00b",
    "a\nb",
    "a\rb: c",
    "a\x7f",
    "photo\u202egpj.exe",
    "a\u2066b",
    "a\u200eb",
    "a\ufeffb",
    "a\u2028b",
    "\udc80",
    "x" * 1000,
    "x" * 256,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_is_refused_before_a_byte_is_read(store: Store, files: Files, name: str) -> None:
    broken = Stream(b"", breaks_after=0)
    with pytest.raises(InvalidName):
        files.put(broken, name=name)
    with pytest.raises(InvalidName):
        files.put(broken, name="fine", filename=name)
    with pytest.raises(InvalidName):
        files.put_many([PutItem(b"fine", "fine"), PutItem(b"x", name)])
    assert audit(store).orphans == []


@pytest.mark.parametrize(
    "name", ["a", "é", "文件.pdf", "👩\u200d💻", "x" * 255, "نام\u200cه", ".a"]
)
def test_a_good_name_is_kept_as_it_is(files: Files, name: str) -> None:
    file = files.put(name.encode(), name=name, filename=name)
    assert (file.name, file.original_filename) == (name, name)
    assert files.list(name=name).items == [file]


@pytest.mark.parametrize("segment", ["", "a/b", "..", ".a", "-a", "a b", "ä", "a" * 129, "a\n"])
def test_a_bad_tenant_or_run_is_refused(store: Store, files: Files, segment: str) -> None:
    with pytest.raises(InvalidName):
        store.files(segment, "ada")
    with pytest.raises(InvalidName):
        files.put(b"x", name="it", run=segment)
    with pytest.raises(InvalidName):
        files.put_many([PutItem(b"x", "it")], run=segment)


@given(st.text(max_size=300))
def test_a_name_that_passes_is_safe_to_show(name: str) -> None:
    try:
        passed = check_name(name)
    except InvalidName:
        return
    assert passed == name
    assert not set(name) & {"/", "\\", "\x00", "\n", "\r", "\u202e"}
    assert name.encode()


# --- many at once


def test_many_are_stored_in_the_order_of_the_items(store: Store, files: Files) -> None:
    contents = [b"%d" % number for number in range(2500)]  # more than one frame holds
    stored = files.put_many(PutItem(data, f"n{data.decode()}") for data in contents)
    assert [file.checksum_sha256 for file in stored] == [digest_of(data) for data in contents]
    assert [file.name for file in stored] == [f"n{data.decode()}" for data in contents]
    assert len(objects(store)) == 2500
    assert audit(store).orphans == []


def test_many_with_the_same_bytes_are_one_file(store: Store, files: Files) -> None:
    stored = files.put_many([PutItem(b"abc", f"n{number}") for number in range(10)])
    assert {file.file_id for file in stored} == {stored[0].file_id}
    assert refcount(store, b"abc") == 1
    kinds = files.put_many([PutItem(b"abc", "x", filename=f"x.{kind}") for kind in ("a", "b")])
    assert len({file.file_id for file in kinds}) == 2
    assert audit(store).orphans == []


def test_many_that_are_held_already(
    store: Store, files: Files, strangers: Files, clock: HandClock
) -> None:
    own, foreign, both = b"own", b"foreign", b"both"
    files.put(own, name="it", run="first")
    strangers.put(foreign, name="it")
    files.put(both, name="it", run="first")
    strangers.put(both, name="it")
    before = {data: store.blobs.stat(digest_of(data)) for data in (own, foreign, both)}
    stored = files.put_many([PutItem(data, "it") for data in (own, b"new", foreign, both, own)])
    assert [content(files, file) for file in stored] == [own, b"new", foreign, both, own]
    assert {data: store.blobs.stat(digest_of(data)) for data in before} == before
    assert [refcount(store, data) for data in (own, b"new", foreign, both)] == [2, 1, 2, 3]
    assert audit(store).orphans == []


def test_many_heal_what_is_stale_gone_or_other(
    store: Store, files: Files, clock: HandClock
) -> None:
    contents = [b"stale", b"gone", b"cut short", b"fine"]
    files.put_many([PutItem(data, "it") for data in contents], run="first")
    clock.advance(SETTINGS.store.trust_verified_for + 1)
    files.put(b"fine", name="it", run="again")
    store.blobs.path(digest_of(b"gone")).unlink()
    os.truncate(store.blobs.path(digest_of(b"cut short")), 1)
    stored = files.put_many([PutItem(data, "it") for data in contents], run="second")
    assert [content(files, file) for file in stored] == contents
    assert audit(store).orphans == []
    with store.catalog.read() as snapshot:
        blob = snapshot.get(Blob, digest_of(b"stale"))
    assert blob is not None
    assert blob.verified_at == clock.now_us()


def test_none_at_all_are_stored(files: Files) -> None:
    assert files.put_many([]) == []


def test_a_wrong_one_among_many_leaves_no_bytes_behind(store: Store, files: Files) -> None:
    items = [PutItem(b"%d" % number, "it") for number in range(50)]
    with pytest.raises(ConnectionResetError):
        files.put_many([*items, PutItem(Stream(b"abc", breaks_after=1), "it")])
    with pytest.raises(InvalidName):
        files.put_many([*items, PutItem(b"abc", "a/b")])
    with pytest.raises(FileNotFoundError):
        files.put_many([*items, PutItem(store.root / "nowhere", "it")])
    assert audit(store).orphans == []


# --- finding


def test_unknown_foreign_and_expired_are_told_alike(
    store: Store, files: Files, strangers: Files, clock: HandClock
) -> None:
    mine = files.put(b"abc", name="it")
    gone = files.put(b"gone", name="it", retention=parse_retention("hours:1"))
    clock.advance(2 * 3600 * 1_000_000)
    unknown = parse_reference(f"uploads/acme/direct/{digest_of(b'unknown').hex()}.bin")

    def told(files: Files, reference: Reference) -> set[str]:
        errors = set()
        for ask in (
            lambda: files.stat(reference),
            lambda: files.open(reference),
            lambda: files.delete(reference),
            lambda: files.hold(reference, True),
        ):
            with pytest.raises(NotFound) as error:
                ask()
            errors.add(str(error.value).replace(str(reference), "REF"))
        return errors

    assert told(files, unknown) == told(strangers, ref(mine)) == {"no file 'REF'"}
    for ask in (files.stat, files.open):
        with pytest.raises(NotFound):
            ask(ref(gone))
    with pytest.raises(NotFound):
        store.file_by_id(gone.file_id)
    assert files.list().items == [mine]
    assert strangers.list().items == []


def test_a_file_whose_bytes_are_gone_says_so(store: Store, files: Files) -> None:
    file = files.put(b"abc", name="it")
    store.blobs.path(file.checksum_sha256).unlink()
    assert files.stat(ref(file)) == file
    with pytest.raises(BlobMissing):
        files.open(ref(file))


@pytest.mark.parametrize("size_bytes", [0, 2, 4])
def test_a_file_whose_bytes_have_another_length_is_not_opened(
    store: Store, files: Files, size_bytes: int
) -> None:
    file = files.put(b"abc", name="it")
    os.truncate(store.blobs.path(file.checksum_sha256), size_bytes)
    store.blobs.close()  # no descriptor of what is thrown away after the answer is left
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BlobDamaged, match=f"{size_bytes} bytes of 3"):
        files.open(ref(file))
    with pytest.raises(BlobDamaged, match=f"{size_bytes} bytes of 3"):
        store.opener.here(file.checksum_sha256, file.size_bytes)
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_a_list_of_one_name_in_one_run_has_full_pages(files: Files, clock: HandClock) -> None:
    wanted = []
    for number in range(6):
        clock.advance(1_000)
        for run, name in (("a", "x"), ("a", "y"), ("b", "x")):
            file = files.put(f"{number} {run} {name}".encode(), name=name, run=run)
            if (run, name) == ("a", "x"):
                wanted.append(file)
    first = files.list(run="a", name="x", limit=4)
    second = files.list(run="a", name="x", limit=4, cursor=first.next_cursor)
    assert first.items == wanted[:1:-1]
    assert (second.items, second.next_cursor) == (wanted[1::-1], None)
    assert files.list(run="b", name="y").items == []


def test_listing_goes_page_by_page_newest_first(
    store: Store, files: Files, strangers: Files, clock: HandClock
) -> None:
    stored = []
    for number in range(10):
        clock.advance(1_000_000)
        stored.append(
            files.put(b"%d" % number, name=f"n{number % 2}", run="r1" if number < 5 else "r2")
        )
        strangers.put(b"%d" % number, name="n0", run="r1")
    newest_first = stored[::-1]

    def pages(limit: int, run: str | None = None, name: str | None = None) -> list[StoredFile]:
        found: list[StoredFile] = []
        cursor = None
        while True:
            page = files.list(run=run, name=name, cursor=cursor, limit=limit)
            assert len(page.items) <= limit
            found += page.items
            if page.next_cursor is None:
                return found
            cursor = page.next_cursor

    for limit in (1, 3, 10, 100):
        assert pages(limit) == newest_first
        assert pages(limit, run="r1") == newest_first[5:]
        assert pages(limit, name="n0") == newest_first[1::2]
        assert pages(limit, run="r2", name="n1") == newest_first[:5:2]
        assert pages(limit, run="r3") == []
    assert files.list(limit=10).next_cursor is None
    assert len(files.list(limit=0).items) == 1


def test_a_listing_goes_on_where_the_file_of_the_cursor_is_deleted(files: Files) -> None:
    for number in range(5):
        files.put(b"%d" % number, name="it")
    page = files.list(limit=2)
    files.delete(ref(page.items[-1]))
    rest = files.list(cursor=page.next_cursor)
    assert len(rest.items) == 3


def test_a_name_that_is_too_long_for_a_key_is_found(files: Files) -> None:
    long, other = "ä" * 255, "ä" * 254 + "b"
    first = files.put(b"1", name=long)
    second = files.put(b"2", name=other)
    assert files.list(name=long).items == [first]
    assert files.list(name=other).items == [second]


# --- deleting


def test_a_deleted_file_is_gone_and_its_bytes_after_the_grace(
    store: Store, files: Files, clock: HandClock
) -> None:
    file = files.put(b"abc", name="it")
    files.delete(ref(file))
    with pytest.raises(NotFound):
        files.delete(ref(file))
    assert collect(store) == 0
    assert len(objects(store)) == 1
    clock.advance(DAY_US)
    assert collect(store) == 0
    clock.advance(1)
    assert collect(store) == 1
    assert objects(store) == []
    with store.catalog.read() as snapshot:
        assert snapshot.get(Blob, file.checksum_sha256) is None


def test_the_last_of_several_files_frees_the_bytes(
    store: Store, files: Files, strangers: Files, clock: HandClock
) -> None:
    mine, theirs = files.put(b"abc", name="it"), strangers.put(b"abc", name="it")
    files.delete(ref(mine))
    clock.advance(2 * DAY_US)
    assert collect(store) == 0
    assert content(strangers, theirs) == b"abc"
    strangers.delete(ref(theirs))
    clock.advance(2 * DAY_US)
    assert collect(store) == 1


def test_a_file_put_again_within_the_grace_keeps_its_bytes(
    store: Store, files: Files, clock: HandClock
) -> None:
    first = files.put(b"abc", name="it")
    inode = store.blobs.stat(first.checksum_sha256)
    files.delete(ref(first))
    clock.advance(DAY_US - 1)
    second = files.put(b"abc", name="it")
    clock.advance(10 * DAY_US)
    assert collect(store) == 0
    assert second.file_id != first.file_id
    assert store.blobs.stat(first.checksum_sha256) == inode


def test_who_has_the_bytes_open_reads_them_to_the_end(
    store: Store, files: Files, clock: HandClock
) -> None:
    file = files.put(b"abc", name="it")
    _, fd = files.open(ref(file))
    files.delete(ref(file))
    clock.advance(2 * DAY_US)
    assert collect(store) == 1
    with open(fd, "rb") as stream:
        assert stream.read() == b"abc"


# --- holds and expiry


def test_nothing_deletes_a_held_file(store: Store, files: Files, clock: HandClock) -> None:
    file = files.put(b"abc", name="it", retention=parse_retention("hours:1"))
    held = files.hold(ref(file), True)
    assert held.hold
    with pytest.raises(Held) as error:
        files.delete(ref(file))
    assert error.value.reference == file.storage_ref
    clock.advance(10 * DAY_US)
    assert sweep(store) == 0
    assert files.stat(ref(file)) == held
    assert files.list().items == [held]
    files.hold(ref(file), False)
    with pytest.raises(NotFound):
        files.stat(ref(file))
    assert sweep(store) == 1


def test_a_hold_lasts_when_the_file_is_put_again(store: Store, files: Files) -> None:
    file = files.put(b"abc", name="it")
    files.hold(ref(file), True)
    assert files.put(b"abc", name="it", retention=FOREVER).hold
    assert refcount(store, b"abc") == 1


def test_an_expired_file_is_absent_before_the_sweep_and_may_be_put_again(
    store: Store, files: Files, clock: HandClock
) -> None:
    file = files.put(b"abc", name="it", retention=parse_retention("hours:1"))
    clock.advance(3600 * 1_000_000 - 1)
    assert files.stat(ref(file)) == file
    clock.advance(1)
    with pytest.raises(NotFound):
        files.stat(ref(file))
    again = files.put(b"abc", name="it", retention=parse_retention("hours:1"))
    assert files.stat(ref(again)) == again
    assert sweep(store) == 0


def test_a_kept_store_is_found_as_it_was(memory: Path, clock: HandClock) -> None:
    with Store.open(memory / "kept", SETTINGS, clock=clock) as store:
        files = store.files("acme", "ada")
        file = files.put(b"abc", name="it")
        store_id = store.store_id()
    for _ in range(2):
        with Store.open(memory / "kept", SETTINGS, clock=clock) as store:
            files = store.files("acme", "ada")
            assert files.stat(ref(file)) == file
            assert content(files, file) == b"abc"
            assert store.store_id() == store_id
            audit(store)


# --- a watermark


def test_a_put_below_the_watermark_is_refused_with_numbers(memory: Path, clock: HandClock) -> None:
    settings = Settings(store=StoreSettings(min_free=Size(1 << 60)))
    with Store.open(memory / "full", settings, clock=clock) as store:
        files = store.files("acme", "ada")
        for put in (
            lambda: files.put(b"abc", name="it", promised_size=3),
            lambda: files.put_many([PutItem(b"abc", "it")]),
        ):
            with pytest.raises(StoreFull) as full:
                put()
            assert full.value.free_bytes > 0
        assert audit(store).orphans == []


def test_two_digests_do_not_share_a_condemnation(
    store: Store, files: Files, clock: HandClock
) -> None:
    stored = [files.put(data, name="it") for data in (b"a", b"b")]
    files.delete(ref(stored[0]))
    with store.catalog.read() as snapshot:
        condemned = snapshot.range(Blob, "condemned")
    assert [blob.digest for blob in condemned] == [Digest(stored[0].checksum_sha256)]
    assert condemned[0].state == CONDEMNED
