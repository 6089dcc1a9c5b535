"""The events of one tenant: emitting, waiting in any order, claiming, and never missing one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cas.clock import DAY_US, HOUR_US, SECOND_US
from cas.config import EventSettings, Settings, Size, StoreSettings
from cas.errors import (
    CatalogClosed,
    InvalidName,
    InvalidRequest,
    KeyReused,
    NotFound,
    NoWaitingWorkflow,
    SubscriptionTaken,
    TooLarge,
    TooManyHeld,
    TooManyKept,
)
from cas.events import Room, append_event
from cas.once import OnceKey
from cas.records import EVENT_BYTES, KEY_BYTES, Event, Subscription
from cas.store import Store
from cas.sweep import execute_sweep, plan_sweep
from tests.audit import audit
from tests.clocks import KEEP_US, HandClock
from tests.workflows.neighbour import PATIENCE_S, until
from workflows.events import Emitted, Events
from workflows.notation import LEVELS_MAX
from workflows.watcher import Watcher

SETTINGS = Settings(
    store=StoreSettings(min_free=Size(0)), events=EventSettings(payload_max=Size(1024))
)
Of = Callable[[str], Events]


@pytest.fixture
def store(memory: Path, clock: HandClock) -> Iterator[Store]:
    with Store.open(memory / "store", SETTINGS, clock=clock) as store:
        yield store


@pytest.fixture
def watcher(store: Store) -> Iterator[Watcher]:
    watcher = Watcher(store.catalog)
    yield watcher
    watcher.close()


@pytest.fixture
def of(store: Store, watcher: Watcher) -> Of:
    """The events of a tenant."""
    return lambda tenant: Events(
        store.catalog, watcher, SETTINGS.events, tenant_id=tenant, actor="ada", request_id="r"
    )


@pytest.fixture
def events(of: Of) -> Events:
    return of("acme")


def all_events(store: Store) -> list[Event]:
    with store.catalog.read() as snapshot:
        return snapshot.range(Event, "")


def waiting(store: Store) -> list[Subscription]:
    with store.catalog.read() as snapshot:
        return [wait for wait in snapshot.range(Subscription, "") if wait.waiting_for]


# --- emitting


def test_an_event_wakes_its_wait_with_its_payload(events: Events) -> None:
    payload = {"amount": 100.5, "to": ["ä", None, True]}
    wait = events.subscribe("run-1", "pay", "payment.confirmed", "order_123")
    assert events.claim(wait.subscription_id) is None
    emitted = events.emit("payment.confirmed", payload, "order_123")
    assert emitted.delivered_to == 1
    claimed = events.claim(wait.subscription_id)
    assert claimed is not None
    assert claimed.event is not None
    assert (claimed.event.event_id, claimed.payload) == (emitted.event_id, payload)
    assert events.claim(wait.subscription_id) == claimed


@pytest.mark.parametrize("payload", [None, 0, "", [], {}, False, "text", 1.5])
def test_any_json_value_is_a_payload(events: Events, payload: object) -> None:
    events.emit("it", payload, hold_us=HOUR_US)
    claimed = events.wait("it")
    assert claimed.event is not None
    assert claimed.payload == payload


def nested(levels: int) -> Any:
    """So many lists and objects in each other."""
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"in": value}
    return value


def test_a_payload_may_be_nested_up_to_a_fixed_depth(events: Events) -> None:
    """Not up to what the stack of who takes it leaves: who waits may have less of it."""
    events.emit("deep", nested(LEVELS_MAX), hold_us=HOUR_US)
    assert events.wait("deep").payload == nested(LEVELS_MAX)


def test_what_is_held_has_a_limit_and_what_is_given_has_none(
    store: Store, watcher: Watcher
) -> None:
    events = Events(
        store.catalog,
        watcher,
        SETTINGS.events,
        tenant_id="acme",
        actor="ada",
        room=Room(2 * EVENT_BYTES),
    )
    key = OnceKey("events", "client-1", b"question")
    events.emit("paid", 1, hold_us=HOUR_US)
    with pytest.raises(TooManyHeld):
        events.emit("paid", "x" * 1000, hold_us=HOUR_US, key=key)
    events.subscribe("run-1", "a", "given")
    assert events.emit("given", "x" * 1000).delivered_to == 1
    assert events.wait("paid").payload == 1
    events.emit("paid", "x" * 500, hold_us=HOUR_US, key=key)  # nothing was done under it


def test_the_key_of_an_event_is_counted_for_longer_than_the_event(
    store: Store, watcher: Watcher, clock: HandClock
) -> None:
    room = Room(kept_bytes_max=KEY_BYTES + EVENT_BYTES + 1 + KEY_BYTES)
    events = Events(
        store.catalog, watcher, SETTINGS.events, tenant_id="acme", actor="ada", room=room
    )
    keys = [OnceKey("events", f"{number:0>250}", b"question") for number in range(3)]

    def emit(key: OnceKey) -> Emitted:
        return events.emit("paid", 1, hold_us=SECOND_US, key=key)

    emitted = emit(keys[0])
    with pytest.raises(TooManyKept):
        emit(keys[1])
    assert len(all_events(store)) == 1, "it goes with its key, or not at all"
    swept(store, clock, SECOND_US)
    assert all_events(store) == []
    emit(keys[1])
    assert emit(keys[0]) == emitted
    swept(store, clock, SECOND_US)
    with pytest.raises(TooManyKept):
        emit(keys[2])
    swept(store, clock, DAY_US)
    emit(keys[2])
    audit(store)


def swept(store: Store, clock: HandClock, later_us: int) -> None:
    clock.advance(later_us)
    with store.catalog.read() as snapshot:
        plan = plan_sweep(snapshot, clock.time_us, keep_us=KEEP_US)
    execute_sweep(store.catalog, plan)


def test_nobody_waits(store: Store, of: Of) -> None:
    of("other").subscribe("run-1", "a", "paid")
    with pytest.raises(NoWaitingWorkflow) as nobody:
        of("acme").emit("paid", 1)
    assert nobody.value.event_name == "paid"
    assert all_events(store) == []


def missed(events: Events, key: str | None) -> str:
    with pytest.raises(NoWaitingWorkflow) as nobody:
        events.emit("paid", 1, key)
    return str(nobody.value)


def test_who_waits_with_another_key_or_none_is_told_of(of: Of) -> None:
    events, plain = of("acme"), "No workflow waiting for this event"
    of("other").subscribe("run-1", "a", "paid", "order_1")
    of("other").subscribe("run-1", "b", "paid")
    events.subscribe("run-1", "other", "paid.not")
    assert (missed(events, None), missed(events, "order_1")) == (plain, plain)
    for key in ("order_2", "zzz"):
        events.subscribe("run-1", key, "paid", key)
    assert missed(events, None) == f"{plain}: 2 wait for this name with a correlation key"
    assert missed(events, "no") == f"{plain}: 2 wait for this name with another correlation key"
    events.subscribe("run-1", "b", "paid")
    one = "1 waits for this name without a correlation key"
    two = "2 wait for this name with another correlation key"
    assert missed(events, "no") == f"{plain}: {one}, {two}"


def test_who_waited_long_enough_is_not_told_of(of: Of, clock: HandClock) -> None:
    events = of("acme")
    for step, key in (("a", None), ("b", "order_1")):
        events.subscribe("run-1", step, "paid", key, 1_000_000)
    clock.advance(2_000_000)
    assert missed(events, "no") == "No workflow waiting for this event"


def test_of_very_many_that_wait_some_are_told_of(
    events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.events._OTHERS_TOLD", 3)
    for number in range(5):
        events.subscribe("run-1", f"a{number}", "paid")
    assert "3 or more wait for this name without" in missed(events, "no")


def test_what_is_refused(store: Store, events: Events) -> None:
    events.subscribe("run-1", "a", "paid")
    position = store.catalog.position()
    for name in ("", "a\n", "x" * 256, "upload_1", "approval_pay", "webhook_pr"):
        with pytest.raises(InvalidRequest):
            events.emit(name, 1)
    with pytest.raises(InvalidRequest):
        events.emit("paid", 1, "\x00")
    with pytest.raises(InvalidRequest):
        events.emit("paid", object())
    with pytest.raises(InvalidRequest, match="levels"):
        events.emit("paid", nested(LEVELS_MAX + 1))
    for hold_us in (0, -1, SETTINGS.events.hold_max + 1, 10**400, 10**5000, -(10**5000)):
        with pytest.raises(InvalidRequest):
            events.emit("paid", 1, hold_us=hold_us)
    with pytest.raises(TooLarge) as large:
        events.emit("paid", "x" * 1023)
    assert large.value.limit_bytes == 1024
    for run, step, name, timeout_us in (
        ("run-1", "", "paid", None),
        ("run-1", "x" * 401, "paid", None),
        ("run-1", "b", "", None),
        ("run-1", "b", "paid", -1),
        ("run-1", "b", "paid", 10**5000),
    ):
        with pytest.raises(InvalidRequest):
            events.subscribe(run, step, name, None, timeout_us)
    with pytest.raises(InvalidRequest):
        events.subscribe("run-1", "b", "", "key", 1)
    with pytest.raises(InvalidName):
        events.subscribe("a/b", "b", "paid")
    assert store.catalog.position() == position
    assert events.emit("paid", "x" * 1022).delivered_to == 1


def test_no_tenant_of_an_impossible_name(of: Of) -> None:
    with pytest.raises(InvalidName):
        of("../acme")


def test_an_event_under_a_key_is_emitted_once(store: Store, events: Events) -> None:
    key = OnceKey("events", "client-1", b"question")
    with pytest.raises(NoWaitingWorkflow):
        events.emit("paid", 1, key=key)
    events.subscribe("run-1", "a", "paid")
    emitted = events.emit("paid", 1, key=key)
    assert emitted.delivered_to == 1
    assert events.emit("paid", 1, key=key) == emitted
    with pytest.raises(KeyReused):
        events.emit("paid", 2, key=OnceKey("events", "client-1", b"another"))
    assert len(all_events(store)) == 1


def test_who_did_it_is_in_the_journal(store: Store, events: Events) -> None:
    wait = events.subscribe("run-1", "a", "paid")
    events.emit("paid", 1)
    events.claim(wait.subscription_id)
    events.cancel(wait.subscription_id)
    changes = list(store.catalog.changes(0))[-4:]
    assert {(change.actor, change.request_id) for change in changes} == {("ada", "r")}


# --- tenants


def test_a_wait_of_another_tenant_is_not_there(of: Of) -> None:
    """Told as an unknown one is (invariant 9)."""
    wait = of("acme").subscribe("run-1", "a", "paid")
    stranger = of("other")
    for name in (wait.subscription_id, "unknown"):
        for act in (stranger.claim, stranger.cancel):
            with pytest.raises(NotFound) as missing:
                act(name)
            assert (missing.value.kind, missing.value.name) == ("subscription", name)
        with pytest.raises(NotFound):
            stranger.claim_within(name, 0)
    same = stranger.subscribe("run-1", "a", "paid")
    assert same.subscription_id != wait.subscription_id
    assert stranger.emit("paid", 1).delivered_to == 1
    assert of("acme").claim(wait.subscription_id) is None


# --- waiting


def test_a_wait_in_a_thread_gets_what_is_emitted_meanwhile(events: Events, store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        waits = [pool.submit(events.wait, "paid", f"order_{n}") for n in range(8)]
        until(lambda: len(waiting(store)) == 8)
        for n in range(8):
            events.emit("paid", n, f"order_{n}")
        assert [wait.result(PATIENCE_S).payload for wait in waits] == list(range(8))


def test_a_wait_that_begins_later_gets_what_was_held(events: Events) -> None:
    events.emit("paid", 1, hold_us=HOUR_US)
    assert events.wait("paid").payload == 1


def test_a_wait_ends_when_its_time_is_over(events: Events, store: Store, clock: HandClock) -> None:
    with ThreadPoolExecutor(1) as pool:
        wait = pool.submit(events.wait, "paid", None, 3600.0)
        until(lambda: bool(waiting(store)))
        clock.advance(HOUR_US)
        claimed = wait.result(PATIENCE_S)
    assert claimed.event is None
    assert claimed.payload is None
    assert events.wait("paid", timeout_s=0).event is None


def test_a_step_goes_on_with_its_wait(events: Events, store: Store, clock: HandClock) -> None:
    """Its time counts from the first beginning; what it got is told again."""
    first = events.subscribe("run-1", "wait#2", "paid", None, HOUR_US)
    clock.advance(HOUR_US - SECOND_US)
    events.emit("paid", 1)
    for _ in range(2):
        again = events.wait("paid", timeout_s=3600, run="run-1", step="wait#2")
        assert (again.subscription.subscription_id, again.payload) == (first.subscription_id, 1)
    clock.advance(DAY_US)
    other = events.subscribe("run-1", "wait#3", "paid", None, 0)
    assert events.wait("paid", timeout_s=3600, run="run-1", step="wait#3").event is None
    with store.catalog.read() as snapshot:
        found = snapshot.get(Subscription, other.subscription_id)
    assert found is not None
    assert found.claimed_at is not None
    assert waiting(store) == []


def test_a_wait_without_a_step_that_was_in_vain_leaves_nothing(
    events: Events, store: Store
) -> None:
    assert events.wait("paid", "key", timeout_s=0).event is None
    assert events.wait("paid", timeout_s=0, step="a").event is None
    with store.catalog.read() as snapshot:
        assert [wait.step for wait in snapshot.range(Subscription, "")] == ["a"]


def test_who_asks_for_a_wait_that_is_gone_claims_nothing_of_the_next(
    events: Events, store: Store, clock: HandClock
) -> None:
    gone: list[Subscription] = []
    for name, key in (("alpha", "k1"), ("beta", "k2"), ("beta", None), ("beta", None)):
        wait = events.subscribe("direct", "step", name, key)
        for before in gone:
            with pytest.raises(NotFound):
                events.claim(before.subscription_id, before)
        events.emit(name, 1, key)
        for before in gone:
            with pytest.raises(NotFound):
                events.claim(before.subscription_id, before)
        with store.catalog.read() as snapshot:
            found = snapshot.get(Subscription, wait.subscription_id)
        assert found is not None
        assert found.claimed_at is None
        clock.advance(1)
        for _ in range(2):
            claimed = events.claim(wait.subscription_id, wait)
            assert claimed is not None
            assert claimed.payload == 1
        events.end("direct", "step")
        gone.append(wait)


def test_a_wait_that_counts_anew_is_the_same(events: Events, clock: HandClock) -> None:
    begun = events.subscribe("direct", "step", "paid", None, SECOND_US, renew=True)
    clock.advance(DAY_US)
    assert events.claim(begun.subscription_id, begun) is not None
    events.subscribe("direct", "step", "paid", None, SECOND_US, renew=True)
    events.emit("paid", 7)
    claimed = events.claim(begun.subscription_id, begun)
    assert claimed is not None
    assert claimed.payload == 7


def test_concluding_takes_what_came_or_ends_the_wait(events: Events, of: Of) -> None:
    told, waiting_still = (events.subscribe("direct", step, step) for step in ("told", "never"))
    over = events.subscribe("direct", "over", "over", None, 0)
    emitted = events.emit("told", 1)
    with pytest.raises(NotFound):
        of("other").conclude(told.subscription_id)
    for _ in range(2):
        claimed = events.conclude(told.subscription_id)
        assert claimed is not None
        assert claimed.event is not None
        assert claimed.event.event_id == emitted.event_id
    for wait in (waiting_still, over):
        assert events.conclude(wait.subscription_id) is None
        with pytest.raises(NotFound):
            events.claim(wait.subscription_id)
    with pytest.raises(NoWaitingWorkflow):
        events.emit("never", 1)


def test_leaving_takes_what_nobody_else_may_have(events: Events, of: Of) -> None:
    given, held = (events.subscribe("direct", step, step) for step in ("given", "held"))
    emitted = events.emit("given", 1)
    events.emit("held", 2, hold_us=HOUR_US)
    with pytest.raises(NotFound):
        of("other").leave(given.subscription_id)
    claimed = events.leave(given.subscription_id)
    assert claimed is not None
    assert claimed.event is not None
    assert claimed.event.event_id == emitted.event_id
    assert events.leave(held.subscription_id) is None
    with pytest.raises(NotFound):
        events.claim(held.subscription_id)
    assert events.wait("held").payload == 2


def test_a_step_that_comes_to_wait_wakes_the_client_that_has_its_key(
    events: Events, store: Store
) -> None:
    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(events.wait, "paid", "key")
        until(lambda: bool(waiting(store)))
        step = events.subscribe("run-1", "pay", "paid", "key")
        assert client.result(PATIENCE_S).event is None
    assert waiting(store) == [step]


def test_claiming_within_a_time_leaves_the_wait(events: Events, clock: HandClock) -> None:
    wait = events.subscribe("direct", "poll", "paid", None, HOUR_US)
    assert events.claim_within(wait.subscription_id, 0.02) is None
    events.emit("paid", 1)
    claimed = events.claim_within(wait.subscription_id, PATIENCE_S)
    assert claimed is not None
    assert claimed.payload == 1


def test_a_wait_for_time_alone(events: Events, clock: HandClock) -> None:
    wait = events.subscribe("run-1", "sleep", "", None, HOUR_US)
    assert events.claim(wait.subscription_id) is None
    clock.advance(HOUR_US)
    claimed = events.claim(wait.subscription_id)
    assert claimed is not None
    assert claimed.event is None


def test_one_waits_for_a_key(events: Events) -> None:
    events.subscribe("run-1", "a", "paid", "key")
    with pytest.raises(SubscriptionTaken) as taken:
        events.wait("paid", "key")
    assert (taken.value.event_name, taken.value.correlation_key) == ("paid", "key")


def test_a_cancelled_wait_wakes_who_waits_for_it(events: Events, store: Store) -> None:
    wait = events.subscribe("run-1", "a", "paid")
    with ThreadPoolExecutor(1) as pool:
        claiming = pool.submit(events.claim_within, wait.subscription_id, None)
        events.cancel(wait.subscription_id)
        with pytest.raises(NotFound):
            claiming.result(PATIENCE_S)
    with pytest.raises(NotFound):
        events.cancel(wait.subscription_id)


def test_an_ended_wait_frees_its_name_and_what_nobody_else_was_told(
    events: Events, store: Store
) -> None:
    def told(step: str) -> str:
        wait = events.subscribe("direct", step, "job", timeout_us=0, renew=True)
        claimed = events.claim(wait.subscription_id)
        assert claimed is not None
        assert claimed.event is not None
        return claimed.event.event_id

    posted = [events.emit("job", n, hold_us=HOUR_US).event_id for n in range(2)]
    assert told("waiter:me") == posted[0]
    events.end("direct", "waiter:me", posted[0])
    assert [event.event_id for event in all_events(store)] == posted[1:]
    assert told("waiter:me") == posted[1]
    # Once more, late: the wait that has begun under this name since is not meant.
    events.end("direct", "waiter:me", posted[0])
    assert told("waiter:me") == posted[1]
    for _ in range(2):
        events.end("direct", "waiter:me")
    events.end("direct", "waiter:unknown")
    assert all_events(store) == []


def test_of_an_ended_wait_others_have_what_it_did_not_claim_and_what_they_were_told(
    events: Events, of: Of, store: Store
) -> None:
    for step in ("waiter:me", "waiter:you"):
        events.subscribe("direct", step, "news")
    events.emit("news", 1)
    yours = events.subscribe("direct", "waiter:you", "news")
    assert events.claim(yours.subscription_id) is not None
    events.end("direct", "waiter:you")
    mine = events.subscribe("direct", "waiter:me", "news")
    claimed = events.claim(mine.subscription_id)
    assert claimed is not None
    assert claimed.payload == 1
    of("other").end("direct", "waiter:me")
    assert events.claim(mine.subscription_id) == claimed

    events.subscribe("direct", "waiter:given", "job")
    held = events.emit("job", 1, hold_us=HOUR_US)
    assert held.delivered_to == 1
    events.end("direct", "waiter:given")
    assert events.subscribe("direct", "waiter:next", "job").event_id == held.event_id
    events.subscribe("direct", "waiter:open", "later", "k")
    events.end("direct", "waiter:open")
    with pytest.raises(NoWaitingWorkflow):
        events.emit("later", 1, "k")


def test_closing_wakes_all_who_wait(events: Events, store: Store, watcher: Watcher) -> None:
    kept = events.subscribe("run-1", "a", "paid")
    with ThreadPoolExecutor(3) as pool:
        direct = pool.submit(events.wait, "paid")
        step = pool.submit(events.wait, "paid", run="run-1", step="a")
        claiming = pool.submit(events.claim_within, kept.subscription_id, None)
        until(lambda: len(waiting(store)) == 2)
        watcher.close()
        for waits in (direct, step):
            with pytest.raises(CatalogClosed):
                waits.result(PATIENCE_S)
        assert claiming.result(PATIENCE_S) is None
    assert events.claim_within(kept.subscription_id, None) is None
    assert waiting(store) == [kept]


def test_nothing_is_left_of_a_wait_that_was_interrupted(
    store: Store, watcher: Watcher, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    watcher.watch_commits(lambda: None)  # so that it is this wait alone that is interrupted
    with monkeypatch.context() as patch:
        patch.setattr(threading.Event, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            events.wait("paid", "key")
    assert waiting(store) == []
    events.subscribe("run-1", "a", "paid", "key")


def test_events_and_waits_that_race_always_meet(events: Events, store: Store) -> None:
    """Each key has one wait and one event, held, in either order: none is missed."""
    keys = [f"{n}" for n in range(60)]
    with ThreadPoolExecutor(12) as pool:
        waits = []
        for n, key in enumerate(keys):
            if n % 2:
                waits.append(pool.submit(events.wait, "paid", key))
                pool.submit(events.emit, "paid", key, key, hold_us=HOUR_US)
            else:
                pool.submit(events.emit, "paid", key, key, hold_us=HOUR_US)
                waits.append(pool.submit(events.wait, "paid", key))
        assert [wait.result(PATIENCE_S).payload for wait in waits] == keys
    assert waiting(store) == []


def test_an_upload_that_was_completed_before_is_an_event_for_each_run(
    events: Events, store: Store
) -> None:
    store.catalog.write(
        lambda txn: append_event(txn, "acme", "upload_1", {"files": [1]}, keep_us=KEEP_US)
    )
    for run in ("run-1", "run-2", "direct"):
        assert events.wait("upload_1", run=run, step="a").payload == {"files": [1]}
