"""Resumable uploads: what is answered is kept, whatever interrupts its sender."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import final

import pytest
from click.testing import CliRunner
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from cas import partial_files, pieces
from cas.cli import main
from cas.clock import DAY_US, HOUR_US
from cas.config import Duration, LimitSettings, Settings, Size, StoreSettings, UploadSettings
from cas.digest import digest_of
from cas.doctor import examine_store
from cas.durable import DISK, Disk
from cas.errors import (
    ChecksumMismatch,
    InvalidName,
    NotFound,
    OffsetMismatch,
    PartialBusy,
    PartialExpired,
    PartialTaken,
    QuotaExceeded,
    SlotsTaken,
    StoreFull,
    TooLarge,
    UploadClosed,
)
from cas.quotas import usage_of
from cas.records import Event, Partial, UploadFile
from cas.store import Store
from cas.sweep import Swept, execute_sweep, plan_sweep
from cas.takeover import Takeovers, take
from cas.upload_links import UploadLink
from cas.uploads import UploadRequest
from tests.audit import assert_well, audit
from tests.clocks import KEEP_US, START_US, HandClock
from tests.crash.steps import FailingDisk
from tests.crash.victims import Report, Victim

SETTINGS = Settings(
    store=StoreSettings(grace=Duration(DAY_US), min_free=Size(0)),
    uploads=UploadSettings(partial_expiry=Duration(HOUR_US)),
)
DATA = random.Random(1).randbytes(100_000)


@final
class Broken:
    """A source that brings `data` and then fails."""

    def __init__(self, data: bytes, error: Exception) -> None:
        self._stream = io.BytesIO(data)
        self._error = error

    def readinto(self, buffer: memoryview, /) -> int:
        count = self._stream.readinto(buffer)
        if count == 0:
            raise self._error
        return count


@final
class Pipe:
    """A source that waits for its sender, as a body on a connection does."""

    def __init__(self) -> None:
        self.sender, self._ours = socket.socketpair()
        self.waiting = threading.Event()

    def readinto(self, buffer: memoryview, /) -> int:
        self.waiting.set()
        return self._ours.recv_into(buffer)

    def interrupt(self) -> None:
        self._ours.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        self.sender.close()
        self._ours.close()


def open_store(root: Path, clock: HandClock, disk: Disk = DISK) -> Store:
    return Store.open(root / "store", SETTINGS, clock=clock, disk=disk)


@pytest.fixture
def store(memory: Path, clock: HandClock) -> Iterator[Store]:
    with open_store(memory, clock) as store:
        yield store


def opened(store: Store, **wanted: object) -> UploadLink:
    request = UploadRequest(**{"name": "papers", "max_files": 3, **wanted})  # type: ignore[arg-type]
    upload = store.uploads("acme", "ada").request(request)
    return store.upload_link(upload.upload_token)


@pytest.fixture
def link(store: Store) -> UploadLink:
    return opened(store)


def begin(link: UploadLink, length: int = len(DATA), index: int | None = None) -> str:
    return link.begin_partial(index, "a.bin", None, length).partial_id


def send(link: UploadLink, partial_id: str, begin: int, end: int) -> int:
    data = DATA[begin:end]
    return link.append(partial_id, begin, io.BytesIO(data), promised_size=len(data)).offset_bytes


def files(store: Store) -> list[str]:
    return sorted(path.name for path in (store.root / "partial").iterdir())


def bytes_of(store: Store, slot: UploadFile) -> bytes:
    assert slot.checksum_sha256 is not None
    with open(store.opener.here(slot.checksum_sha256), "rb") as stream:
        return stream.read()


def sweep(store: Store) -> Swept:
    with store.catalog.read() as snapshot:
        plan = plan_sweep(
            snapshot, store.now_us(snapshot), partial_files=store.partial_files, keep_us=KEEP_US
        )
    return execute_sweep(store.catalog, plan, partial_files=store.partial_files)


# --- a life


def test_pieces_fill_the_slot_and_leave_nothing_behind(store: Store, link: UploadLink) -> None:
    begun = link.begin_partial(1, "a.pdf", "application/pdf", len(DATA))
    assert (begun.index, begun.offset_bytes, begun.finished) == (1, 0, False)
    assert begun.expires_at == START_US + HOUR_US
    assert link.partials() == [begun]
    assert send(link, begun.partial_id, 0, 30_000) == 30_000
    assert link.slots() == []
    assert send(link, begun.partial_id, 30_000, 30_000) == 30_000
    assert send(link, begun.partial_id, 30_000, len(DATA)) == len(DATA)
    [slot] = link.slots()
    assert (slot.file_index, slot.filename, slot.content_type) == (1, "a.pdf", "application/pdf")
    assert bytes_of(store, slot) == DATA
    assert link.partials() == []
    assert files(store) == []
    audit(store)
    assert_well(store)


def test_who_lost_the_last_answer_hears_that_all_is_there(store: Store, link: UploadLink) -> None:
    partial_id = begin(link)
    send(link, partial_id, 0, len(DATA))
    found = link.partial(partial_id)
    assert found.finished
    assert found.expires_at is None
    assert send(link, partial_id, len(DATA), len(DATA)) == len(DATA)
    with pytest.raises(OffsetMismatch):
        send(link, partial_id, 0, 10)
    with pytest.raises(TooLarge):
        link.append(partial_id, len(DATA), io.BytesIO(b"x"))
    link.complete()
    late = store.upload_link(link.upload.upload_token)
    assert late.partial(partial_id).finished
    assert late.append(partial_id, len(DATA), io.BytesIO(), promised_size=0).finished


def test_an_empty_file_fills_its_slot_at_once(store: Store, link: UploadLink) -> None:
    begun = link.begin_partial(None, "empty.txt", None, 0)
    assert begun.finished
    assert link.partial(begun.partial_id) == begun
    [slot] = link.slots()
    assert slot.size_bytes == 0
    assert files(store) == []


def test_a_slot_that_is_filled_anew_forgets_the_earlier_sender(link: UploadLink) -> None:
    partial_id = begin(link, index=0)
    send(link, partial_id, 0, len(DATA))
    link.put(0, b"other", filename="b")
    with pytest.raises(NotFound):
        link.partial(partial_id)


# --- which slot


def test_without_an_index_the_first_free_slot_is_taken(link: UploadLink, clock: HandClock) -> None:
    link.put(0, b"x", filename="x")
    first = link.begin_partial(None, "a", None, 9)
    clock.advance(1000)  # identifiers of one millisecond sort in any order
    second = link.begin_partial(None, "a", None, 9)
    clock.advance(1000)
    assert (first.index, second.index) == (1, 2)
    # All are claimed: a sender that lost the answer to its first attempt begins again.
    third = link.begin_partial(None, "a", None, 9)
    assert third.index == 1
    with pytest.raises(NotFound):
        link.partial(first.partial_id)
    assert [each.partial_id for each in link.partials()] == [second.partial_id, third.partial_id]


def test_a_full_upload_takes_no_more_unless_told_which_slot(link: UploadLink) -> None:
    for index in range(3):
        link.put(index, b"x", filename="x")
    with pytest.raises(SlotsTaken):
        link.begin_partial(None, "a", None, 9)
    begun = link.begin_partial(2, "a", None, 9)
    link.append(begun.partial_id, 0, io.BytesIO(b"123456789"))
    assert link.slots()[2].size_bytes == 9


def test_a_new_partial_of_a_slot_ends_the_earlier_one(store: Store, link: UploadLink) -> None:
    old = begin(link, index=0)
    send(link, old, 0, 500)
    new = begin(link, index=0)
    with pytest.raises(NotFound):
        send(link, old, 500, 600)
    assert [each.partial_id for each in link.partials()] == [new]
    assert files(store) == []


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((3, "a", None, 5), NotFound),
        ((-1, "a", None, 5), NotFound),
        ((0, "a/b", None, 5), InvalidName),
        ((0, "a", None, 101), TooLarge),
    ],
)
def test_what_cannot_be_is_refused_at_the_beginning(
    store: Store, arguments: tuple[int, str, None, int], error: type[Exception]
) -> None:
    link = opened(store, max_size_bytes=100)
    with pytest.raises(error):
        link.begin_partial(*arguments)
    assert link.partials() == []


def test_what_will_not_fit_with_its_copy_is_refused_at_the_beginning(
    store: Store, link: UploadLink
) -> None:
    free = store.blobs.free_bytes()
    with pytest.raises(StoreFull):
        begin(link, free // 2 + (1 << 30))
    begin(link, free // 4)


# --- taking over


@final
class Wanted:
    """A source that is told when it shall end, and may fail at it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.told = threading.Event()
        self._error = error

    def interrupt(self) -> None:
        self.told.set()
        if self._error is not None:
            raise self._error


def test_a_writer_that_cannot_be_interrupted_keeps_no_other_from_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    takeovers = Takeovers()
    sources = [Wanted(RuntimeError("deaf")), Wanted(), Wanted()]
    with ThreadPoolExecutor(len(sources)) as pool, ExitStack() as writers:
        for number, source in enumerate(sources):
            path = tmp_path / str(number)
            fd = os.open(path, os.O_RDWR | os.O_CREAT)
            writers.callback(os.close, fd)
            take(fd, 0)
            writers.enter_context(takeovers.reading(fd, source))
            other = os.open(path, os.O_RDWR)
            # Each is wanted once the one before was told, so the watch must have gone on.
            pool.submit(take, other, 30).add_done_callback(partial(_closed, other))
            assert source.told.wait(30)
    assert "deaf" in caplog.text
    assert caplog.text.count("could not be interrupted") == 1


def _closed(fd: int, _: object) -> None:
    os.close(fd)


# --- interruptions


def test_a_cut_connection_keeps_what_came(store: Store, link: UploadLink) -> None:
    partial_id = begin(link)
    with pytest.raises(ConnectionResetError):
        link.append(partial_id, 0, Broken(DATA[:777], ConnectionResetError()), promised_size=5000)
    assert link.partial(partial_id).offset_bytes == 777
    assert send(link, partial_id, 777, len(DATA)) == len(DATA)
    assert bytes_of(store, link.slots()[0]) == DATA


def test_a_cut_after_the_last_byte_asks_for_that_byte_again(link: UploadLink) -> None:
    partial_id = begin(link)
    with pytest.raises(ConnectionResetError):
        link.append(partial_id, 0, Broken(DATA, ConnectionResetError()))
    assert link.partial(partial_id).offset_bytes == len(DATA) - 1
    assert send(link, partial_id, len(DATA) - 1, len(DATA)) == len(DATA)


def test_a_wrong_offset_is_refused_with_the_right_one(link: UploadLink) -> None:
    partial_id = begin(link)
    send(link, partial_id, 0, 100)
    for wrong in (0, 99, 101):
        with pytest.raises(OffsetMismatch) as caught:
            send(link, partial_id, wrong, 200)
        assert caught.value.offset_bytes == 100
    assert link.partial(partial_id).offset_bytes == 100


@pytest.mark.parametrize("told", [True, False], ids=["announced", "chunked"])
def test_more_than_was_announced_is_refused(link: UploadLink, told: bool) -> None:
    partial_id = begin(link, 1000)
    send(link, partial_id, 0, 100)
    with pytest.raises(TooLarge) as caught:
        link.append(partial_id, 100, io.BytesIO(bytes(901)), promised_size=901 if told else None)
    assert caught.value.limit_bytes == 900
    assert link.partial(partial_id).offset_bytes == 100
    assert send(link, partial_id, 100, 1000) == 1000


def test_a_wrong_checksum_keeps_nothing_of_the_piece(store: Store, link: UploadLink) -> None:
    partial_id = begin(link)
    good = digest_of(DATA[:5000])
    link.append(partial_id, 0, io.BytesIO(DATA[:5000]), promised_digest=good)
    with pytest.raises(ChecksumMismatch) as caught:
        link.append(partial_id, 5000, io.BytesIO(DATA[5000:]), promised_digest=good)
    assert caught.value.promised == good.hex()
    assert caught.value.received == digest_of(DATA[5000:]).hex()
    assert link.partial(partial_id).offset_bytes == 5000
    assert (store.root / "partial" / partial_id).stat().st_size == 5000
    with pytest.raises(ConnectionResetError):  # not checked, so not kept
        link.append(
            partial_id,
            5000,
            Broken(DATA[5000:6000], ConnectionResetError()),
            promised_digest=good,
        )
    assert link.partial(partial_id).offset_bytes == 5000
    right = digest_of(DATA[5000:])
    link.append(partial_id, 5000, io.BytesIO(DATA[5000:]), promised_digest=right)
    assert bytes_of(store, link.slots()[0]) == DATA


def test_a_long_piece_is_recorded_in_slices(
    store: Store, link: UploadLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "SLICE_BYTES", 1 << 20)
    data = random.Random(2).randbytes(5 << 20)
    partial_id = begin(link, len(data))
    seen: list[int] = []

    class Watching(io.BytesIO):
        def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
            [progress] = link.partials()
            seen.append(progress.offset_bytes)
            return super().readinto(buffer)

    link.append(partial_id, 0, Watching(data), promised_size=len(data))
    assert sorted(set(seen)) == [n << 20 for n in range(5)]
    assert bytes_of(store, link.slots()[0]) == data


def test_a_slow_sender_is_recorded_by_time(
    link: UploadLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "SLICE_S", 0.0)
    partial_id = begin(link)
    seen: list[int] = []

    class Slow(io.BytesIO):
        def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
            seen.append(link.partials()[0].offset_bytes)
            return super().readinto(buffer[:10])

    link.append(partial_id, 0, Slow(DATA[:30]))
    assert seen == [0, 10, 20, 30]


# --- somebody else comes


def test_a_later_request_takes_over_from_a_sender_that_fell_silent(link: UploadLink) -> None:
    partial_id = begin(link)
    pipe = Pipe()
    with ThreadPoolExecutor(1) as pool:
        silent = pool.submit(link.append, partial_id, 0, pipe, promised_size=len(DATA))
        pipe.sender.sendall(DATA[:999])
        assert pipe.waiting.wait(60)
        found = link.partial(partial_id)
        with pytest.raises(PartialTaken):
            silent.result(60)
    assert found.offset_bytes == link.partial(partial_id).offset_bytes
    assert send(link, partial_id, found.offset_bytes, len(DATA)) == len(DATA)
    pipe.close()


def test_a_later_request_takes_over_from_another_process(memory: Path, clock: HandClock) -> None:
    with open_store(memory, clock) as store:
        token = opened(store).upload.upload_token

    def sender(report: Report) -> None:
        pipe = Pipe()
        with open_store(memory, clock) as store:
            link = store.upload_link(token)
            partial_id = begin(link)
            pipe.sender.sendall(DATA[:999])
            with ThreadPoolExecutor(1) as pool:
                appending = pool.submit(link.append, partial_id, 0, pipe)
                pipe.waiting.wait()
                report.acknowledge(partial_id)
                with pytest.raises(PartialTaken):
                    appending.result()
            report.acknowledge("taken")

    other = Victim(sender)
    partial_id = other.hear()
    assert partial_id is not None
    with open_store(memory, clock) as store:
        link = store.upload_link(token)
        offset = link.partial(partial_id).offset_bytes
        assert other.hear() == "taken"
        assert offset <= 999
        assert send(link, partial_id, link.partial(partial_id).offset_bytes, 5000) == 5000
    assert not other.end()


def test_who_cannot_wait_any_longer_is_told_so(
    store: Store, link: UploadLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial_id = begin(link)
    send(link, partial_id, 0, 10)
    monkeypatch.setattr(partial_files, "PATIENCE_S", 0.05)
    with store.partial_files.held(partial_id, make=False):  # it reads nothing: it is storing
        with pytest.raises(PartialBusy):
            link.partial(partial_id)
        with pytest.raises(PartialBusy):
            send(link, partial_id, 10, 20)
    assert send(link, partial_id, 10, 20) == 20


def test_many_senders_of_one_partial_lose_and_mix_nothing(store: Store, link: UploadLink) -> None:
    partial_id = begin(link)

    def push(seed: int) -> None:
        chance = random.Random(seed)
        while True:
            try:
                found = link.partial(partial_id)
                if found.finished:
                    return
                at = found.offset_bytes
                send(link, partial_id, at, min(len(DATA), at + chance.randrange(1, 9000)))
            except (OffsetMismatch, PartialBusy, PartialTaken):
                continue

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(push, seed) for seed in range(4)]:
            done.result(60)
    assert bytes_of(store, link.slots()[0]) == DATA
    assert files(store) == []


# --- how it ends


def test_giving_up_removes_record_and_bytes(store: Store, link: UploadLink) -> None:
    partial_id = begin(link)
    send(link, partial_id, 0, 100)
    link.drop_partial(partial_id)
    assert link.partials() == []
    assert files(store) == []
    for act in (link.partial, link.drop_partial):
        with pytest.raises(NotFound):
            act(partial_id)


def test_giving_up_a_finished_one_empties_its_slot(link: UploadLink) -> None:
    partial_id = begin(link)
    send(link, partial_id, 0, len(DATA))
    link.drop_partial(partial_id)
    assert link.slots() == []


def complete(store: Store, link: UploadLink) -> None:
    link.complete()


def cancel(store: Store, link: UploadLink) -> None:
    store.uploads("acme", "ada").cancel(link.upload.upload_token)


@pytest.mark.parametrize("close", [complete, cancel])
def test_an_upload_that_closes_ends_what_is_unfinished(
    store: Store, link: UploadLink, close: Callable[[Store, UploadLink], None]
) -> None:
    link.put(0, b"whole", filename="w")
    partial_id = begin(link)
    send(link, partial_id, 0, 100)
    close(store, link)
    assert files(store) == []
    closed = store.upload_link(link.upload.upload_token)
    assert closed.partials() == []
    with pytest.raises(NotFound):
        send(closed, partial_id, 100, 200)
    with pytest.raises(UploadClosed):
        begin(closed)
    audit(store)


@pytest.mark.parametrize("close", [complete, cancel])
def test_a_sender_that_the_end_of_the_upload_overtakes_fills_nothing(
    store: Store, link: UploadLink, close: Callable[[Store, UploadLink], None]
) -> None:
    link.put(0, b"whole", filename="w")
    partial_id = begin(link)

    class Closing(io.BytesIO):
        def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
            if self.tell() == 0:
                close(store, link)
            return super().readinto(buffer)

    with pytest.raises(UploadClosed):
        link.append(partial_id, 0, Closing(DATA))
    assert sweep(store).leftovers == len(files(store)) == 0
    audit(store)


def test_one_that_waits_too_long_expires_and_is_swept(
    store: Store, link: UploadLink, clock: HandClock
) -> None:
    partial_id = begin(link)
    clock.advance(HOUR_US - 1)
    send(link, partial_id, 0, 100)  # every piece starts the time anew
    clock.advance(HOUR_US - 1)
    assert link.partial(partial_id).offset_bytes == 100
    assert sweep(store) == Swept(0, 0)
    clock.advance(1)
    for act in (link.partial, lambda name: send(link, name, 100, 200)):
        with pytest.raises(PartialExpired):
            act(partial_id)
    assert files(store) == [partial_id]
    assert sweep(store) == Swept(0, 0, partials=1)
    assert sweep(store) == Swept(0, 0)
    assert files(store) == []
    with pytest.raises(NotFound):
        link.partial(partial_id)


def test_the_sweep_verb_ends_them_and_tells_how_many(memory: Path, clock: HandClock) -> None:
    with open_store(memory, clock) as store:
        link = opened(store)
        partial_id = begin(link)
        send(link, partial_id, 0, 100)
        names = store.root / "partial"
        orphan = names / partial_id.replace(partial_id[:8], "0" * 8)
        orphan.write_bytes(b"left behind")
    # The clock of the machine is months ahead of the one that the store was made with.
    swept = CliRunner().invoke(
        main, ["sweep", "--accept-clock", "--json", "--root", str(memory / "store")]
    )
    form = json.loads(swept.stdout)
    assert (form["partials"], form["leftovers"], form["partial_ids"]) == (1, 1, [partial_id])
    assert list(names.iterdir()) == []


def test_no_partial_outlives_its_upload(store: Store, clock: HandClock) -> None:
    link = opened(store, expires_in_s=60)
    partial_id = begin(link)
    send(link, partial_id, 0, 100)
    assert link.partials()[0].expires_at == link.upload.expires_at
    clock.advance(60_000_000)
    assert sweep(store) == Swept(0, 1, partials=1)
    assert files(store) == []


def test_an_upload_that_is_swept_first_takes_its_partials_along(
    store: Store, clock: HandClock
) -> None:
    link = opened(store, expires_in_s=60)
    send(link, begin(link), 0, 100)
    clock.advance(60_000_000)
    with store.catalog.read() as snapshot:
        plan = plan_sweep(snapshot, store.now_us(snapshot), keep_us=KEEP_US)
    only_the_upload = type(plan)(plan.now_us, plan.keep_us, [], [], plan.upload_ids)
    swept = execute_sweep(store.catalog, only_the_upload, partial_files=store.partial_files)
    assert swept == Swept(0, 1, partials=1)
    assert files(store) == []


def test_a_sweep_ends_events_whose_time_is_over(store: Store, clock: HandClock) -> None:
    for number, expires_at in enumerate([None, START_US + 5, START_US + 6]):
        event = Event(f"{number}", "acme", "it", None, b"{}", START_US, expires_at)
        store.catalog.write(lambda txn, event=event: txn.insert(event))  # type: ignore[misc]
    clock.advance(5)
    assert sweep(store) == Swept(0, 0, events=1)
    with store.catalog.read() as snapshot:
        assert [event.event_id for event in snapshot.range(Event, "")] == ["0", "2"]


def test_what_has_come_counts_for_the_quota_of_the_tenant(memory: Path, clock: HandClock) -> None:
    limits = LimitSettings(quota_bytes=Size(1000), quota_files=2)
    with Store.open(
        memory / "store", Settings(store=SETTINGS.store, limits=limits), clock=clock
    ) as store:
        link = opened(store)
        with pytest.raises(QuotaExceeded):
            begin(link, 1001)
        first, second = begin(link, 600), begin(link, 600)
        assert send(link, first, 0, 600) == 600
        assert usage(store) == (1, 600)
        with pytest.raises(QuotaExceeded):
            send(link, second, 0, 599)
        assert link.partial(second).offset_bytes == 0
        assert send(link, second, 0, 300) == 300
        assert usage(store) == (1, 900)
        with pytest.raises(QuotaExceeded):
            send(link, second, 300, 600)
        link.drop_partial(second)
        assert usage(store) == (1, 600)
        link.drop_partial(first)
        assert usage(store) == (0, 0)
        audit(store)


def usage(store: Store) -> tuple[int, int]:
    with store.catalog.read() as snapshot:
        found = usage_of(snapshot, "acme")
    return found.files, found.size_bytes


# --- what a crash may leave


def test_a_file_without_a_record_is_swept_and_told_by_the_doctor(
    store: Store, link: UploadLink
) -> None:
    partial_id = begin(link)
    send(link, partial_id, 0, 100)
    orphan = store.root / "partial" / partial_id.replace(partial_id[:8], "0" * 8)
    foreign = store.root / "partial" / "notes.txt"
    orphan.write_bytes(b"left behind")
    foreign.write_bytes(b"somebody's")
    assert store.partial_files.leftovers(store.catalog) == [orphan.name]
    [finding] = examine_store(store)
    assert (finding.severity, finding.mend) == ("note", "run blobcask sweep")
    assert "1 files in partial/" in finding.what
    assert sweep(store) == Swept(0, 0, leftovers=1)
    assert files(store) == [partial_id, foreign.name]
    assert send(link, partial_id, 100, len(DATA)) == len(DATA)


def test_bytes_that_were_never_recorded_are_cut_off(store: Store, link: UploadLink) -> None:
    partial_id = begin(link)
    send(link, partial_id, 0, 100)
    with open(store.root / "partial" / partial_id, "ab") as stream:
        stream.write(b"of a server that was killed" * 1000)
    assert link.partial(partial_id).offset_bytes == 100
    assert send(link, partial_id, 100, len(DATA)) == len(DATA)
    assert bytes_of(store, link.slots()[0]) == DATA


@pytest.mark.parametrize("left", [None, 99], ids=["gone", "cut short"])
def test_a_partial_that_lost_recorded_bytes_ends(
    store: Store, link: UploadLink, left: int | None
) -> None:
    partial_id = begin(link)
    send(link, partial_id, 0, 100)
    path = store.root / "partial" / partial_id
    if left is None:
        path.unlink()
    else:
        os.truncate(path, left)
    [finding] = examine_store(store)
    assert finding.severity == "damage"
    assert partial_id in finding.what
    with pytest.raises(NotFound):
        send(link, partial_id, 100, 200)
    assert link.partials() == []
    assert files(store) == []


@pytest.mark.parametrize("step", ["write", "sync_data"])
def test_a_disk_that_fills_up_keeps_the_recorded_offset(
    memory: Path, clock: HandClock, step: str
) -> None:
    full: list[str] = []
    disk = FailingDisk(errno.ENOSPC, lambda name, _: name == step and bool(full))
    with open_store(memory, clock, disk) as store:
        link = opened(store)
        partial_id = begin(link)
        send(link, partial_id, 0, 100)
        full.append("now")
        with pytest.raises(StoreFull):
            send(link, partial_id, 100, 5000)
        full.clear()
        assert (store.root / "partial" / partial_id).stat().st_size == 100
        assert link.partial(partial_id).offset_bytes == 100
        assert send(link, partial_id, 100, len(DATA)) == len(DATA)
        assert bytes_of(store, link.slots()[0]) == DATA


def test_a_disk_that_is_full_when_all_has_come_keeps_all_but_a_byte(
    memory: Path, clock: HandClock
) -> None:
    data = random.Random(3).randbytes(2 << 20)
    full: list[str] = []
    disk = FailingDisk(errno.ENOSPC, lambda name, _: name == "temporary" and bool(full))
    with open_store(memory, clock, disk) as store:
        link = opened(store)
        partial_id = begin(link, len(data))
        full.append("now")
        with pytest.raises(StoreFull):
            link.append(partial_id, 0, io.BytesIO(data))
        full.clear()
        assert link.partial(partial_id).offset_bytes == len(data) - 1
        link.append(partial_id, len(data) - 1, io.BytesIO(data[-1:]))
        assert bytes_of(store, link.slots()[0]) == data


def test_a_small_disk_that_is_really_full_gives_back_what_was_not_recorded(
    small_disk: Path, clock: HandClock
) -> None:
    with open_store(small_disk, clock) as store:
        link = opened(store)
        free = store.blobs.free_bytes()
        partial_id = begin(link, free // 3)
        filler = small_disk / "filler"
        with open(filler, "wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, free - (512 << 10))
        data = random.Random(4).randbytes(free // 3)
        with pytest.raises(StoreFull):
            link.append(partial_id, 0, io.BytesIO(data))
        at = link.partial(partial_id).offset_bytes
        assert (store.root / "partial" / partial_id).stat().st_size == at
        filler.unlink()
        link.append(partial_id, at, io.BytesIO(data[at:]))
        assert bytes_of(store, link.slots()[0]) == data


# --- any order of things


@final
class Sending(RuleBasedStateMachine):
    """A sender, cuts, wrong offsets, closes and sweeps, against what was answered."""

    @initialize(length=st.integers(1, 4000), seed=st.integers(0, 999))
    def begin(self, length: int, seed: int) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="blobcask-", dir="/dev/shm")
        self.clock = HandClock()
        self.store = open_store(Path(self.folder.name), self.clock)
        self.link = opened(self.store, max_files=1)
        self.data = random.Random(seed).randbytes(length)
        self.partial_id = begin(self.link, length)
        self.answered = 0

    @property
    def finished(self) -> bool:
        return self.answered == len(self.data)

    @rule(count=st.integers(0, 4000), shift=st.sampled_from([0, 0, 0, -1, 1, 500]))
    def piece(self, count: int, shift: int) -> None:
        at = max(0, self.answered + shift)
        piece = self.data[at : at + count]
        try:
            reached = self.link.append(
                self.partial_id, at, io.BytesIO(piece), promised_size=len(piece)
            ).offset_bytes
        except OffsetMismatch as error:
            assert (at == self.answered, error.offset_bytes) == (False, self.answered)  # noqa: PT017
        else:
            assert at == self.answered
            assert reached == at + len(piece)
            self.answered = reached

    @precondition(lambda self: not self.finished)
    @rule(count=st.integers(0, 4000))
    def cut(self, count: int) -> None:
        piece = self.data[self.answered : self.answered + count]
        with pytest.raises(ConnectionResetError):
            self.link.append(self.partial_id, self.answered, Broken(piece, ConnectionResetError()))
        self.answered = min(self.answered + len(piece), len(self.data) - 1)

    @precondition(lambda self: not self.finished)
    @rule(count=st.integers(1, 4000), right=st.booleans())
    def checked(self, count: int, right: bool) -> None:
        piece = self.data[self.answered : self.answered + count]
        digest = digest_of(piece if right else piece + b"!")
        try:
            self.link.append(
                self.partial_id, self.answered, io.BytesIO(piece), promised_digest=digest
            )
        except ChecksumMismatch:
            assert not right
        else:
            assert right
            self.answered += len(piece)

    @precondition(lambda self: not self.finished)
    @rule(garbage=st.binary(max_size=50))
    def killed(self, garbage: bytes) -> None:
        """What a killed server leaves: bytes that it had not recorded."""
        with open(self.store.root / "partial" / self.partial_id, "ab") as stream:
            stream.write(garbage)

    @rule()
    def reopened(self) -> None:
        token = self.link.upload.upload_token
        self.store.close()
        self.store = open_store(Path(self.folder.name), self.clock)
        self.link = self.store.upload_link(token)

    @rule()
    def swept(self) -> None:
        self.clock.advance(HOUR_US // 1000)  # never so many that it expires
        assert sweep(self.store) == Swept(0, 0)

    @rule()
    def asked(self) -> None:
        if not self.finished:
            assert self.link.partial(self.partial_id).offset_bytes == self.answered

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        found = self.link.partial(self.partial_id)
        assert found.offset_bytes == self.answered
        if not self.finished:
            rest = io.BytesIO(self.data[self.answered :])
            self.link.append(self.partial_id, self.answered, rest)
        [slot] = self.link.slots()
        assert slot.checksum_sha256 == hashlib.sha256(self.data).digest()
        assert bytes_of(self.store, slot) == self.data
        assert files(self.store) == []
        self.store.close()
        self.folder.cleanup()


TestSending = Sending.TestCase
TestSending.settings = settings(max_examples=25, stateful_step_count=20)


def test_the_records_of_partials_are_no_blobs_references(store: Store, link: UploadLink) -> None:
    partial_id = begin(link)
    send(link, partial_id, 0, 100)
    with store.catalog.read() as snapshot:
        record = snapshot.get(Partial, partial_id)
    assert record is not None
    assert (record.tenant_id, record.offset_bytes) == ("acme", 100)
    audit(store)
