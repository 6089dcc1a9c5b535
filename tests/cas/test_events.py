"""Events and waits meet in whatever order they come, and each wait keeps what it got
(invariant 13).

They commit with the change they speak of, or not at all (invariant 6).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cas.catalog import Transaction
from cas.catalog.snapshot import LmdbSnapshot
from cas.clock import DAY_US, HOUR_US, SECOND_US
from cas.config import Settings, Size, StoreSettings
from cas.errors import (
    InvalidRequest,
    KeyReused,
    NoWaitingWorkflow,
    RunEnded,
    SubscriptionTaken,
    TooManyHeld,
    TooManyKept,
    TooManyWaiters,
)
from cas.events import (
    IN_VAIN_US,
    Room,
    append_event,
    check_correlation_key,
    check_event_name,
    claim,
    drop,
    is_waiting,
    leave,
    post,
    publish,
    subscribe,
    subscription_id,
    topic,
)
from cas.records import CANCELLED, EVENT_BYTES, RUNNING, WAIT_BYTES, Event, Mark, Run, Subscription
from cas.store import Store
from cas.sweep import execute_sweep, plan_sweep
from cas.totals import held_bytes, held_of, kept_of
from tests.audit import audit
from tests.clocks import KEEP_US, START_US, HandClock


@pytest.fixture
def store(memory: Path, clock: HandClock) -> Iterator[Store]:
    settings = Settings(store=StoreSettings(min_free=Size(0)))
    with Store.open(memory / "store", settings, clock=clock) as store:
        yield store
        audit(store)


def all_events(store: Store, name: str = "paid") -> list[Event]:
    return events(store, name=name)


def events(store: Store, tenant: str = "acme", name: str = "it happened") -> list[Event]:
    with store.catalog.read() as snapshot:
        found = snapshot.range(Event, "")
    return [event for event in found if (event.tenant_id, event.event_name) == (tenant, name)]


def wait(
    store: Store,
    step: str,
    name: str = "paid",
    key: str | None = None,
    *,
    run: str = "run-1",
    tenant: str = "acme",
    timeout_us: int | None = None,
    renew: bool = False,
) -> Subscription:
    return store.catalog.write(
        lambda txn: subscribe(txn, tenant, run, step, name, key, timeout_us, renew=renew)
    )


def happens(store: Store, name: str = "paid", key: str | None = None, *, run: str = "") -> Event:
    """An event of the store itself."""
    return store.catalog.write(
        lambda txn: append_event(txn, "acme", name, {"n": 1}, key, run=run, keep_us=KEEP_US)
    )


def posted(
    store: Store, name: str = "paid", key: str | None = None, hold_us: int | None = None
) -> tuple[Event, int]:
    return store.catalog.write(
        lambda txn: post(txn, "acme", name, b"1", key, hold_us=hold_us, keep_us=KEEP_US)
    )


def claimed(store: Store, wait: Subscription) -> Subscription:
    def change(txn: Transaction) -> Subscription:
        found = txn.get(Subscription, wait.subscription_id)
        assert found is not None
        return claim(txn, found, keep_us=KEEP_US)

    return store.catalog.write(change)


def now(store: Store, wait: Subscription) -> Subscription:
    with store.catalog.read() as snapshot:
        found = snapshot.get(Subscription, wait.subscription_id)
        assert found is not None
        return found


def dropped(store: Store, wait: Subscription) -> None:
    store.catalog.write(lambda txn: drop(txn, now(store, wait)))


# --- the record of an event


def test_an_event_is_found_by_tenant_and_name_in_order(store: Store, clock: HandClock) -> None:
    for number in range(3):
        clock.advance(1000)
        store.catalog.write(
            lambda txn, number=number: append_event(  # type: ignore[misc]
                txn, "acme", "it happened", {"number": number, "name": "ä"}, "key", keep_us=KEEP_US
            )
        )
    store.catalog.write(lambda txn: append_event(txn, "other", "it happened", {}, keep_us=KEEP_US))
    found = events(store)
    assert [json.loads(event.payload)["number"] for event in found] == [0, 1, 2]
    assert json.loads(found[0].payload)["name"] == "ä"
    assert found[0].created_at == START_US + 1000
    assert found[0].correlation_key == "key"
    assert found[0].expires_at == START_US + 1000 + KEEP_US
    assert len(events(store, "other")) == 1
    assert events(store, "acme", "it") == []


def test_an_event_goes_with_its_change(store: Store) -> None:
    def change(txn: Transaction) -> None:
        txn.insert(Mark("changed", "yes"))
        append_event(txn, "acme", "it happened", {}, keep_us=KEEP_US)
        raise ZeroDivisionError

    waiting = wait(store, "a", "it happened")
    with pytest.raises(ZeroDivisionError):
        store.catalog.write(change)
    assert events(store) == []
    assert is_waiting(now(store, waiting))
    with store.catalog.read() as snapshot:
        assert snapshot.get(Mark, "changed") is None


@pytest.mark.parametrize("name", ["", "x" * 256, "a\nb", "a\0b", "\udc00"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(InvalidRequest):
        check_event_name(name)
    with pytest.raises(InvalidRequest):
        check_correlation_key(name)


@pytest.mark.parametrize("name", ["upload_x", "approval_payment", "webhook_github_pr"])
def test_nobody_outside_posts_the_stores_own_events(name: str) -> None:
    check_event_name(name)
    with pytest.raises(InvalidRequest, match="own"):
        check_event_name(name, posted=True)
    check_event_name("payment.confirmed", posted=True)


def test_the_calls_of_a_webhook_have_names_of_their_own_that_no_others_have() -> None:
    check_event_name("webhook_github_pr", of_webhook=True)
    check_event_name("pr.merged", of_webhook=True)
    for name in ("upload_x", "approval_payment"):
        with pytest.raises(InvalidRequest, match="own"):
            check_event_name(name, of_webhook=True)


def test_topics_differ_where_anything_does() -> None:
    parts = ["", "a", '"', "a,b", "null", "ä"]
    made = [topic(a, b, c) for a in parts for b in parts for c in (*parts, None)]
    assert len(set(made)) == len(made)
    runs = {subscription_id(a, b, c) for a in parts for b in parts for c in parts}
    assert len(runs) == len(parts) ** 3


# --- meeting


def test_an_event_is_given_to_all_that_wait_for_it(store: Store) -> None:
    here = [wait(store, step, run=run) for step in "ab" for run in ("run-1", "run-2")]
    others = [
        wait(store, "c", "paid", "key"),
        wait(store, "d", "unpaid"),
        wait(store, "e", tenant="other"),
    ]
    event, delivered_to = posted(store)
    assert delivered_to == 4
    assert {now(store, one).event_id for one in here} == {event.event_id}
    assert {now(store, one).event_id for one in others} == {None}
    assert all(is_waiting(now(store, one)) for one in others)


def test_a_correlation_key_finds_its_only_wait(store: Store) -> None:
    waits = {key: wait(store, key, key=key) for key in ("order_1", "order_2")}
    event, delivered_to = posted(store, key="order_2")
    assert delivered_to == 1
    assert now(store, waits["order_2"]).event_id == event.event_id
    assert is_waiting(now(store, waits["order_1"]))


def test_many_more_than_a_page_wait_for_one_event(store: Store) -> None:
    waits = [wait(store, f"{n}", run=f"run-{n % 3}") for n in range(450)]
    event, delivered_to = posted(store)
    assert delivered_to == 450
    assert all(now(store, one).event_id == event.event_id for one in waits)


def test_an_event_of_a_run_is_for_its_waits_alone(store: Store) -> None:
    mine, theirs = (wait(store, "ask", "approval_pay", run=run) for run in ("run-1", "run-2"))
    event = happens(store, "approval_pay", run="run-1")
    assert now(store, mine).event_id == event.event_id
    assert is_waiting(now(store, theirs))
    assert is_waiting(wait(store, "later", "approval_pay", run="run-2"))
    # Its own run has had it already.
    assert is_waiting(wait(store, "later", "approval_pay", run="run-1"))


def test_an_event_that_nobody_waits_for_is_not_kept(store: Store) -> None:
    wait(store, "a", "paid", "key")
    with pytest.raises(NoWaitingWorkflow):
        posted(store)
    assert events(store, name="paid") == []


def test_a_held_event_is_for_the_first_wait_that_begins(store: Store) -> None:
    event, delivered_to = posted(store, hold_us=HOUR_US)
    assert delivered_to == 0
    assert wait(store, "other", "paid", "key").event_id is None
    first, second = wait(store, "a"), wait(store, "b")
    assert first.event_id == event.event_id
    assert is_waiting(second)


def test_held_events_are_given_in_their_order(store: Store, clock: HandClock) -> None:
    made = []
    for _ in range(3):
        made.append(posted(store, hold_us=HOUR_US)[0].event_id)
        clock.advance(1000)
    assert [wait(store, f"{n}").event_id for n in range(4)] == [*made, None]


def test_held_events_are_given_in_their_order_while_time_stands_still(store: Store) -> None:
    made = [posted(store, hold_us=HOUR_US)[0].event_id for _ in range(12)]
    assert [wait(store, f"{n}").event_id for n in range(13)] == [*made, None]


def test_an_event_for_all_and_one_for_a_run_are_given_in_their_order(store: Store) -> None:
    made = [happens(store, run=run).event_id for run in ("run-1", "", "run-1", "", "run-1")]
    assert [wait(store, f"{n}").event_id for n in range(6)] == [*made, None]


def test_a_held_event_that_is_waited_for_is_not_held(store: Store) -> None:
    first = wait(store, "a")
    event, delivered_to = posted(store, hold_us=HOUR_US)
    assert delivered_to == 1
    assert now(store, first).event_id == event.event_id
    assert is_waiting(wait(store, "b"))


def test_a_hold_ends(store: Store, clock: HandClock) -> None:
    posted(store, hold_us=HOUR_US)
    clock.advance(HOUR_US)
    assert is_waiting(wait(store, "a"))


def test_the_stores_own_event_is_open_to_each_run_once(store: Store) -> None:
    """A loop that waits again waits for the next one."""
    event = happens(store)
    assert wait(store, "a").event_id == event.event_id
    assert wait(store, "a", run="run-2").event_id == event.event_id
    assert is_waiting(wait(store, "b"))
    # Those who wait without a workflow have nothing to do with each other.
    assert wait(store, "a", run="direct").event_id == event.event_id
    assert wait(store, "b", run="direct").event_id == event.event_id


def test_the_oldest_open_event_is_found_behind_many_that_the_run_had(
    store: Store, clock: HandClock
) -> None:
    made = []
    for _ in range(250):
        made.append(happens(store).event_id)
        clock.advance(1000)
    own = happens(store, run="run-1").event_id
    given = [wait(store, f"{n}").event_id for n in range(252)]
    assert given == [*made, own, None]


def test_what_a_client_is_told_is_not_taken_from_the_run(store: Store) -> None:
    event = happens(store, "approval_pay", run="run-1")
    for _ in range(2):
        for client in ("waiter:spy", "waiter:other"):
            assert wait(store, client, "approval_pay").event_id == event.event_id
    assert wait(store, "ask", "approval_pay").event_id == event.event_id
    assert is_waiting(wait(store, "ask again", "approval_pay"))
    # Nor does what the run has had say anything to a client that comes late.
    assert wait(store, "waiter:late", "approval_pay").event_id == event.event_id


def test_what_is_for_one_wait_of_a_run_is_not_for_a_client(store: Store) -> None:
    """Such as the call of a webhook: clients are told, and a step gets it."""

    def called() -> Event:
        return store.catalog.write(
            lambda txn: publish(txn, "acme", "push", b"1", run="run-1", open_us=DAY_US, once=True)
        )[0]

    early = wait(store, "waiter:early", "push")
    event = called()
    assert now(store, early).event_id == event.event_id
    assert wait(store, "waiter:spy", "push").event_id == event.event_id
    step = wait(store, "a", "push")
    assert step.event_id == event.event_id
    assert is_waiting(wait(store, "waiter:late", "push"))
    dropped(store, step)
    assert now(store, now(store, wait(store, "waiter:late", "push"))).event_id == event.event_id


def test_what_speaks_of_a_run_is_there_for_as_long_as_the_run(
    store: Store, clock: HandClock
) -> None:
    def run(status: str | None) -> Run:
        return Run("run-1", "acme", "it", "waiting", 1, "ada", open=status)

    store.catalog.write(lambda txn: txn.insert(run("open")))
    event = happens(store, run="run-1")
    happens(store, "approval_b", run="run-1")
    happens(store, "all")
    clock.advance(2 * KEEP_US)
    assert wait(store, "a").event_id == event.event_id
    assert is_waiting(wait(store, "all", "all"))
    store.catalog.write(lambda txn: txn.replace(run(None)))
    assert is_waiting(wait(store, "waiter:b", "approval_b"))


# --- how many wait


def test_those_whose_time_is_over_cost_nothing(
    store: Store, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(300):
        wait(store, f"{number}", run=f"run-{number % 3}", timeout_us=SECOND_US)
    forever, later = wait(store, "forever"), wait(store, "later", timeout_us=HOUR_US)
    clock.advance(SECOND_US)
    read = 0
    real = LmdbSnapshot._led_to

    def counting(self: LmdbSnapshot, *words: Any) -> Any:
        nonlocal read
        read += 1
        return real(self, *words)

    with monkeypatch.context() as patch:
        patch.setattr(LmdbSnapshot, "_led_to", counting)
        event, delivered_to = posted(store)
        assert (delivered_to, read) == (2, 2)
        happens(store, run="run-0")
        assert read == 2
    assert now(store, forever).event_id == event.event_id == now(store, later).event_id


def test_a_topic_has_so_many_waits_and_clients_half_of_them(
    store: Store, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cas.events.TOPIC_WAITS_MAX", 6)
    clients = [wait(store, f"{n}", run="direct", timeout_us=HOUR_US) for n in range(3)]
    for step, run in (("3", "direct"), ("waiter:a", "run-1")):
        with pytest.raises(TooManyWaiters) as refused:
            wait(store, step, run=run)
        assert refused.value.waiters_max == 3
    wait(store, "other", "unpaid", run="direct")
    wait(store, "keyed", key="key", run="direct")
    assert wait(store, "0", run="direct", renew=True).step == "0"  # it has its place
    for number in range(3):
        wait(store, f"{number}")
    with pytest.raises(TooManyWaiters):
        wait(store, "more")
    dropped(store, clients[0])
    wait(store, "more")
    assert posted(store)[1] == 6
    wait(store, "again", run="direct")


def test_a_tenant_has_so_many_waits_of_clients(
    store: Store, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cas.events.CLIENT_WAITS_MAX", 3)
    first, told, _ = [
        wait(store, f"{n}", f"name-{n}", run="direct", timeout_us=HOUR_US, renew=True)
        for n in range(3)
    ]
    happens(store, "name-1")
    with pytest.raises(TooManyWaiters) as refused:
        wait(store, "3", run="direct")
    assert refused.value.waiters_max == 3
    wait(store, "3", run="direct", tenant="other")
    wait(store, "3")
    claimed(store, told)
    wait(store, "3", run="direct")
    clock.advance(HOUR_US)
    claimed(store, first)
    wait(store, "4", run="direct")
    with pytest.raises(TooManyWaiters):  # it would begin again
        wait(store, "0", "name-0", run="direct", timeout_us=HOUR_US, renew=True)


# --- a step's wait


def test_a_step_that_begins_again_finds_its_wait(store: Store, clock: HandClock) -> None:
    first = wait(store, "a", timeout_us=HOUR_US)
    clock.advance(SECOND_US)
    assert wait(store, "a", timeout_us=HOUR_US) == first
    event, delivered_to = posted(store)
    assert delivered_to == 1
    assert wait(store, "a", timeout_us=HOUR_US).event_id == event.event_id


@pytest.mark.parametrize(("name", "key"), [("unpaid", None), ("paid", "key")])
def test_a_step_waits_for_one_thing(store: Store, name: str, key: str | None) -> None:
    wait(store, "a")
    with pytest.raises(KeyReused):
        wait(store, "a", name, key)


def test_claiming_again_changes_nothing(store: Store, clock: HandClock) -> None:
    waiting = wait(store, "a", key="key")
    assert claimed(store, waiting) == waiting
    event, _ = posted(store, key="key")
    taken = claimed(store, waiting)
    assert (taken.event_id, taken.claimed_at) == (event.event_id, START_US)
    clock.advance(DAY_US)
    assert claimed(store, waiting) == taken
    assert wait(store, "a", key="key") == taken


def test_a_key_is_waited_for_once(store: Store) -> None:
    first = wait(store, "a", key="key")
    with pytest.raises(SubscriptionTaken):
        wait(store, "b", key="key")
    wait(store, "b", key="key", tenant="other")
    wait(store, "c", "unpaid", "key")
    posted(store, key="key")
    with pytest.raises(SubscriptionTaken):  # it has not been told yet
        wait(store, "b", key="key")
    claimed(store, first)
    assert is_waiting(wait(store, "b", key="key"))


def test_a_run_takes_a_key_from_a_client(store: Store) -> None:
    """Else whoever may ask could make a workflow fail for ever."""
    squatter = wait(store, "waiter:me", key="key", run="direct")
    step = wait(store, "pay", key="key")
    over = claimed(store, squatter)
    assert (over.event_id, over.claimed_at) == (None, START_US)
    for client in ("waiter:me", "waiter:you"):
        with pytest.raises(SubscriptionTaken):
            wait(store, client, key="key", run="direct", renew=True)
    with pytest.raises(SubscriptionTaken):
        wait(store, "pay", key="key", run="run-2")
    event, delivered_to = posted(store, key="key")
    assert (now(store, step).event_id, delivered_to) == (event.event_id, 1)


def test_a_client_from_whom_a_run_takes_the_key_keeps_what_it_was_given(store: Store) -> None:
    client = wait(store, "waiter:me", key="key", run="direct")
    event, _ = posted(store, key="key")
    assert is_waiting(wait(store, "pay", key="key"))
    assert claimed(store, client).event_id == event.event_id


# --- time


def test_a_wait_ends_without_an_event(store: Store, clock: HandClock) -> None:
    waiting = wait(store, "a", key="key", timeout_us=HOUR_US)
    clock.advance(HOUR_US - 1)
    assert is_waiting(claimed(store, waiting))
    clock.advance(1)
    over = claimed(store, waiting)
    assert (over.event_id, over.claimed_at) == (None, START_US + HOUR_US)
    with pytest.raises(NoWaitingWorkflow):
        posted(store, key="key")
    assert claimed(store, waiting) == over


def test_an_event_after_the_end_is_for_nobody_who_has_not_noticed(
    store: Store, clock: HandClock
) -> None:
    waiting = wait(store, "a", timeout_us=HOUR_US)
    clock.advance(HOUR_US)
    with pytest.raises(NoWaitingWorkflow):
        posted(store)
    assert posted(store, hold_us=HOUR_US)[1] == 0
    assert claimed(store, waiting).event_id is None
    assert wait(store, "b").event_id is not None


def test_an_event_that_came_in_time_counts_however_late_it_is_claimed(
    store: Store, clock: HandClock
) -> None:
    waiting = wait(store, "a", timeout_us=HOUR_US)
    event, _ = posted(store)
    clock.advance(DAY_US)
    assert claimed(store, waiting).event_id == event.event_id


def test_what_is_over_keeps_nobody_from_waiting(store: Store, clock: HandClock) -> None:
    """Its client is gone, perhaps; what it was given in time stays its own."""
    over = wait(store, "a", key="1", timeout_us=HOUR_US)
    told = wait(store, "b", key="2", timeout_us=HOUR_US)
    event, _ = posted(store, key="2")
    clock.advance(HOUR_US)
    waits = [wait(store, f"late-{key}", key=key) for key in "12"]
    assert all(is_waiting(one) for one in waits)
    assert claimed(store, over).event_id is None
    assert claimed(store, told).event_id == event.event_id
    assert [posted(store, key=key)[1] for key in "12"] == [1, 1]


def test_a_client_that_waited_in_vain_is_soon_forgotten(store: Store, clock: HandClock) -> None:
    client = wait(store, "waiter:a", run="direct", timeout_us=HOUR_US)
    step = wait(store, "a", timeout_us=HOUR_US)
    clock.advance(HOUR_US)
    now_us = START_US + HOUR_US
    assert claimed(store, client).forget_at == now_us + IN_VAIN_US
    assert claimed(store, step).forget_at == now_us + KEEP_US
    assert now(store, client).seq is None


def test_a_wait_for_a_time_alone(store: Store, clock: HandClock) -> None:
    waiting = wait(store, "sleep", "", timeout_us=HOUR_US)
    assert wait(store, "sleep", "", run="run-2", timeout_us=HOUR_US) != waiting
    clock.advance(HOUR_US)
    assert claimed(store, waiting).claimed_at is not None


def test_a_renewed_wait_counts_anew(store: Store, clock: HandClock) -> None:
    """A client that polls under one name misses nothing between two polls."""
    first = wait(store, "poll", key="key", timeout_us=HOUR_US, renew=True)
    clock.advance(HOUR_US - 1)
    again = wait(store, "poll", key="key", timeout_us=HOUR_US, renew=True)
    assert again.expires_at == (first.expires_at or 0) + HOUR_US - 1
    clock.advance(HOUR_US)
    assert claimed(store, first).event_id is None
    # It begins again after its end, claimed or not.
    anew = wait(store, "poll", key="key", timeout_us=HOUR_US, renew=True)
    assert is_waiting(anew)
    event, _ = posted(store, key="key")
    assert wait(store, "poll", key="key", timeout_us=HOUR_US, renew=True).event_id == event.event_id
    claimed(store, anew)
    assert wait(store, "poll", key="key", timeout_us=HOUR_US, renew=True).event_id == event.event_id


def test_a_renewed_wait_finds_what_was_held_since(store: Store, clock: HandClock) -> None:
    wait(store, "poll", timeout_us=HOUR_US, renew=True)
    clock.advance(HOUR_US)
    event, _ = posted(store, hold_us=HOUR_US)
    assert wait(store, "poll", timeout_us=HOUR_US).event_id is None
    assert wait(store, "poll", timeout_us=HOUR_US, renew=True).event_id == event.event_id


# --- ending a wait early


def test_a_dropped_wait_is_given_nothing(store: Store) -> None:
    dropped(store, wait(store, "a", key="key"))
    with pytest.raises(NoWaitingWorkflow):
        posted(store, key="key")
    assert is_waiting(wait(store, "b", key="key"))


def test_a_held_event_outlives_the_wait_that_did_not_claim_it(store: Store) -> None:
    event, _ = posted(store, hold_us=HOUR_US)
    first = wait(store, "a")
    dropped(store, first)
    second = wait(store, "b")
    assert second.event_id == event.event_id
    third = wait(store, "c")
    dropped(store, second)
    assert now(store, third).event_id == event.event_id
    claimed(store, third)
    dropped(store, third)
    assert is_waiting(wait(store, "d"))


def test_a_held_event_that_two_got_or_whose_hold_is_over_is_not_given_again(
    store: Store, clock: HandClock
) -> None:
    waits = [wait(store, step) for step in "ab"]
    posted(store, hold_us=HOUR_US)
    dropped(store, waits[0])
    late = wait(store, "c")
    assert is_waiting(late)
    dropped(store, late)
    clock.advance(HOUR_US)
    dropped(store, waits[1])
    assert is_waiting(wait(store, "d"))


def test_an_event_that_was_not_to_be_held_goes_with_its_wait(store: Store) -> None:
    waiting = wait(store, "a")
    posted(store)
    dropped(store, waiting)
    assert is_waiting(wait(store, "b"))


# --- a client without a name

NAMELESS = "waiter:/poll-1"  # no client can call itself so


def left(store: Store, wait: Subscription) -> Subscription | None:
    return store.catalog.write(lambda txn: leave(txn, now(store, wait), keep_us=KEEP_US))


def swept(store: Store) -> int:
    """How many waits were forgotten."""
    with store.catalog.read() as snapshot:
        plan = plan_sweep(snapshot, store.now_us(snapshot), keep_us=KEEP_US)
    return execute_sweep(store.catalog, plan).workflows.waits


@pytest.mark.parametrize("run", ["direct", "run-1"])
def test_what_a_dead_request_was_given_is_there_for_others_after_minutes(
    store: Store, clock: HandClock, run: str
) -> None:
    """Its process was killed: nobody can ask by another request."""
    dead = wait(store, NAMELESS, key="k", run=run, timeout_us=HOUR_US)
    named = wait(store, "waiter:a", key="other", run=run, timeout_us=HOUR_US)
    event, _ = posted(store, key="k", hold_us=DAY_US)
    posted(store, key="other", hold_us=DAY_US)
    assert now(store, dead).event_id == event.event_id
    clock.advance(IN_VAIN_US - 1)
    assert swept(store) == 0
    clock.advance(1)
    assert swept(store) == 1
    assert wait(store, "a", key="k").event_id == event.event_id
    assert now(store, named).event_id is not None


def test_what_a_nameless_wait_was_given_first_is_forgotten_in_minutes_too(
    store: Store, clock: HandClock
) -> None:
    event, _ = posted(store, hold_us=DAY_US)
    assert wait(store, NAMELESS, run="direct", timeout_us=SECOND_US).event_id == event.event_id
    clock.advance(IN_VAIN_US)
    assert swept(store) == 1
    assert wait(store, "a").event_id == event.event_id


def test_what_a_nameless_wait_has_claimed_is_forgotten_in_minutes_too(
    store: Store, clock: HandClock
) -> None:
    kept = claimed(store, wait(store, "waiter:me", run="direct", timeout_us=0))
    gone, named = wait(store, NAMELESS, run="direct"), wait(store, "waiter:you", run="direct")
    posted(store)
    assert (claimed(store, gone).forget_at, claimed(store, named).forget_at) == (
        START_US + IN_VAIN_US,
        START_US + KEEP_US,
    )
    assert kept.forget_at == START_US + IN_VAIN_US


def test_what_others_may_have_is_not_for_a_client_that_is_all_but_gone(store: Store) -> None:
    gone = wait(store, NAMELESS, run="direct")
    event, _ = posted(store, hold_us=HOUR_US)
    assert left(store, gone) is None
    assert wait(store, "a").event_id == event.event_id
    assert left(store, wait(store, NAMELESS, run="direct")) is None
    with pytest.raises(NoWaitingWorkflow):
        posted(store)


def test_what_nobody_else_may_have_is_for_a_client_that_is_all_but_gone(
    store: Store, clock: HandClock
) -> None:
    def told(hold_us: int | None = None, beside: str = "") -> bool:
        gone = wait(store, f"{NAMELESS}{clock.now_us()}", run="direct")
        if beside:
            wait(store, beside)
        event, _ = posted(store, hold_us=hold_us)
        if hold_us == SECOND_US:
            clock.advance(SECOND_US)
        taken = left(store, gone)
        clock.advance(1)
        return taken is not None and (taken.event_id, taken.claimed_at is not None) == (
            event.event_id,
            True,
        )

    assert told()
    assert told(HOUR_US, beside="another one got it too")
    assert told(SECOND_US)  # it is too old to be held any more
    happened = happens(store)
    own = left(store, wait(store, f"{NAMELESS}-last", run="direct"))
    assert own is not None
    assert own.event_id == happened.event_id


# --- how much is held


def held(store: Store, tenant: str = "acme") -> int:
    with store.catalog.read() as snapshot:
        return held_of(snapshot, tenant)


def test_so_much_of_a_tenant_is_held_for_later(store: Store, clock: HandClock) -> None:
    one = EVENT_BYTES + 100

    def hold(tenant: str = "acme", *, name: str = "paid") -> Event:
        payload = b"1" * 100
        return store.catalog.write(
            lambda txn: post(
                txn,
                tenant,
                name,
                payload,
                None,
                hold_us=HOUR_US,
                room=Room(2 * one),
                keep_us=KEEP_US,
            )
        )[0]

    for _ in range(2):
        hold()
    assert held(store) == 2 * one
    with pytest.raises(TooManyHeld) as refused:
        hold()
    facts = refused.value
    assert (facts.limit_bytes, facts.held_bytes, facts.needed_bytes) == (2 * one, 2 * one, one)
    hold("other")
    with pytest.raises(TooManyHeld):  # of whatever name
        hold(name="unpaid")
    assert len(events(store, name="paid")) == 2
    # Whom it is given to, it is not kept for.
    wait(store, "now", "unpaid")
    hold(name="unpaid")
    wait(store, "a")
    assert held(store) == one
    hold()
    clock.advance(HOUR_US)
    swept(store)
    assert held(store) == 0
    hold()


def test_what_the_store_tells_is_kept_in_any_case_and_keeps_no_others_out(store: Store) -> None:
    def told() -> Event:
        return store.catalog.write(
            lambda txn: publish(
                txn, "acme", "push", b"1", open_us=DAY_US, once=True, room=Room(1000)
            )
        )[0]

    for _ in range(3):
        happens(store)
    assert held(store) == 0
    event = told()
    assert held(store) == EVENT_BYTES + len(event.payload)
    with pytest.raises(TooManyHeld):
        told()
    happens(store)
    assert held(store) == EVENT_BYTES + len(event.payload)
    with store.catalog.read() as snapshot:
        assert held_bytes(snapshot) == held(store)


def test_what_is_held_is_summed_up_over_all_tenants(store: Store) -> None:
    for tenant in ("a", "b", "z"):
        store.catalog.write(
            lambda txn, tenant=tenant: post(
                txn, tenant, "x", b"1", None, hold_us=DAY_US, keep_us=KEEP_US
            )  # type: ignore[misc]
        )
    wait(store, "a")  # another total
    with store.catalog.read() as snapshot:
        assert held_bytes(snapshot) == 3 * (EVENT_BYTES + 1)


# --- how much is kept


def kept(store: Store, tenant: str = "acme") -> int:
    with store.catalog.read() as snapshot:
        return kept_of(snapshot, tenant)


def tell(store: Store, room: Room, name: str = "paid", tenant: str = "acme") -> Event:
    """Somebody posts what is for those that wait now."""
    return store.catalog.write(
        lambda txn: post(txn, tenant, name, b"1" * 100, None, keep_us=KEEP_US, room=room)
    )[0]


def ask(store: Store, room: Room, waiter: str, name: str = "paid") -> Subscription:
    """A client waits, and claims what it is given."""
    begun = store.catalog.write(
        lambda txn: subscribe(txn, "acme", "direct", waiter, name, None, HOUR_US, room=room)
    )
    return claimed(store, begun)


def test_what_was_given_is_kept_for_who_asks_again_up_to_a_limit(
    store: Store, clock: HandClock
) -> None:
    """However it is told: each event finds a client that waits, so none of them is held."""
    one = EVENT_BYTES + 100 + WAIT_BYTES
    room = Room(held_bytes_max=1, kept_bytes_max=2 * one)
    waits = [wait(store, f"waiter:{number}", run="direct") for number in range(3)]
    first, *others = [
        wait(store, f"waiter:{name}", name, run="direct") for name in ("one", "two", "three")
    ]
    assert kept(store) == 0, "who waits is counted elsewhere"
    tell(store, room, "one")
    claimed(store, first)
    tell(store, room, "two")
    claimed(store, others[0])
    assert (kept(store), held(store)) == (2 * one, 0)
    with pytest.raises(TooManyKept) as refused:
        tell(store, room, "three")
    facts = refused.value
    assert (facts.limit_bytes, facts.kept_bytes, facts.needed_bytes) == (
        2 * one,
        2 * one,
        EVENT_BYTES + 100,
    )
    assert is_waiting(now(store, others[1]))
    # What the store itself tells is kept in any case.
    happens(store, "three")
    assert now(store, others[1]).event_id is not None
    wait(store, "a", tenant="other")
    tell(store, room, tenant="other")

    clock.advance(KEEP_US)
    swept(store)
    assert kept(store) == 0
    assert all_events(store, "one") == []
    tell(store, room)
    assert all(now(store, one_wait).event_id for one_wait in waits)


def test_new_names_of_clients_have_a_limit_though_one_event_is_enough_for_all(
    store: Store, clock: HandClock
) -> None:
    room = Room(kept_bytes_max=2 * WAIT_BYTES)
    event = happens(store)
    assert {ask(store, room, f"waiter:{name}").event_id for name in "ab"} == {event.event_id}
    assert kept(store) == 2 * WAIT_BYTES
    with pytest.raises(TooManyKept) as refused:
        ask(store, room, "waiter:c")
    assert refused.value.needed_bytes == WAIT_BYTES
    # A name that was told is told again, a step of a run has nothing to do with it, and who has
    # no name is forgotten in minutes.
    assert ask(store, room, "waiter:a").event_id == event.event_id
    assert wait(store, "a").event_id == event.event_id
    assert ask(store, room, f"{NAMELESS}").event_id == event.event_id
    clock.advance(IN_VAIN_US)
    swept(store)
    assert kept(store) == 2 * WAIT_BYTES


def test_what_nobody_can_ask_for_again_is_not_kept(store: Store, clock: HandClock) -> None:
    """Of an event that requests without a name got, nothing is left when they are forgotten."""
    posted(store, "held", hold_us=DAY_US)
    waits = [wait(store, f"{NAMELESS}{n}", run="direct") for n in range(2)]
    waits.append(wait(store, f"{NAMELESS}held", "held", run="direct"))
    posted(store)
    for one in waits[1:]:
        assert claimed(store, one).event_id is not None
    clock.advance(IN_VAIN_US - 1)
    swept(store)
    assert kept(store) == 2 * (EVENT_BYTES + 1) + 2 * WAIT_BYTES
    clock.advance(1)
    swept(store)
    assert kept(store) == 0
    assert all_events(store, "paid") + all_events(store, "held") == []


def test_an_event_goes_with_the_last_wait_that_could_ask_for_it(store: Store) -> None:
    waits = [wait(store, step, run=run) for step, run in (("a", "run-1"), ("waiter:b", "direct"))]
    event, _ = posted(store)
    claimed(store, waits[0])
    dropped(store, waits[0])
    assert all_events(store) == [event]
    dropped(store, claimed(store, waits[1]))
    assert all_events(store) == []


# --- of a run that has ended


def ended(store: Store, run: str) -> None:
    def change(txn: Transaction) -> None:
        found = txn.get(Run, run)
        assert found is not None
        txn.replace(msgspec.structs.replace(found, status=CANCELLED, open=None))

    store.catalog.write(change)


def test_a_step_of_an_ended_run_takes_no_event_and_no_key(store: Store) -> None:
    for name in ("run-1", "run-2"):
        began = Run(name, "acme", "it", RUNNING, START_US, "ada")
        store.catalog.write(lambda txn, began=began: txn.insert(began))  # type: ignore[misc]
    given = wait(store, "given", key="k")
    posted(store, key="k", hold_us=DAY_US)
    told = claimed(store, wait(store, "told", "unpaid", key=None, timeout_us=0))
    ended(store, "run-1")
    client = wait(store, "waiter:me", "asked", "k", run="direct")
    event, _ = posted(store, "sent", hold_us=DAY_US)
    for name, key in (("sent", None), ("asked", "k")):
        with pytest.raises(RunEnded) as refused:
            wait(store, name, name, key)
        assert refused.value.status == CANCELLED
    assert is_waiting(now(store, client))
    assert now(store, client).keyed_for is not None
    assert wait(store, "a", "sent", run="run-2").event_id == event.event_id
    # What it was given and has not claimed is for others; what it has claimed is told again.
    with pytest.raises(RunEnded):
        claimed(store, given)
    assert claimed(store, told) == told
    dropped(store, given)
    assert wait(store, "b", key="k", run="run-2").event_id == given_to(store, "k")
    # One of another tenant, and one that is not known here, may be anything.
    for tenant in ("other", "acme"):
        run = "run-1" if tenant == "other" else "unknown"
        assert is_waiting(wait(store, "a", "nothing", run=run, tenant=tenant))


def given_to(store: Store, key: str) -> str:
    (found,) = [one for one in events(store, name="paid") if one.correlation_key == key]
    return found.event_id
