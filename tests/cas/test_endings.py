"""A run ends for everybody at once, and what ends with it ends in portions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cas.catalog import Transaction
from cas.clock import DAY_US
from cas.config import Settings, Size, StoreSettings
from cas.endings import PORTION, VAIN_MAX, end, let_go
from cas.errors import NoWaitingWorkflow, TooManyKept
from cas.events import NO_LIMIT, Room, append_event, claim, is_waiting, post, publish, subscribe
from cas.forgetting import Forgotten
from cas.once import once, step_key
from cas.records import (
    CANCELLED,
    COMPLETED,
    EVENT_BYTES,
    PENDING,
    RUNNING,
    WAITING,
    Approval,
    Event,
    PendingUpload,
    Record,
    Run,
    Step,
    Subscription,
    UploadFile,
    Webhook,
)
from cas.store import Store
from cas.sweep import execute_sweep, plan_sweep
from cas.totals import kept_of
from cas.uploads import UploadRequest
from tests.audit import audit
from tests.clocks import KEEP_US, START_US, HandClock

RUN = "run-1"
ACTOR = "ending"


@pytest.fixture
def store(memory: Path, clock: HandClock) -> Iterator[Store]:
    settings = Settings(store=StoreSettings(min_free=Size(0)))
    with Store.open(memory / "store", settings, clock=clock) as store:
        for name in (RUN, "run-2"):
            inserted(store, Run(name, "acme", "it", RUNNING, START_US, "ada"))
        yield store
        audit(store)


def inserted(store: Store, *records: Record) -> None:
    def change(txn: Transaction) -> None:
        for record in records:
            txn.insert(record)

    store.catalog.write(change)


def wait(
    store: Store,
    step: str,
    name: str = "paid",
    key: str | None = None,
    *,
    run: str = RUN,
    timeout_us: int | None = None,
) -> Subscription:
    return store.catalog.write(lambda txn: subscribe(txn, "acme", run, step, name, key, timeout_us))


def waits(store: Store, count: int) -> None:
    """So many steps of the run wait."""
    for start in range(0, count, PORTION):

        def change(txn: Transaction, start: int = start) -> None:
            for number in range(start, min(start + PORTION, count)):
                subscribe(txn, "acme", RUN, f"w#{number}", f"never-{number % 7}", None, None)
                txn.insert(Step(RUN, "w", f"{number}", WAITING, 1, START_US))

        store.catalog.write(change)


def now(store: Store, wait: Subscription) -> Subscription | None:
    with store.catalog.read() as snapshot:
        return snapshot.get(Subscription, wait.subscription_id)


def ended(store: Store, status: str = CANCELLED) -> Run:
    """The run, which has ended, and with it as much as goes into one transaction."""

    def change(txn: Transaction) -> Run:
        run = txn.get(Run, RUN)
        assert run is not None
        over = msgspec.structs.replace(run, status=status, open=None, ended_at=txn.now_us)
        return end(txn, over, keep_us=KEEP_US)

    return store.catalog.write(change, actor=ACTOR)


def ended_whole(store: Store, status: str = CANCELLED) -> None:
    ended(store, status)
    let_go(store.catalog, RUN, ACTOR, keep_us=KEEP_US)


def of_run(store: Store, kind: type[Any]) -> list[Any]:
    with store.catalog.read() as snapshot:
        return snapshot.range(kind, "", limit=100_000)


def portions(store: Store, after_seq: int) -> list[int]:
    """How many waits, steps and slots each transaction changed."""
    return [
        sum(Counter(op[0] for op in change.ops)[kind] for kind in (Subscription, Step, UploadFile))
        for change in store.catalog.changes(after_seq)
        if change.actor == ACTOR
    ]


def seq(store: Store) -> int:
    return store.catalog.position().seq


# --- portions


def test_a_run_with_little_ends_in_one_transaction(store: Store) -> None:
    waits(store, 100)
    before = seq(store)
    assert ended(store).ending is None
    let_go(store.catalog, RUN, ACTOR, keep_us=KEEP_US)
    assert portions(store, before) == [200]
    assert of_run(store, Subscription) == []
    assert {(step.status, step.ended_at) for step in of_run(store, Step)} == {(CANCELLED, START_US)}


def test_a_run_with_much_ends_in_portions(store: Store) -> None:
    waits(store, 1700)
    before = seq(store)
    assert ended(store).ending is not None
    let_go(store.catalog, RUN, ACTOR, keep_us=KEEP_US)
    changed = portions(store, before)
    assert (sum(changed), max(changed) <= PORTION, len(changed)) == (3400, True, 7)
    assert of_run(store, Subscription) == []
    assert {step.status for step in of_run(store, Step)} == {CANCELLED}
    with store.catalog.read() as snapshot:
        assert snapshot.range(Run, "ending") == []
    again = seq(store)
    let_go(store.catalog, RUN, ACTOR, keep_us=KEEP_US)
    assert seq(store) == again, "there is nothing left to write"


def test_what_is_looked_at_in_vain_counts_as_well(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cas.endings.VAIN_MAX", PORTION)
    for number in range(PORTION + 1):
        wait(store, f"waiter:{number}", f"asked-{number}")
    assert ended(store).ending is not None
    let_go(store.catalog, RUN, ACTOR, keep_us=KEEP_US)
    with store.catalog.read() as snapshot:
        assert snapshot.range(Run, "ending") == []
    assert len(of_run(store, Subscription)) == PORTION + 1, "they are clients'"


def told(store: Store, wait: Subscription, room: Room = NO_LIMIT) -> Event:
    """What somebody posts, and the wait claims."""

    def change(txn: Transaction) -> Event:
        about = (wait.event_name, b"1" * 100, wait.correlation_key)
        event, _ = post(txn, "acme", *about, keep_us=KEEP_US, room=room)
        given = txn.get(Subscription, wait.subscription_id)
        assert given is not None
        claim(txn, given, keep_us=KEEP_US)
        return event

    return store.catalog.write(change)


def kept(store: Store) -> int:
    with store.catalog.read() as snapshot:
        return kept_of(snapshot, "acme")


def test_what_the_steps_of_a_run_were_told_goes_with_the_run(store: Store) -> None:
    """Nobody asks for it again, so it keeps no other event out."""
    room = Room(kept_bytes_max=EVENT_BYTES + 100)
    told(store, wait(store, "a"), room)
    other = wait(store, "a", "sent", run="run-2")
    with pytest.raises(TooManyKept):
        told(store, other, room)
    ended_whole(store, COMPLETED)
    assert (of_run(store, Event), kept(store)) == ([], 0)
    event = told(store, other, room)
    assert of_run(store, Event) == [event], "of a run that is open it may be asked for again"
    claimed = now(store, other)
    assert claimed is not None
    assert claimed.event_id == event.event_id


def test_what_others_were_told_as_well_stays_for_them(store: Store) -> None:
    own = store.catalog.write(lambda txn: append_event(txn, "acme", "own", {}, keep_us=KEEP_US))
    for asking in (wait(store, "a", "own"), wait(store, "vain", "nothing", timeout_us=0)):
        store.catalog.write(lambda txn, asking=asking: claim(txn, asking, KEEP_US))  # type: ignore[misc]
    client = wait(store, "waiter:me")
    event = told(store, wait(store, "b"))
    ended_whole(store, COMPLETED)
    left = now(store, client)
    assert of_run(store, Subscription) == [left]
    assert left is not None
    assert left.event_id == event.event_id
    assert {one.event_id for one in of_run(store, Event)} == {own.event_id, event.event_id}
    # The store's own event is open to other runs as before.
    assert wait(store, "a", "own", run="run-2").event_id == own.event_id


def test_what_was_claimed_goes_last_and_in_portions(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cas.endings.PORTION", 4)
    claimed = [wait(store, f"{number}", f"told-{number}") for number in range(10)]
    for one in claimed:
        told(store, one)
    waits(store, 2)
    before = seq(store)
    assert ended(store).ending is not None
    assert {now(store, one) is None for one in claimed} == {False}
    assert {step.status for step in of_run(store, Step)} == {CANCELLED}
    let_go(store.catalog, RUN, ACTOR, keep_us=KEEP_US)
    assert portions(store, before) == [4, 4, 4, 2]
    assert (of_run(store, Subscription), of_run(store, Event), kept(store)) == ([], [], 0)


def test_a_run_that_is_open_is_let_be(store: Store) -> None:
    waits(store, 3)
    let_go(store.catalog, RUN, ACTOR, keep_us=KEEP_US)
    assert len(of_run(store, Subscription)) == 3


# --- what others can act upon


def upload_of(store: Store, number: int, slots: int = 0) -> PendingUpload:
    key = step_key(RUN, f"ask#{number}", "upload")
    upload = store.uploads("acme", "ann").request(
        UploadRequest("papers", run=RUN, max_files=9), key
    )
    for slot in range(slots):
        store.upload_link(upload.upload_token).put(slot, b"x", filename="x.txt")
    return upload


def approval_of(number: int) -> Approval:
    return Approval(
        f"approval-{number}", "acme", RUN, f"key-{number}", "Pay?", "", [""], False, None, PENDING,
        START_US, "ada", START_US + DAY_US, START_US + DAY_US,
    )  # fmt: skip


def webhook_of(number: int) -> Webhook:
    return Webhook(
        f"webhook-{number}", "acme", RUN, "pay", "github", "s", b"{}", "paid", None, [], False,
        START_US, "ada", None,
    )  # fmt: skip


def test_links_approvals_and_webhooks_end_first(store: Store, clock: HandClock) -> None:
    waits(store, PORTION)
    for number in range(3):
        upload_of(store, number)
        inserted(store, approval_of(number), webhook_of(number))
    clock.advance(DAY_US // 2)
    assert ended(store).ending is not None
    assert {upload.status for upload in of_run(store, PendingUpload)} == {CANCELLED}
    assert {approval.status for approval in of_run(store, Approval)} == {CANCELLED}
    webhooks = of_run(store, Webhook)
    assert {webhook.expires_at for webhook in webhooks} == {START_US + DAY_US // 2}
    clock.advance(DAY_US // 2)
    let_go(store.catalog, RUN, ACTOR, keep_us=KEEP_US)
    assert of_run(store, Webhook) == webhooks, "they were over"


@pytest.mark.parametrize("keys", [PORTION + 1, VAIN_MAX + 1])
def test_they_end_first_however_much_the_steps_have_done(store: Store, keys: int) -> None:
    def emitted(txn: Transaction) -> None:
        for number in range(keys):
            once(txn, "acme", step_key(RUN, f"a#{number}", "event"), lambda: '["x",1]')

    store.catalog.write(emitted)
    upload_of(store, 0)
    inserted(store, approval_of(0), webhook_of(0))
    far = keys > VAIN_MAX
    assert (ended(store).ending is not None) == far
    assert [approval.status for approval in of_run(store, Approval)] == [CANCELLED]
    assert [webhook.expires_at for webhook in of_run(store, Webhook)] == [START_US]
    # Links are found by those keys alone, which are not all looked at in one transaction.
    assert [upload.status for upload in of_run(store, PendingUpload)] == [
        PENDING if far else CANCELLED
    ]
    let_go(store.catalog, RUN, ACTOR, keep_us=KEEP_US)
    assert [upload.status for upload in of_run(store, PendingUpload)] == [CANCELLED]


def test_a_completed_run_leaves_what_it_made(store: Store) -> None:
    upload_of(store, 0)
    inserted(store, approval_of(0), webhook_of(0))
    waits(store, PORTION)
    ended_whole(store, COMPLETED)
    assert [upload.status for upload in of_run(store, PendingUpload)] == [PENDING]
    assert [approval.status for approval in of_run(store, Approval)] == [PENDING]
    assert [webhook.expires_at for webhook in of_run(store, Webhook)] == [None]
    assert of_run(store, Subscription) == []


def test_the_slots_of_uploads_count_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cas.endings.PORTION", 4)
    for number in range(4):
        upload_of(store, number, slots=3)
    before = seq(store)
    ended_whole(store)
    assert portions(store, before) == [3, 3, 3, 3]
    assert {upload.status for upload in of_run(store, PendingUpload)} == {CANCELLED}


# --- judged by the run


def test_a_run_that_ends_leaves_no_wait_behind(store: Store) -> None:
    claimed = wait(store, "claimed", "told")
    told(store, claimed)
    for number in range(210):
        wait(store, f"{number}")
    other = wait(store, "a", run="run-2")
    stranger = store.catalog.write(
        lambda txn: subscribe(txn, "other", RUN, "a", "paid", None, None)
    )
    ended_whole(store)
    assert store.catalog.write(lambda txn: publish(txn, "acme", "paid", b"1"))[1] == 1
    found, foreign = now(store, other), now(store, stranger)
    assert found is not None
    assert found.event_id is not None
    assert foreign is not None
    assert is_waiting(foreign)
    assert now(store, claimed) is None
    assert len(of_run(store, Subscription)) == 2


def test_a_wait_that_an_ended_run_left_gets_no_event(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cas.endings.PORTION", 0)
    left, client = wait(store, "a"), wait(store, "waiter:me", "asked")
    ended(store)
    with pytest.raises(NoWaitingWorkflow):
        store.catalog.write(lambda txn: post(txn, "acme", "paid", b"1", None, keep_us=KEEP_US))
    assert store.catalog.write(lambda txn: publish(txn, "acme", "asked", b"1"))[1] == 1
    store.catalog.write(
        lambda txn: post(txn, "acme", "paid", b"1", None, hold_us=DAY_US, keep_us=KEEP_US)
    )
    later = wait(store, "a", run="run-2")
    assert later.event_id is not None, "it was held for the next one"
    found, asked = now(store, left), now(store, client)
    assert found is not None
    assert is_waiting(found)
    assert asked is not None
    assert asked.event_id is not None, "a client's wait is its own"
    monkeypatch.undo()
    let_go(store.catalog, RUN, ACTOR, keep_us=KEEP_US)
    assert now(store, left) is None


def test_a_wait_that_an_ended_run_left_blocks_no_key(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cas.endings.PORTION", 0)
    wait(store, "a", "paid", "order-7")
    given = wait(store, "b", "paid", "order-8")
    event, _ = store.catalog.write(
        lambda txn: post(txn, "acme", "paid", b"1", "order-8", hold_us=DAY_US, keep_us=KEEP_US)
    )
    ended(store)
    assert is_waiting(wait(store, "a", "paid", "order-7", run="run-2"))
    # What was given to the one that nobody is left to claim for is there for the next.
    assert wait(store, "b", "paid", "order-8", run="run-2").event_id == event.event_id
    assert now(store, given) is None
    monkeypatch.undo()
    let_go(store.catalog, RUN, ACTOR, keep_us=KEEP_US)


def test_what_was_held_for_an_ended_run_never_goes_to_what_it_left(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = wait(store, "first")
    store.catalog.write(
        lambda txn: post(txn, "acme", "paid", b"1", None, hold_us=DAY_US, keep_us=KEEP_US)
    )
    left = wait(store, "second")
    other = wait(store, "a", run="run-2")
    monkeypatch.setattr("cas.endings.PORTION", 0)
    ended(store)
    monkeypatch.undo()
    found = now(store, given)
    assert found is not None
    let_go(store.catalog, RUN, ACTOR, keep_us=KEEP_US)
    assert (now(store, given), now(store, left)) == (None, None)
    taken = now(store, other)
    assert taken is not None
    assert taken.event_id == found.event_id


# --- an end that was broken off


def test_the_sweep_goes_on_with_an_end_that_was_broken_off(store: Store) -> None:
    waits(store, 1200)
    ended(store)

    def plan() -> Any:
        with store.catalog.read() as snapshot:
            return plan_sweep(snapshot, store.now_us(snapshot), keep_us=KEEP_US)

    made = plan()
    assert made.workflows.ending_ids == [RUN]
    before = seq(store)
    assert execute_sweep(store.catalog, made).workflows == Forgotten(ends=1)
    assert max(len(change.ops) for change in store.catalog.changes(before)) < 3 * PORTION
    assert of_run(store, Subscription) == []
    assert {step.status for step in of_run(store, Step)} == {CANCELLED}
    assert not plan()
