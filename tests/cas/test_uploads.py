"""An upload from its request to its end: slots, completion, and everybody who is too late."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cas.clock import DAY_US, HOUR_US, SECOND_US
from cas.completions import Completion
from cas.config import Duration, Settings, Size, StoreSettings, UploadSettings
from cas.content import Content, look_at
from cas.digest import digest_of
from cas.errors import (
    BlobMissing,
    DigestMismatch,
    FilesRefused,
    InvalidName,
    InvalidRequest,
    KeyReused,
    NotFound,
    SizeMismatch,
    SlotTaken,
    TooLarge,
    UploadClosed,
)
from cas.once import OnceKey, step_key
from cas.records import Blob, Event, PendingUpload, StoredFile
from cas.references import parse_reference
from cas.retention import FOREVER
from cas.store import Store
from cas.sweep import execute_sweep, plan_sweep
from cas.upload_links import UploadLink
from cas.uploads import UploadRequest
from tests.audit import audit
from tests.cas.interposed import collect, interpose
from tests.clocks import KEEP_US, START_US, HandClock

SETTINGS = Settings(store=StoreSettings(grace=Duration(DAY_US), min_free=Size(0)))
PDF = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF\n"
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x06\x00\x00\x00"


@pytest.fixture
def store(memory: Path, clock: HandClock) -> Iterator[Store]:
    with Store.open(memory / "store", SETTINGS, clock=clock) as store:
        yield store


def request(store: Store, **wanted: object) -> PendingUpload:
    return store.uploads("acme", "ada").request(
        UploadRequest(**{"name": "papers", "max_files": 3, **wanted})  # type: ignore[arg-type]
    )


def opened(store: Store, **wanted: object) -> UploadLink:
    return store.upload_link(request(store, **wanted).upload_token)


def again(store: Store, link: UploadLink) -> UploadLink:
    """The same upload, as another request to the gateway opens it."""
    return store.upload_link(link.upload.upload_token)


def events(store: Store) -> list[Event]:
    with store.catalog.read() as snapshot:
        return snapshot.range(Event, "")


def outcomes(store: Store) -> list[dict[str, Any]]:
    """What the workflows that wait for uploads are told."""
    return [json.loads(event.payload) for event in events(store)]


def blob(store: Store, data: bytes) -> Blob | None:
    with store.catalog.read() as snapshot:
        return snapshot.get(Blob, digest_of(data))


def sweep(store: Store) -> int:
    with store.catalog.read() as snapshot:
        plan = plan_sweep(snapshot, store.now_us(snapshot), keep_us=KEEP_US)
    return execute_sweep(store.catalog, plan).uploads


def read(store: Store, file: StoredFile) -> bytes:
    with open(store.opener.here(file.checksum_sha256), "rb") as stream:
        return stream.read()


# --- asking


def test_a_request_is_pending_and_its_token_opens_it(store: Store) -> None:
    upload = request(store, allowed_types=[".PDF", "png"], prompt="please", expires_in_s=60)
    assert upload.status == "pending"
    assert len(upload.upload_token) == 8
    assert upload.upload_token.isalnum()
    assert upload.allowed_types == ["pdf", "png"]
    assert upload.event_name == f"upload_{upload.upload_id}"
    assert upload.expires_at == START_US + 60 * SECOND_US
    assert request(store).expires_at == START_US + 24 * HOUR_US  # default_expiry_hours
    link = store.upload_link(upload.upload_token)
    assert link.upload == upload
    assert link.slots() == []


@pytest.mark.parametrize(
    "wanted",
    [
        {"max_files": 0},
        {"max_files": 1001},
        {"max_size_bytes": -1},
        {"prompt": "x" * 4001},
        {"expires_in_s": 0},
        {"expires_in_s": 367 * 86_400},
        {"allowed_types": ["tar.gz"]},
        {"allowed_types": ["x" * 17]},
        {"allowed_types": [""]},
        {"allowed_types": ["pdf"] * 51},
        {"callback_url": "ftp://example.org/"},
        {"callback_url": "https://"},
        {"callback_url": "javascript:alert(1)"},
        {"redirect_url": "http://[::1"},
        {"redirect_url": "https://example.org/" + "x" * 2000},
    ],
)
def test_a_wrong_request_is_refused(store: Store, wanted: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        request(store, **wanted)
    assert store.uploads("acme", "ada").list().items == []


@pytest.mark.parametrize("wanted", [{"name": "a/b"}, {"name": ""}, {"run": "a b"}])
def test_a_wrong_name_is_refused(store: Store, wanted: dict[str, object]) -> None:
    with pytest.raises(InvalidName):
        request(store, **wanted)


@pytest.mark.parametrize("token", ["", "unknown1", "x" * 1000, "../../..", "a\x00b"])
def test_an_unknown_token_opens_nothing(store: Store, token: str) -> None:
    request(store)
    with pytest.raises(NotFound):
        store.upload_link(token)


def test_a_foreign_upload_is_as_absent_as_an_unknown_one(store: Store) -> None:
    upload = request(store)
    others = store.uploads("other", "bob")
    said = set()
    for token in (upload.upload_token, "unknown1"):
        for ask in (others.get, others.cancel):
            with pytest.raises(NotFound) as error:
                ask(token)
            said.add(str(error.value).replace(token, "TOKEN"))
    assert said == {"no upload 'TOKEN'"}
    assert others.list().items == []
    assert store.uploads("acme", "ada").get(upload.upload_token).upload == upload


def test_uploads_are_listed_page_by_page_and_by_status(store: Store, clock: HandClock) -> None:
    uploads = store.uploads("acme", "ada")
    made = []
    for number in range(6):
        clock.advance(SECOND_US)
        made.append(request(store, expires_in_s=3600 if number < 2 else 7200))
    uploads.cancel(made[5].upload_token)
    newest = [upload.upload_id for upload in made[::-1]]
    first = uploads.list(limit=4)
    rest = uploads.list(limit=4, cursor=first.next_cursor)
    assert [upload.upload_id for upload in first.items + rest.items] == newest
    assert rest.next_cursor is None
    assert [u.upload_id for u in uploads.list(status="cancelled").items] == newest[:1]
    clock.advance(3600 * SECOND_US)
    # Two are over, though no sweep has said so yet: they are no longer shown as pending.
    assert [u.upload_id for u in uploads.list(status="pending").items] == newest[1:4]
    assert [u.status for u in uploads.list().items[-2:]] == ["expired", "expired"]
    assert uploads.get(made[0].upload_token).upload.status == "expired"
    sweep(store)
    assert [u.upload_id for u in uploads.list(status="expired").items] == newest[4:]


# --- slots


def test_a_slot_is_filled_replaced_and_emptied(store: Store, clock: HandClock) -> None:
    link = opened(store)
    slot = link.put(1, b"first", filename="a.txt", content_type="text/plain")
    assert (slot.file_index, slot.filename, slot.size_bytes) == (1, "a.txt", 5)
    assert slot.checksum_sha256 == digest_of(b"first")
    link.put(0, b"zero", filename="z.txt")
    replaced = link.put(1, b"second", filename="b.txt")
    assert [slot.file_index for slot in link.slots()] == [0, 1]
    assert link.slots()[1] == replaced
    first = blob(store, b"first")
    assert first is not None
    assert first.refcount == 0
    assert link.put(1, b"second", filename="b.txt") == replaced
    second = blob(store, b"second")
    assert second is not None
    assert second.refcount == 1
    link.empty(1)
    link.empty(1)
    assert [slot.file_index for slot in link.slots()] == [0]
    clock.advance(DAY_US - 1)
    assert collect(store) == 0
    clock.advance(2)
    assert collect(store) == 2
    assert audit(store).orphans == []


@pytest.mark.parametrize("index", [-1, 3, 1 << 40])
def test_there_are_as_many_slots_as_were_asked_for(store: Store, index: int) -> None:
    link = opened(store)
    with pytest.raises(NotFound):
        link.put(index, b"x", filename="x")
    with pytest.raises(NotFound):
        link.empty(index)


def test_a_slot_that_refuses_bytes_is_as_before(store: Store) -> None:
    link = opened(store, max_size_bytes=10)
    before = link.put(0, b"0123456789", filename="full.txt")
    with pytest.raises(TooLarge):
        link.put(0, b"01234567890", filename="x")
    with pytest.raises(TooLarge):
        link.put(0, io.BytesIO(bytes(1 << 20)), filename="x")
    with pytest.raises(TooLarge):
        link.put(0, b"x", filename="x", promised_size=11)
    with pytest.raises(SizeMismatch):
        link.put(0, b"abc", filename="x", promised_size=4)
    with pytest.raises(DigestMismatch):
        link.put(0, b"abc", filename="x", promised_digest=digest_of(b"abd"))
    for name in ("a/b", "", "a\x00", "a\u202eb", "x" * 1000):
        with pytest.raises(InvalidName):
            link.put(0, b"abc", filename=name)
    assert link.slots() == [before]
    assert audit(store).orphans == []


def test_the_limit_of_the_store_holds_for_slots(memory: Path, clock: HandClock) -> None:
    settings = Settings(
        store=StoreSettings(min_free=Size(0)), uploads=UploadSettings(max_file_size_mb=1)
    )
    with Store.open(memory / "small", settings, clock=clock) as store:
        assert opened(store, max_size_bytes=0).size_limit_bytes == 1 << 20
        assert opened(store, max_size_bytes=5).size_limit_bytes == 5
        assert opened(store, max_size_bytes=5 << 20).size_limit_bytes == 1 << 20
        with pytest.raises(TooLarge):
            opened(store).put(0, bytes((1 << 20) + 1), filename="x")


def test_slots_are_filled_at_once(store: Store) -> None:
    link = opened(store, max_files=16)
    start = threading.Barrier(16)

    def fill(number: int) -> None:
        mine = again(store, link)
        start.wait(30)
        mine.put(number, b"%d" % (number % 4) * 1000, filename=f"{number}.txt")

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(fill, range(16)))
    assert len(link.complete().files) == 16
    assert audit(store).orphans == []


def test_the_last_to_fill_a_slot_has_it(store: Store) -> None:
    link = opened(store)
    start = threading.Barrier(8)

    def fill(number: int) -> bytes:
        start.wait(30)
        data = b"%d" % number
        link.put(0, data, filename=f"{number}.txt")
        return data

    with ThreadPoolExecutor(8) as pool:
        put = set(pool.map(fill, range(8)))
    [slot] = link.slots()
    assert slot.checksum_sha256 in {digest_of(data) for data in put}
    held = [data for data in put if (b := blob(store, data)) is not None and b.refcount]
    assert len(held) == 1
    audit(store)


# --- completing


def test_completing_makes_files_and_the_event_that_wakes_the_workflow(store: Store) -> None:
    link = opened(store, run="run-7", retention=FOREVER)
    link.put(2, PDF, filename="b.pdf", content_type="application/octet-stream")
    link.put(0, b"plain words", filename="a.txt", content_type="text/plain")
    done = link.complete()
    assert [file.original_filename for file in done.files] == ["a.txt", "b.pdf"]
    assert [read(store, file) for file in done.files] == [b"plain words", PDF]
    text, pdf = done.files
    assert text.storage_ref == f"hwy://uploads/acme/run-7/{digest_of(b'plain words').hex()}.txt"
    assert (pdf.content_type, text.content_type) == ("application/pdf", "text/plain")
    assert (pdf.name, pdf.expires_at) == ("papers", None)
    assert done.upload.status == "completed"
    assert done.upload.completed_at == START_US
    [event] = events(store)
    assert (event.tenant_id, event.event_name) == ("acme", link.upload.event_name)
    assert json.loads(event.payload) == {
        "files": [
            {
                "storage_ref": file.storage_ref,
                "filename": file.original_filename,
                "content_type": file.content_type,
                "size_bytes": file.size_bytes,
                "checksum_sha256": file.checksum_sha256.hex(),
            }
            for file in done.files
        ],
        "uploaded_at": "2026-01-01T00:00:00Z",
    }
    assert store.files("acme", "ada").list().items[-1] in done.files
    assert again(store, link).completion() == done
    audit(store)


def closed_to(link: UploadLink) -> set[str]:
    """In which state everything that changes an upload says it is."""
    told = set()
    for change in (
        lambda: link.put(0, b"late", filename="late"),
        lambda: link.empty(0),
        link.complete,
    ):
        with pytest.raises(UploadClosed) as closed:
            change()
        told.add(closed.value.state)
    return told


@pytest.mark.parametrize("reopened", [True, False])
def test_a_completed_upload_is_closed(store: Store, reopened: bool) -> None:
    link = opened(store)
    link.put(0, b"abc", filename="a")
    late = again(store, link)
    done = link.complete()
    if reopened:
        late = again(store, link)
    assert closed_to(late) == {"completed"}
    with pytest.raises(UploadClosed):
        store.uploads("acme", "ada").cancel(link.upload.upload_token)
    assert late.completion() == done
    assert blob(store, b"late") is None
    assert len(events(store)) == 1
    assert audit(store).orphans == []


@pytest.mark.parametrize("reopened", [True, False])
@pytest.mark.parametrize("filled", [True, False])
def test_a_cancelled_upload_is_closed_and_lets_go_of_its_bytes(
    store: Store, clock: HandClock, reopened: bool, filled: bool
) -> None:
    link = opened(store)
    if filled:
        link.put(0, b"abc", filename="a")
    late = again(store, link)
    cancelled = store.uploads("acme", "ada").cancel(link.upload.upload_token)
    assert cancelled.status == "cancelled"
    if reopened:
        late = again(store, link)
    assert closed_to(late) == {"cancelled"}
    with pytest.raises(UploadClosed):
        late.completion()
    assert late.slots() == []
    assert outcomes(store) == [{"status": "cancelled", "files": []}]
    clock.advance(DAY_US + 1)
    assert collect(store) == (1 if filled else 0)
    assert audit(store).orphans == []


@pytest.mark.parametrize("swept", [True, False])
@pytest.mark.parametrize("reopened", [True, False])
@pytest.mark.parametrize("filled", [True, False])
def test_an_upload_expires(
    store: Store, clock: HandClock, swept: bool, reopened: bool, filled: bool
) -> None:
    link = opened(store, expires_in_s=3600)
    if filled:
        link.put(0, b"abc", filename="a")
    clock.advance(HOUR_US - 1)
    assert again(store, link).upload.status == "pending"
    assert sweep(store) == 0
    clock.advance(1)
    late = again(store, link) if reopened else link
    if swept:
        assert sweep(store) == 1
    assert again(store, link).upload.status == "expired"
    if filled or reopened or swept:
        assert closed_to(late) == {"expired"}
    with pytest.raises(UploadClosed):
        store.uploads("acme", "ada").cancel(link.upload.upload_token)
    sweep(store)
    assert late.slots() == []
    assert outcomes(store) == [{"status": "expired", "files": []}]
    clock.advance(DAY_US + 1)
    assert collect(store) == (1 if filled else 0)
    assert audit(store).orphans == []


def test_nothing_uploaded_is_nothing_to_complete(store: Store) -> None:
    link = opened(store)
    with pytest.raises(FilesRefused) as refused:
        link.complete()
    assert "no file" in str(refused.value)
    assert again(store, link).upload.status == "pending"
    link.put(0, b"", filename="empty.txt")
    assert link.complete().files[0].size_bytes == 0


def test_a_refusal_names_every_file_and_can_be_mended(store: Store) -> None:
    link = opened(store, allowed_types=["pdf", "jpg"])
    link.put(0, PDF, filename="really.pdf")
    link.put(1, PNG, filename="not-really.pdf", content_type="application/pdf")
    link.put(2, b"words", filename="words.jpg", content_type="image/jpeg")
    with pytest.raises(FilesRefused) as refused:
        link.complete()
    assert [(index, name) for index, name, _ in refused.value.reasons] == [
        (1, "not-really.pdf"),
        (2, "words.jpg"),
    ]
    assert "PNG" in refused.value.reasons[0][2]
    assert "pdf or jpg" in refused.value.reasons[0][2]
    assert again(store, link).upload.status == "pending"
    assert events(store) == []
    assert store.files("acme", "ada").list().items == []
    link.put(1, PDF + b"%", filename="really-now.pdf")
    link.empty(2)
    assert len(link.complete().files) == 2


def test_slots_with_the_same_bytes_are_one_file(store: Store) -> None:
    link = opened(store)
    for index in range(3):
        link.put(index, b"same", filename=f"{index}.txt")
    done = link.complete()
    assert len({file.file_id for file in done.files}) == 1
    assert len(done.files) == 3
    same = blob(store, b"same")
    assert same is not None
    assert same.refcount == 1
    assert again(store, link).completion() == done
    audit(store)


def test_a_file_is_told_under_the_name_it_was_sent_with(store: Store) -> None:
    first = opened(store)
    first.put(0, b"the same", filename="first.txt")
    first.complete()
    second = opened(store)
    second.put(0, b"the same", filename="second.txt")
    done = second.complete()
    assert done.filenames == ["second.txt"]
    assert again(store, second).completion().filenames == ["second.txt"]
    told = {event.event_name: json.loads(event.payload) for event in events(store)}
    (file,) = told[second.upload.event_name]["files"]
    assert file["filename"] == "second.txt"


def test_deleting_the_file_of_an_upload_frees_its_bytes(store: Store, clock: HandClock) -> None:
    link = opened(store)
    link.put(0, b"abc", filename="a")
    link.put(1, b"def", filename="b")
    [first, second] = link.complete().files
    store.files("acme", "ada").delete(parse_reference(first.storage_ref))
    clock.advance(DAY_US + 1)
    assert collect(store) == 1
    assert blob(store, b"abc") is None
    assert read(store, second) == b"def"
    assert again(store, link).completion().files == [second]
    assert audit(store).orphans == []


def test_of_two_who_complete_one_wins_and_the_other_learns_the_same_files(store: Store) -> None:
    for _ in range(10):
        link = opened(store)
        link.put(0, b"abc", filename="a")
        start = threading.Barrier(4)

        def complete(
            _: int, link: UploadLink = link, start: threading.Barrier = start
        ) -> Completion | None:
            mine = again(store, link)
            start.wait(30)
            try:
                return mine.complete()
            except UploadClosed:
                return None

        with ThreadPoolExecutor(4) as pool:
            done = list(pool.map(complete, range(4)))
        [won] = [completion for completion in done if completion]
        assert again(store, link).completion() == won
    assert len(events(store)) == 10
    audit(store)


# --- while completing


def during_completion(link: UploadLink, happens: Callable[[], object]) -> UploadLink:
    """Let something happen after the slots were judged and before they become files."""
    interpose(link).append(happens)
    return link


def test_a_slot_replaced_while_completing_is_included_as_it_is_then(
    store: Store, clock: HandClock
) -> None:
    link = opened(store, allowed_types=["pdf"])
    link.put(0, PDF, filename="old.pdf")
    other = again(store, link)
    during_completion(link, lambda: other.put(0, PDF + b"% new", filename="new.pdf"))
    [file] = link.complete().files
    assert read(store, file) == PDF + b"% new"
    assert file.original_filename == "new.pdf"
    clock.advance(DAY_US + 1)
    assert collect(store) == 1
    assert audit(store).orphans == []


def test_a_slot_replaced_by_a_wrong_type_while_completing_is_refused(store: Store) -> None:
    link = opened(store, allowed_types=["pdf"])
    link.put(0, PDF, filename="old.pdf")
    other = again(store, link)
    during_completion(link, lambda: other.put(0, PNG, filename="old.pdf"))
    with pytest.raises(FilesRefused):
        link.complete()
    assert again(store, link).upload.status == "pending"


def test_slots_filled_and_emptied_while_completing_count_as_they_are_then(store: Store) -> None:
    link = opened(store)
    link.put(0, b"a", filename="a")
    other = again(store, link)

    def change() -> None:
        other.put(1, b"b", filename="b")
        other.empty(0)

    during_completion(link, change)
    assert [file.original_filename for file in link.complete().files] == ["b"]


def test_all_slots_emptied_while_completing_is_refused(store: Store) -> None:
    link = opened(store)
    link.put(0, b"a", filename="a")
    other = again(store, link)
    during_completion(link, lambda: other.empty(0))
    with pytest.raises(FilesRefused):
        link.complete()


@pytest.mark.parametrize("filled", [True, False])
def test_cancelled_while_completing(store: Store, filled: bool) -> None:
    link = opened(store)
    link.put(0, b"a", filename="a")
    during_completion(link, lambda: store.uploads("acme", "ada").cancel(link.upload.upload_token))
    with pytest.raises(UploadClosed) as closed:
        link.complete()
    assert closed.value.state == "cancelled"
    assert outcomes(store) == [{"status": "cancelled", "files": []}]


def test_completed_while_completing(store: Store) -> None:
    link = opened(store)
    link.put(0, b"a", filename="a")
    other = again(store, link)
    during_completion(link, other.complete)
    with pytest.raises(UploadClosed) as closed:
        link.complete()
    assert closed.value.state == "completed"
    assert len(events(store)) == 1
    assert len(link.completion().files) == 1


def test_filled_while_another_completes(store: Store) -> None:
    link = opened(store)
    link.put(0, b"a", filename="a")
    late = again(store, link)
    interpose(store.adoption).append(link.complete)
    with pytest.raises(UploadClosed) as closed:
        late.put(0, b"late", filename="late")
    assert closed.value.state == "completed"
    assert [read(store, file) for file in link.completion().files] == [b"a"]
    assert audit(store).orphans == []


def test_a_slot_replaced_and_collected_while_its_content_is_judged(
    store: Store, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = opened(store, expires_in_s=10 * 86_400)
    link.put(0, b"old", filename="old")
    other = again(store, link)

    def look_late(path: Path) -> Content:
        monkeypatch.undo()
        other.put(0, b"new", filename="new")
        clock.advance(DAY_US + 1)
        assert collect(store) == 1
        return look_at(path)

    monkeypatch.setattr("cas.upload_links.look_at", look_late)
    assert [read(store, file) for file in link.complete().files] == [b"new"]


def test_a_slot_whose_bytes_are_gone_says_so(store: Store) -> None:
    link = opened(store)
    link.put(0, b"abc", filename="a")
    store.blobs.path(digest_of(b"abc")).unlink()
    with pytest.raises(BlobMissing):
        link.complete()
    link.put(0, b"abc", filename="a")
    assert len(link.complete().files) == 1


def test_a_tokens_bearer_never_learns_by_time_what_the_tenant_has(store: Store) -> None:
    store.files("acme", "ada").put(b"abc", name="it")
    link = opened(store)
    met = []
    meeting = store.adoption.meeting

    def noting(*arguments: object) -> object:
        met.append(meeting(*arguments))  # type: ignore[arg-type]
        return met[-1]

    store.adoption.meeting = noting  # type: ignore[assignment, method-assign]
    link.put(0, b"abc", filename="a")
    assert [meeting.value for meeting in met] == ["rehearse"]


class Unread:
    """A body that nobody may read."""

    def readinto(self, _buffer: memoryview, /) -> int:
        raise AssertionError("it was read")


def test_a_body_that_cannot_be_kept_is_refused_unread(store: Store) -> None:
    uploads = store.uploads("acme", "ada")
    token = uploads.request(UploadRequest("papers", max_files=3)).upload_token
    link = store.upload_link(token)
    link.put(0, b"x", filename="a.txt")
    link.begin_partial(1, "b.txt", None, 10)
    for index in (0, 1):
        with pytest.raises(SlotTaken):
            link.put(index, Unread(), filename="c.txt", only_free=True)
    link.put(0, b"y", filename="a.txt")
    uploads.cancel(token)
    with pytest.raises(UploadClosed):  # opened before it was cancelled
        link.put(2, Unread(), filename="c.txt")


def test_a_body_for_an_upload_that_expired_since_it_was_opened_is_refused_unread(
    store: Store, clock: HandClock
) -> None:
    upload = store.uploads("acme", "ada").request(UploadRequest("papers", expires_in_s=60))
    link = store.upload_link(upload.upload_token)
    clock.advance(61 * SECOND_US)
    with pytest.raises(UploadClosed):
        link.put(0, Unread(), filename="a.txt")


# --- the same request, made again


def asked_for(store: Store, key: OnceKey, name: str = "papers", tenant: str = "acme") -> str:
    return store.uploads(tenant, "ada").request(UploadRequest(name), key).upload_id


def test_a_key_makes_one_upload_however_often_it_is_used(store: Store) -> None:
    key = OnceKey("uploads", "k1", b"papers")
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: asked_for(store, key), range(24)))
    assert len(set(made)) == 1
    assert [upload.upload_id for upload in store.uploads("acme", "ada").list().items] == made[:1]


def test_a_key_for_another_request_is_refused_and_makes_nothing(store: Store) -> None:
    asked_for(store, OnceKey("uploads", "k1", b"papers"))
    with pytest.raises(KeyReused) as refused:
        asked_for(store, OnceKey("uploads", "k1", b"pictures"), "pictures")
    assert refused.value.key == "k1"
    assert [upload.name for upload in store.uploads("acme", "ada").list().items] == ["papers"]


def test_keys_belong_to_a_tenant_and_a_scope(store: Store) -> None:
    keys = [OnceKey(scope, "k1") for scope in ("uploads", "run:r1")]
    made = {asked_for(store, key, tenant=tenant) for key in keys for tenant in ("acme", "other")}
    assert len(made) == 4


def test_a_key_is_remembered_by_a_store_that_opens_anew_and_shows_how_the_upload_is_now(
    memory: Path, clock: HandClock
) -> None:
    key = step_key("r1", "collect", "upload")
    with Store.open(memory / "store", SETTINGS, clock=clock) as store:
        first = store.uploads("acme", "ada").request(UploadRequest("papers"), key)
        store.uploads("acme", "ada").cancel(first.upload_token)
    clock.advance(400 * DAY_US)
    with Store.open(memory / "store", SETTINGS, clock=clock) as store:
        again = store.uploads("acme", "ada").request(UploadRequest("papers"), key)
    assert (again.upload_id, again.status) == (first.upload_id, "cancelled")


def test_a_request_that_is_refused_uses_no_key_up(store: Store) -> None:
    key = OnceKey("uploads", "k1", b"papers")
    with pytest.raises(InvalidRequest):
        store.uploads("acme", "ada").request(UploadRequest("papers", max_files=0), key)
    assert asked_for(store, OnceKey("uploads", "k1", b"better"))
