"""A wrong clock shortens nobody's term, however wrong it is and however it ends (invariant 10)."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from cas.catalog import Transaction
from cas.cli import main
from cas.clock import DAY_US, HOUR_US, SECOND_US, SystemClock, parse_rfc3339
from cas.config import Duration, Settings, Size, StoreSettings
from cas.dating import CLOCK_SEEN, Dated, any_undated, date, date_all, keep_up
from cas.errors import NotFound, UploadClosed
from cas.events import IN_VAIN_US, claim, publish, subscribe
from cas.files import Files, PutItem
from cas.forgetting import Forgotten
from cas.forms import stored_file
from cas.once import OnceKey, once
from cas.records import PENDING, Approval, Mark, StoredFile, Subscription, Webhook
from cas.references import parse_reference
from cas.remote.values import stored_file as received
from cas.retention import parse_retention
from cas.store import Store
from cas.sweep import Swept, execute_sweep, plan_sweep
from cas.uploads import UploadRequest
from cas.vitals import vitals_of
from tests.audit import audit
from tests.clocks import KEEP_US, START_US, HandClock
from tests.conftest import CHECKOUT

SETTINGS = Settings(store=StoreSettings(grace=Duration(DAY_US), min_free=Size(0)))
YEAR_US = 365 * DAY_US
WRONG = {"ten years ahead": START_US + 10 * YEAR_US, "behind": START_US - 10 * YEAR_US, "1970": 0}


@pytest.fixture
def store(memory: Path, clock: HandClock) -> Iterator[Store]:
    clock.trusted = False
    with Store.open(memory / "store", SETTINGS, clock=clock) as store:
        yield store
        audit(store)


@pytest.fixture
def files(store: Store) -> Files:
    return store.files("acme", "ada")


def put(files: Files, data: bytes, retention: str) -> StoredFile:
    return files.put(data, name="it", retention=parse_retention(retention))


def sweep(store: Store) -> Swept:
    with store.catalog.read() as snapshot:
        plan = plan_sweep(
            snapshot, store.now_us(snapshot), partial_files=store.partial_files, keep_us=KEEP_US
        )
    return execute_sweep(store.catalog, plan, partial_files=store.partial_files)


def again(files: Files, file: StoredFile) -> StoredFile:
    return files.stat(parse_reference(file.storage_ref))


def test_what_is_undated_is_pending_and_not_expired(store: Store, clock: HandClock) -> None:
    uploads = store.uploads("acme", "ada")
    clock.trusted = True
    uploads.request(UploadRequest("it"))
    clock.trusted = False
    clock.advance(YEAR_US)
    link = store.upload_link(uploads.request(UploadRequest("it")).upload_token)
    link.begin_partial(0, "a", None, 5)
    vitals = vitals_of(store)
    assert vitals.uploads_pending == 2
    assert vitals.queues["partials_expired"].count == 0


def test_a_file_without_an_end_yet_says_so_on_the_wire(files: Files, clock: HandClock) -> None:
    put(files, b"before", "days:1")
    clock.advance(YEAR_US)
    file = put(files, b"it", "days:1")
    form = stored_file(file)
    assert form["expires_at"] is None
    assert form["undated_since"] is not None
    assert received(dict(form)).undated_at == file.undated_at


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_stored_under_a_wrong_clock_has_its_whole_term_after_it(
    store: Store, files: Files, clock: HandClock, wrong: str
) -> None:
    before = put(files, b"before", "days:60")
    clock.time_us = WRONG[wrong]
    assert store.clock_trouble()
    during = put(files, b"during", "days:1")
    until = put(files, b"until", "until:2030-01-01T00:00:00Z")
    forever = put(files, b"forever", "forever")
    many = files.put_many([PutItem(b"many", "it")], retention=parse_retention("hours:1"))
    assert (during.expires_at, during.undated_at) == (None, START_US)
    assert (until.undated_at, forever.undated_at) == (None, None)
    assert not date_all(store.catalog)  # not yet

    clock.time_us = START_US + 20 * DAY_US  # it was wrong for so long
    assert store.clock_trouble() == ""
    assert sweep(store) == Swept(0, 0)  # even before the dating
    assert date_all(store.catalog) == Dated(files=2)
    assert again(files, during).expires_at == START_US + 21 * DAY_US
    assert again(files, many[0]).expires_at == START_US + 20 * DAY_US + HOUR_US
    assert again(files, before).expires_at == before.expires_at
    assert again(files, until) == until
    assert again(files, forever).undated_at is None
    assert not any_undated(store.catalog)
    clock.advance(DAY_US)
    assert sweep(store) == Swept(2, 0)
    with pytest.raises(NotFound):
        again(files, during)


def test_a_time_service_that_sets_the_clock_far_on_dates_from_there(
    store: Store, files: Files, clock: HandClock
) -> None:
    clock.advance(400 * DAY_US)
    file = put(files, b"one", "days:1")
    clock.trusted = True
    assert date(store.catalog) == Dated(files=1)
    assert again(files, file).expires_at == START_US + 401 * DAY_US


def test_a_clock_set_back_by_a_time_service_leaves_nothing_waiting(
    store: Store, files: Files, clock: HandClock
) -> None:
    """Catalog time is later than it really is: what is counted from it ends too late at worst."""
    clock.advance(-10 * DAY_US)
    waiting = put(files, b"one", "days:1")
    clock.trusted = True
    file = put(files, b"two", "days:1")
    assert (waiting.expires_at, file.expires_at) == (None, START_US + DAY_US)
    assert date_all(store.catalog) == Dated(files=1)
    assert again(files, waiting).expires_at == START_US + DAY_US
    assert "behind" in store.clock_trouble()  # and nothing is swept


def test_a_clock_that_is_a_moment_behind_is_no_doubt(
    store: Store, files: Files, clock: HandClock
) -> None:
    clock.advance(-60 * SECOND_US)
    assert store.clock_trouble() == ""
    assert put(files, b"one", "days:1").expires_at == START_US + DAY_US


def test_the_same_bytes_again_keep_the_longest_of_all_promises(
    store: Store, files: Files, clock: HandClock
) -> None:
    long, short = put(files, b"long", "days:90"), put(files, b"short", "hours:1")
    clock.time_us = 0
    for data in (b"long", b"short"):
        assert put(files, data, "days:1").undated_at == START_US
        put(files, data, "hours:2")
    clock.time_us = START_US + 2 * HOUR_US
    date_all(store.catalog)
    assert again(files, long) == long
    prolonged = again(files, short)
    assert (prolonged.retention_policy, prolonged.promised) == ("days:1", None)
    assert prolonged.expires_at == clock.now_us() + DAY_US


def test_forever_ends_the_wait(store: Store, files: Files, clock: HandClock) -> None:
    clock.time_us = 0
    put(files, b"one", "days:1")
    file = put(files, b"one", "forever")
    assert (file.expires_at, file.undated_at, file.retention_policy) == (None, None, "forever")
    assert not any_undated(store.catalog)


def test_an_undated_file_can_be_held_and_deleted(
    store: Store, files: Files, clock: HandClock
) -> None:
    clock.time_us = 0
    held, gone = put(files, b"held", "hours:1"), put(files, b"gone", "hours:1")
    files.hold(parse_reference(held.storage_ref), True)
    files.delete(parse_reference(gone.storage_ref))
    clock.time_us = START_US
    assert date_all(store.catalog) == Dated(files=1)
    clock.advance(2 * HOUR_US)
    assert sweep(store) == Swept(0, 0)
    assert again(files, held).hold
    files.hold(parse_reference(held.storage_ref), False)
    assert sweep(store) == Swept(1, 0)


@pytest.mark.parametrize("wrong", WRONG)
def test_an_upload_asked_for_under_a_wrong_clock_is_open_for_its_whole_term_after_it(
    store: Store, clock: HandClock, wrong: str
) -> None:
    old = store.uploads("acme", "ada").request(UploadRequest("old", expires_in_s=60))
    clock.time_us = WRONG[wrong]
    uploads = store.uploads("acme", "ada")
    upload = uploads.request(UploadRequest("a", max_files=3, expires_in_s=7200))
    other = uploads.request(UploadRequest("b", expires_in_s=7200))
    link = store.upload_link(upload.upload_token)
    link.put(0, b"acknowledged", filename="a")

    clock.time_us = START_US + 20 * DAY_US
    assert sweep(store).uploads == 1  # the one whose time is over
    with pytest.raises(UploadClosed):
        store.upload_link(old.upload_token).put(0, b"late", filename="a")
    link = store.upload_link(upload.upload_token)
    assert (link.upload.status, link.upload.expires_at) == (PENDING, clock.now_us() + 2 * HOUR_US)
    link.put(1, b"before the dating", filename="b")
    assert len(store.upload_link(other.upload_token).slots()) == 0

    assert date_all(store.catalog) == Dated(uploads=2)
    clock.advance(2 * HOUR_US - 1)
    assert sweep(store).uploads == 0
    link.put(2, b"in time", filename="c")
    assert len(link.complete().files) == 3
    clock.advance(1)
    assert sweep(store).uploads == 1


def test_an_upload_that_ends_under_a_wrong_clock_waits_for_nothing(
    store: Store, clock: HandClock
) -> None:
    clock.time_us = 0
    uploads = store.uploads("acme", "ada")
    completed, cancelled = (uploads.request(UploadRequest(name)) for name in "ab")
    link = store.upload_link(completed.upload_token)
    link.put(0, b"one", filename="a")
    done = link.complete()
    uploads.cancel(cancelled.upload_token)
    assert done.files[0].undated_at == START_US
    clock.time_us = START_US
    assert date_all(store.catalog) == Dated(files=1, workflows=2)  # the events of their ends
    again_done = store.upload_link(completed.upload_token).completion()
    assert again_done.upload.status == "completed"


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_resumable_upload_sent_under_a_wrong_clock_can_be_gone_on_with(
    store: Store, clock: HandClock, wrong: str
) -> None:
    upload = store.uploads("acme", "ada").request(UploadRequest("a", expires_in_s=60 * 24 * 3600))
    clock.time_us = WRONG[wrong]
    link = store.upload_link(upload.upload_token)
    begun = link.begin_partial(0, "a", "text/plain", 8)
    link.append(begun.partial_id, 0, io.BytesIO(b"four"))

    clock.time_us = START_US + 20 * DAY_US
    link = store.upload_link(upload.upload_token)
    assert sweep(store) == Swept(0, 0)
    assert link.partial(begun.partial_id).offset_bytes == 4
    assert date_all(store.catalog) == Dated(partials=1)
    clock.advance(SETTINGS.uploads.partial_expiry - 1)
    assert sweep(store) == Swept(0, 0)
    assert link.append(begun.partial_id, 4, io.BytesIO(b"more")).finished


def test_dating_goes_in_bounded_steps(store: Store, files: Files, clock: HandClock) -> None:
    clock.time_us = 0
    files.put_many(
        [PutItem(b"%d" % number, "it") for number in range(7)], retention=parse_retention("hours:1")
    )
    clock.time_us = START_US
    assert date(store.catalog, limit=5) == Dated(files=5)
    assert date(store.catalog, limit=5) == Dated(files=2)
    assert date(store.catalog, limit=5) == Dated()


def test_nothing_is_written_where_nothing_waits(store: Store, clock: HandClock) -> None:
    seq = store.catalog.position().seq
    clock.advance(HOUR_US)
    assert not date(store.catalog)
    assert not keep_up(store.catalog, clock, SETTINGS.sweeper.max_clock_gap)
    assert store.catalog.position().seq == seq


def test_a_store_that_rests_for_years_believes_its_own_right_clock(
    store: Store, files: Files, clock: HandClock
) -> None:
    gap_us = SETTINGS.sweeper.max_clock_gap
    for _ in range(100):
        clock.advance(DAY_US)
        assert keep_up(store.catalog, clock, gap_us)
        assert not keep_up(store.catalog, clock, gap_us)
    assert store.clock_trouble() == ""
    clock.advance(gap_us + SECOND_US)
    assert not keep_up(store.catalog, clock, gap_us)  # that is a jump, not a rest
    assert "ahead" in store.clock_trouble()
    with store.catalog.read() as snapshot:
        assert snapshot.get(Mark, CLOCK_SEEN) == Mark(CLOCK_SEEN, "2026-04-11T00:00:00Z")


def test_accepting_the_clock_dates_what_waits_from_that_moment(
    memory: Path, clock: HandClock
) -> None:
    """An operator says so, months after the last write on a machine without a time service."""
    root = memory / "store"
    with Store.open(root, SETTINGS, clock=clock) as store:
        old = put(store.files("acme", "ada"), b"old", "days:1")
        clock.trusted, clock.time_us = False, 0
        file = put(store.files("acme", "ada"), b"one", "days:3650")
    swept = CliRunner().invoke(main, ["sweep", "--accept-clock", "--json", "--root", str(root)])
    form = json.loads(swept.stdout)
    assert form["dated"] == {"files": 1, "uploads": 0, "partials": 0, "workflows": 0}
    assert form["references"] == [old.storage_ref]
    with Store.open(root) as store:
        dated = again(store.files("acme", "ada"), file)
        assert dated.expires_at is not None
        left_us = dated.expires_at - SystemClock().now_us()
        assert 3649 * DAY_US < left_us <= 3650 * DAY_US


# --- real processes under a clock that is really wrong


@pytest.mark.parametrize("wrong", ["+3650d", "-3650d", "1970-01-02 00:00:00"])
def test_real_processes_under_a_wrong_clock_end_nothing_and_date_what_came(
    root: Path, program: Callable[[str], str], wrong: str
) -> None:
    if wrong.startswith("+") and SystemClock().synchronised():
        pytest.skip("the kernel vouches for its clock here, and faketime cannot change that")
    faketime = [program("faketime"), "-f" if wrong[0] in "+-" else "", wrong]

    def blobcask(*words: str, under: list[str] | None = None) -> Any:
        made = subprocess.run(
            [*filter(None, under or []), sys.executable, "-m", "cas", *words, "--json"],
            check=False, capture_output=True, text=True, cwd=CHECKOUT,
            env={**os.environ, "BLOBCASK_STORE__ROOT": str(root / "store")},
        )  # fmt: skip
        assert made.returncode == 0 or under, made.stderr
        return (made.returncode, made.stderr) if words[0] == "sweep" else json.loads(made.stdout)

    source = root / "it.txt"
    source.write_text("before")
    before = blobcask("put", str(source), "--retention", "days:60")
    source.write_text("during")
    during = blobcask("put", str(source), "--retention", "days:1", under=faketime)
    code, told = blobcask("sweep", under=faketime)
    assert code != 0
    assert "nothing was removed: the clock is" in told
    assert blobcask("sweep")[0] == 0
    assert len(blobcask("ls")["files"]) == 2
    with Store.open(root / "store") as store:
        files = store.files("default", "ada")
        kept, dated = (
            files.stat(parse_reference(form["files"][0]["storage_ref"]))
            for form in (before, during)
        )
    now_us = SystemClock().now_us()
    assert dated.expires_at is not None
    assert timedelta(hours=23) < timedelta(microseconds=dated.expires_at - now_us)
    assert dated.expires_at <= now_us + DAY_US
    assert kept.expires_at is not None
    assert abs(kept.expires_at - kept.created_at - 60 * DAY_US) < SECOND_US
    assert parse_rfc3339("2020-01-01T00:00:00Z") < dated.created_at <= now_us


# --- what workflows wait for


def subscribed(store: Store, step: str, timeout_us: int | None = HOUR_US) -> Subscription:
    return store.catalog.write(
        lambda txn: subscribe(txn, "acme", "run-1", step, "paid", None, timeout_us)
    )


def claims(store: Store, wait: Subscription) -> Subscription:
    def change(txn: Transaction) -> Subscription:
        found = txn.get(Subscription, wait.subscription_id)
        assert found is not None
        return claim(txn, found, DAY_US)

    return store.catalog.write(change)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wait_that_begins_under_a_wrong_clock_lasts_as_long_as_it_should(
    store: Store, clock: HandClock, wrong: str
) -> None:
    store.files("acme", "ada").put(b"x", name="x")
    clock.time_us = WRONG[wrong]
    wait = subscribed(store, "a")
    forever = subscribed(store, "b", None)
    assert (wait.open_until, forever.undated_at) == (None, None)
    assert claims(store, wait).claimed_at is None

    clock.time_us = START_US + 20 * DAY_US
    assert claims(store, wait).claimed_at is None  # even before the dating
    assert date_all(store.catalog) == Dated(workflows=1)
    clock.advance(HOUR_US - 1)
    assert claims(store, wait).claimed_at is None
    clock.advance(1)
    assert claims(store, wait).claimed_at == clock.now_us()
    assert claims(store, forever).claimed_at is None


@pytest.mark.parametrize("wrong", WRONG)
def test_what_ended_under_a_wrong_clock_is_remembered_as_long_as_it_should(
    store: Store, clock: HandClock, wrong: str
) -> None:
    wait = subscribed(store, "a")
    clock.time_us = WRONG[wrong]
    event, _ = store.catalog.write(
        lambda txn: publish(txn, "acme", "paid", b"1", open_us=2 * DAY_US)
    )
    store.catalog.write(
        lambda txn: once(txn, "acme", OnceKey("events", "a", keep_us=DAY_US), lambda: "1")
    )
    claims(store, wait)
    clock.time_us = START_US + 20 * DAY_US
    assert sweep(store).total == 0
    assert date_all(store.catalog) == Dated(workflows=3)
    assert not any_undated(store.catalog)
    clock.advance(DAY_US - 1)
    assert sweep(store).total == 0
    clock.advance(1)
    assert sweep(store).workflows == Forgotten(waits=1, keys=1)
    assert subscribed(store, "b").event_id == event.event_id
    clock.advance(DAY_US)
    assert subscribed(store, "c").event_id is None


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("begun_before", [True, False])
def test_what_was_given_to_a_wait_under_a_wrong_clock_is_kept_for_it(
    store: Store, clock: HandClock, wrong: str, begun_before: bool
) -> None:
    if begun_before:
        wait = subscribed(store, "a")
    clock.time_us = WRONG[wrong]
    if not begun_before:
        wait = subscribed(store, "a")
    event, _ = store.catalog.write(lambda txn: publish(txn, "acme", "paid", b"1"))
    clock.time_us, clock.trusted = START_US + 200 * DAY_US, True
    assert sweep(store).total == 0  # before the dating
    assert date_all(store.catalog) == Dated(workflows=2)
    assert not any_undated(store.catalog)
    clock.advance(30 * DAY_US - 1)
    assert sweep(store).workflows == Forgotten()
    assert claims(store, wait).event_id == event.event_id


def test_a_wait_that_was_over_under_a_wrong_clock_tells_so_for_as_long_as_it_should(
    store: Store, clock: HandClock
) -> None:
    def subscribed_with(run: str, step: str) -> Subscription:
        return store.catalog.write(lambda txn: subscribe(txn, "acme", run, step, "paid", "k", None))

    client = subscribed_with("direct", "waiter:a")
    clock.time_us = 0
    subscribed_with("run-1", "a")  # takes the key
    clock.time_us, clock.trusted = START_US + 200 * DAY_US, True
    assert sweep(store).total == 0
    assert date_all(store.catalog) == Dated(workflows=1)
    clock.advance(IN_VAIN_US - 1)
    assert sweep(store).total == 0
    assert claims(store, client).event_id is None
    clock.advance(IN_VAIN_US)
    assert sweep(store).workflows == Forgotten(waits=1)


def test_approvals_and_webhooks_are_dated_with_the_rest(store: Store, clock: HandClock) -> None:
    """Their terms count on, from the moment in which the clock is believed again."""
    term_us = 3 * DAY_US
    approval = Approval(
        "a", "acme", "run-1", "pay", "Pay?", "", ["ada"], False, None, PENDING, START_US, "run",
        START_US + term_us, None, undated_at=START_US,
    )  # fmt: skip
    closed = msgspec.structs.replace(
        approval, approval_id="b", status="approved", forget_at=START_US + term_us
    )
    webhook = Webhook(
        "a", "acme", "run-1", "push", "github", "s", b"{}", "pushed", None, [], False, START_US,
        "run", START_US + term_us, undated_at=START_US,
    )  # fmt: skip

    def change(txn: Transaction) -> None:
        for record in (approval, closed, webhook):
            txn.insert(record)

    store.catalog.write(change)
    clock.advance(5 * DAY_US)
    assert date(store.catalog) == Dated(workflows=3)
    ends_us = clock.now_us() + term_us
    with store.catalog.read() as snapshot:
        opened, ended = snapshot.range(Approval, "")
        [called] = snapshot.range(Webhook, "")
    assert (opened.expires_at, opened.open_until, opened.forget_at) == (ends_us, ends_us, None)
    assert (ended.open_until, ended.forget_at) == (None, ends_us)
    assert called.expires_at == ends_us
    assert sweep(store).total == 0
    clock.advance(term_us)
    assert sweep(store).workflows == Forgotten(approvals=2, webhooks=1)
