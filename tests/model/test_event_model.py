"""Events and waits beside a plain list of them: any order, any time, sweeps and restarts.

Whatever comes between: each wait has what the model says, claiming tells the same each time,
an event that was taken is given to whom it is for, and one that is held is given once
(invariant 13).
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cas.clock import DAY_US, HOUR_US
from cas.config import Duration, EventSettings, Settings, Size, StoreSettings
from cas.errors import KeyReused, NotFound, NoWaitingWorkflow, SubscriptionTaken
from cas.events import IN_VAIN_US, publish, subscription_id
from cas.records import Event, Run, Subscription
from cas.store import Store
from cas.sweep import execute_sweep, plan_sweep
from cas.totals import miscounted_totals
from tests.clocks import HandClock
from workflows.events import Events
from workflows.watcher import Watcher

KEEP_US = 30 * DAY_US
SETTINGS = Settings(
    store=StoreSettings(min_free=Size(0)),
    events=EventSettings(keep=Duration(KEEP_US), hold_max=Duration(40 * DAY_US)),
)
OPEN_RUN = "run-open"  # has a record, and does not end
RUNS = ["run-1", OPEN_RUN, "direct"]
EVERYTHING = 10_000

runs = st.sampled_from(RUNS)
# Mostly new ones: a wait that has its event is done. Some are of clients that ask about a run.
steps = st.one_of(
    st.integers(0, 30).map(str),
    st.integers(0, 5).map("waiter:{}".format),
    st.integers(0, 3).map("waiter:/{}".format),  # without a name
)
# Few topics, and times that are often over, so that things happen to each other.
names = st.sampled_from("xxxy")
keys = st.sampled_from([None, None, "key"])
timeouts = st.sampled_from([None, HOUR_US, HOUR_US])
holds = st.sampled_from([None, HOUR_US, 40 * DAY_US])
passing = st.sampled_from([HOUR_US, HOUR_US, 31 * DAY_US])


@dataclass
class Wait:
    wait_id: str
    run: str
    step: str
    name: str
    key: str | None
    ends: int | None
    state: str = "waiting"  # told, claimed
    event: str | None = None
    keyed: bool = True  # while it waits or is told: keeps others from waiting with its key
    told_at: int = 0
    forget: int | None = None

    @property
    def of_client(self) -> bool:
        return self.run == "direct" or self.step.startswith("waiter:")

    @property
    def nameless(self) -> bool:
        return self.step.startswith("waiter:/")


@dataclass
class Happened:
    event_id: str
    name: str
    key: str | None
    run: str
    until: int
    once: bool
    open: bool


class EventModel(RuleBasedStateMachine):
    """`waits` and `events` are what must be there."""

    def __init__(self) -> None:
        super().__init__()
        place = Path("/dev/shm")
        self.folder = tempfile.TemporaryDirectory(
            prefix="blobcask-", dir=place if place.is_dir() else None
        )
        self.root = Path(self.folder.name) / "store"
        self.clock = HandClock()
        self.waits: dict[str, Wait] = {}
        self.events: dict[str, Happened] = {}
        self.claims: dict[str, Any] = {}
        self.open()

    @initialize()
    def begin(self) -> None:
        run = Run(OPEN_RUN, "acme", "it", "running", self.now, "ada")
        self.store.catalog.write(lambda txn: txn.insert(run))

    def open(self) -> None:
        self.store = Store.open(self.root, SETTINGS, clock=self.clock)
        self.watcher = Watcher(self.store.catalog)
        self.door = Events(
            self.store.catalog, self.watcher, SETTINGS.events, tenant_id="acme", actor="ada"
        )

    def close(self) -> None:
        self.watcher.close()
        self.store.close()

    def teardown(self) -> None:
        try:
            self.store.catalog.verify_state()
            with self.store.catalog.read() as snapshot:
                assert miscounted_totals(snapshot) == []
        finally:
            self.close()
            self.folder.cleanup()

    @property
    def now(self) -> int:
        return self.clock.now_us()

    # --- what the model knows

    def over(self, wait: Wait) -> bool:
        return wait.state == "waiting" and wait.ends is not None and wait.ends <= self.now

    def waiting(self, name: str, key: str | None, run: str = "") -> list[Wait]:
        found = [
            wait
            for wait in self.waits.values()
            if wait.state == "waiting"
            and not self.over(wait)
            and (wait.name, wait.key) == (name, key)
            and run in ("", wait.run)
        ]
        never = 1 << 63
        return sorted(found, key=lambda wait: (wait.ends or never, wait.wait_id))

    def tell(self, wait: Wait, event: str | None) -> None:
        wait.state, wait.event, wait.told_at = "told", event, self.now
        wait.keyed = wait.keyed and event is not None
        if wait.nameless or (event is None and wait.of_client):
            wait.forget = self.now + IN_VAIN_US

    def has(self, event_id: str) -> bool:
        return any(wait.event == event_id for wait in self.waits.values())

    def had(self, event_id: str, run: str) -> bool:
        """Whether a step of the run has it: what a client is told is not taken from the run."""
        return any(
            wait.event == event_id and wait.run == run and not wait.of_client
            for wait in self.waits.values()
        )

    def ended(self, event: Happened) -> bool:
        return event.until <= self.now and event.run != OPEN_RUN

    def only_for(self, wait: Wait) -> Happened | None:
        """The held event that would be there for others without this wait."""
        event = self.events.get(wait.event or "")
        if event is None or wait.state == "claimed" or not event.once or event.open:
            return None
        if self.ended(event) or any(
            other.event == event.event_id and not (event.run and other.of_client)
            for other in self.waits.values()
            if other is not wait
        ):
            return None
        return event

    def dropped(self, wait: Wait) -> None:
        event = self.only_for(wait)
        del self.waits[wait.wait_id]
        self.claims.pop(wait.wait_id, None)
        if event is None:
            unheard = self.events.get(wait.event or "")
            if unheard is not None and not unheard.open and not self.has(unheard.event_id):
                del self.events[unheard.event_id]  # nobody can ask for it
            return
        others = self.waiting(event.name, event.key, event.run)
        if others:
            self.tell(others[0], event.event_id)
        else:
            event.open = True

    # --- what happens

    @rule(name=names, key=keys, hold=holds)
    def emit(self, name: str, key: str | None, hold: int | None) -> None:
        self.clock.advance(1000)
        waits = self.waiting(name, key)
        if hold is None and not waits:
            with pytest.raises(NoWaitingWorkflow):
                self.door.emit(name, 1, key)
            return
        emitted = self.door.emit(name, 1, key, hold_us=hold)
        assert emitted.delivered_to == len(waits)
        for wait in waits:
            self.tell(wait, emitted.event_id)
        held = hold is not None
        self.events[emitted.event_id] = Happened(
            emitted.event_id, name, key, "", self.now + (hold or KEEP_US), held, held and not waits
        )

    # Seldom of "x": they are open for long, and all later waits would have one at once.
    @rule(
        name=st.sampled_from("xyyyyy"),
        run=st.sampled_from(["", "run-1", OPEN_RUN]),
        once=st.booleans(),
    )
    def happens(self, name: str, run: str, once: bool) -> None:
        """Something of the store itself, or that a webhook was told."""
        self.clock.advance(1000)
        event = self.store.catalog.write(
            lambda txn: publish(txn, "acme", name, b"1", run=run, open_us=KEEP_US, once=once)[0]
        )
        waits = self.waiting(name, None, run)
        for wait in waits:
            self.tell(wait, event.event_id)
        used_up = once and any(not (run and wait.of_client) for wait in waits)
        self.events[event.event_id] = Happened(
            event.event_id, name, None, run, self.now + KEEP_US, once, open=not used_up
        )

    @rule(run=runs, step=steps, name=names, key=keys, timeout=timeouts, renew=st.booleans())
    def subscribe(
        self, run: str, step: str, name: str, key: str | None, timeout: int | None, renew: bool
    ) -> None:
        self.subscribe_as(run, step, name, key, timeout, renew=renew)

    def subscribe_as(
        self, run: str, step: str, name: str, key: str | None, timeout: int | None, *, renew: bool
    ) -> None:
        def act() -> Subscription:
            return self.door.subscribe(run, step, name, key, timeout, renew=renew)

        wait_id = subscription_id("acme", run, step)
        found = self.waits.get(wait_id)
        if found is not None and (found.name, found.key) != (name, key):
            with pytest.raises(KeyReused):
                act()
            return
        if found is not None and (found.event is not None or not renew):
            assert act().event_id == found.event
            return
        wait = Wait(wait_id, run, step, name, key, None if timeout is None else self.now + timeout)
        for other in self.waits.values():
            if other is found or key is None or (other.name, other.key) != (name, key):
                continue
            if other.state == "claimed" or not other.keyed:
                continue
            yields = other.of_client and not wait.of_client
            if not yields and (other.ends is None or other.ends > self.now):
                with pytest.raises(SubscriptionTaken):
                    act()
                return
            if other.state == "waiting":
                self.tell(other, None)
            other.keyed = False
        fresh = [  # in the order in which they came
            event
            for event in self.events.values()
            if event.open
            and not self.ended(event)
            and (event.name, event.key) == (name, key)
            and event.run in ("", run)
            and (wait.of_client or not self.had(event.event_id, run))
        ]
        self.waits[wait_id] = wait
        if fresh:
            oldest = fresh[0]
            self.tell(wait, oldest.event_id)
            oldest.open = not oldest.once or bool(oldest.run and wait.of_client)
        assert act().event_id == wait.event

    @rule(data=st.data(), renew=st.booleans())
    def subscribe_again(self, data: st.DataObject, renew: bool) -> None:
        if not self.waits:
            return
        wait = self.waits[data.draw(st.sampled_from(sorted(self.waits)))]
        self.subscribe_as(wait.run, wait.step, wait.name, wait.key, HOUR_US, renew=renew)

    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        if not self.waits:
            return
        wait = self.waits[data.draw(st.sampled_from(sorted(self.waits)))]
        claimed = self.door.claim(wait.wait_id)
        if wait.state == "waiting" and not self.over(wait):
            assert claimed is None
            return
        if wait.state != "claimed":
            self.take(wait)
        assert claimed is not None
        told = None if claimed.event is None else claimed.event.event_id
        assert told == wait.event
        assert self.claims.setdefault(wait.wait_id, told) == told

    def take(self, wait: Wait) -> None:
        brief = wait.of_client and (wait.event is None or wait.nameless)
        wait.state, wait.forget = "claimed", self.now + (IN_VAIN_US if brief else KEEP_US)

    @rule(data=st.data())
    def conclude(self, data: st.DataObject) -> None:
        if not self.waits:
            return
        wait = self.waits[data.draw(st.sampled_from(sorted(self.waits)))]
        claimed = self.door.conclude(wait.wait_id)
        if wait.event is None:
            assert claimed is None
            self.dropped(wait)
            return
        if wait.state != "claimed":
            self.take(wait)
        assert claimed is not None
        assert claimed.event is not None
        assert claimed.event.event_id == wait.event

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if not self.waits:
            return
        wait = self.waits[data.draw(st.sampled_from(sorted(self.waits)))]
        claimed = self.door.leave(wait.wait_id)
        if wait.event is None or self.only_for(wait) is not None:
            assert claimed is None
            self.dropped(wait)
            return
        if wait.state != "claimed":
            self.take(wait)
        assert claimed is not None
        assert claimed.event is not None
        assert claimed.event.event_id == wait.event

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if not self.waits:
            return
        wait = self.waits[data.draw(st.sampled_from(sorted(self.waits)))]
        self.door.cancel(wait.wait_id)
        self.dropped(wait)
        with pytest.raises(NotFound):
            self.door.claim(wait.wait_id)

    @rule(data=st.data(), by_event=st.booleans(), late=st.booleans())
    def end(self, data: st.DataObject, by_event: bool, late: bool) -> None:
        """By its name: of what it was told, or whatever it came to."""
        if not self.waits:
            return
        wait = self.waits[data.draw(st.sampled_from(sorted(self.waits)))]
        event_id = "another" if late else wait.event
        self.door.end(wait.run, wait.step, event_id if by_event else None)
        if not (by_event and late):
            self.dropped(wait)

    # --- what comes between

    @rule(by_us=passing)
    def time_passes(self, by_us: int) -> None:
        self.clock.advance(by_us)

    def forgettable(self, wait: Wait) -> bool:
        if wait.run == OPEN_RUN and not wait.of_client:
            return False
        if wait.forget is not None:
            return wait.forget <= self.now
        if wait.state == "told":
            return max(wait.told_at, wait.ends or 0) + KEEP_US <= self.now
        kept = IN_VAIN_US if wait.of_client else KEEP_US
        return wait.ends is not None and wait.ends + kept <= self.now

    @rule()
    def sweep(self) -> None:
        with self.store.catalog.read() as snapshot:
            plan = plan_sweep(snapshot, self.now, keep_us=KEEP_US)
        swept = execute_sweep(self.store.catalog, plan)
        due = [wait for wait in self.waits.values() if self.forgettable(wait)]
        assert set(plan.workflows.wait_ids) >= {wait.wait_id for wait in due}
        assert swept.workflows.waits == len(due)

        def turn(wait: Wait) -> tuple[int, int, str]:
            if wait.forget is not None:
                return 0, wait.forget, wait.wait_id
            if wait.state == "told":
                return 1, wait.told_at, wait.wait_id
            return 2, wait.ends or 0, wait.wait_id

        for wait in sorted(due, key=turn):
            self.dropped(wait)
        gone = 0
        for event in list(self.events.values()):
            if event.until > self.now:
                continue
            if not self.ended(event):
                event.until = self.now + DAY_US
            elif self.has(event.event_id):
                event.open = event.once = False
                event.until = self.now + DAY_US
            else:
                del self.events[event.event_id]
                gone += 1
        assert swept.events == gone

    @rule(without_index=st.booleans())
    def restart(self, without_index: bool) -> None:
        self.close()
        if without_index:
            shutil.rmtree(self.root / "catalog/index")
        self.open()

    # --- and always

    @invariant()
    def same(self) -> None:
        with self.store.catalog.read() as snapshot:
            waits = snapshot.range(Subscription, "", limit=EVERYTHING)
            events = snapshot.range(Event, "", limit=EVERYTHING)
        assert {wait.subscription_id for wait in waits} == set(self.waits)
        for record in waits:
            wait = self.waits[record.subscription_id]
            assert record.event_id == wait.event
            assert (record.claimed_at is not None) == (wait.state == "claimed")
            assert (record.waiting_for is not None) == (wait.state == "waiting")
        assert {event.event_id: event.open_for is not None for event in events} == {
            event.event_id: event.open for event in self.events.values()
        }
        # What a wait was given is there for as long as the wait.
        assert {wait.event_id for wait in waits} - {None} <= set(self.events)


TestEventModel = EventModel.TestCase
TestEventModel.settings = settings(stateful_step_count=80)
