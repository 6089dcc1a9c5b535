"""Events of one tenant: posting them, and waiting for them.

    emit         an event, given in its own transaction to all that wait for it (invariant 6)
    subscribe    a wait: durable, found again by its run and step
    claim        what a wait was given; the same one each time
    wait         all of it at once, in a thread that blocks

See `cas.events` for how the two meet.
"""

from __future__ import annotations

import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, Final, final

import msgspec

from cas import events
from cas.catalog import Snapshot, Transaction
from cas.catalog.local import LocalCatalog
from cas.clock import SECOND_US
from cas.config import EventSettings
from cas.errors import CatalogClosed, InvalidRequest, NotFound, NoWaitingWorkflow, TooLarge
from cas.events import NO_LIMIT, Room
from cas.once import OnceKey, once
from cas.records import NAMELESS_STEP, Event, Subscription
from cas.references import DIRECT_RUN, check_segment
from workflows.notation import LEVELS_MAX, is_too_deep
from workflows.watcher import Watcher

STEP_CHARS_MAX: Final = 400
_TIMEOUT_US_MAX: Final = 10 * 366 * 24 * 3600 * SECOND_US
_OTHERS_TOLD: Final = 100  # waits that an event misses; so many are read to tell of them


@final
@dataclass(frozen=True, slots=True)
class Emitted:
    """An event that was taken, and how many waits it was given to."""

    event_id: str
    delivered_to: int


@final
@dataclass(frozen=True, slots=True)
class Claimed:
    """What a wait came to; `event` None: its time was over first."""

    subscription: Subscription
    event: Event | None

    @property
    def payload(self) -> Any:
        """The event's JSON value; None without an event."""
        return None if self.event is None else msgspec.json.decode(self.event.payload)


@final
class Events:
    """The events and waits of one tenant. Made by `Workflows.events`; safe for threads."""

    def __init__(
        self,
        catalog: LocalCatalog,
        watcher: Watcher,
        settings: EventSettings,
        *,
        tenant_id: str,
        actor: str,
        request_id: str = "",
        room: Room = NO_LIMIT,
    ) -> None:
        self._catalog = catalog
        self._watcher = watcher
        self._settings = settings
        self._tenant_id = check_segment(tenant_id, "tenant")
        self._actor = actor
        self._request_id = request_id
        self._room = room

    def emit(
        self,
        event_name: str,
        payload: Any,
        correlation_key: str | None = None,
        *,
        hold_us: int | None = None,
        key: OnceKey | None = None,
    ) -> Emitted:
        """Give an event (any JSON value) to all that wait for it; durable on return.

        `hold_us`: where nobody waits it is kept so long, for the first wait that begins.
        With a `key`, once: the repetition is answered as the first time.

        Raises NoWaitingWorkflow where nobody waits and it is not to be held (nothing is kept
        then), TooManyHeld where it is and there is no room, TooManyKept where there is none for
        any or for a new `key`, InvalidRequest, TooLarge, KeyReused.
        """
        events.check_event_name(event_name, posted=True)
        events.check_correlation_key(correlation_key)
        hold_max_us = self._settings.hold_max
        if hold_us is not None and not 1 <= hold_us <= hold_max_us:
            # Not how long it was to be: that may have any number of digits.
            raise InvalidRequest("hold", f"up to {hold_max_us // SECOND_US} seconds")
        try:
            raw = msgspec.json.encode(payload)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest("payload", f"a JSON value: {error}") from None
        if is_too_deep(payload):
            raise InvalidRequest("payload", f"{LEVELS_MAX} levels at most")
        if len(raw) > self._settings.payload_max:
            raise TooLarge(self._settings.payload_max)

        def change(txn: Transaction) -> Emitted:
            def act() -> str:
                event, delivered_to = events.post(
                    txn,
                    self._tenant_id,
                    event_name,
                    raw,
                    correlation_key,
                    hold_us=hold_us,
                    keep_us=self._settings.keep,
                    room=self._room,
                )
                return msgspec.json.encode([event.event_id, delivered_to]).decode()

            result, _ = once(txn, self._tenant_id, key, act, room=self._room)
            return Emitted(*msgspec.json.decode(result, type=tuple[str, int]))

        try:
            return self._catalog.write(change, actor=self._actor, request_id=self._request_id)
        except NoWaitingWorkflow:
            raise NoWaitingWorkflow(event_name, self._others(event_name, correlation_key)) from None

    def _others(self, event_name: str, correlation_key: str | None) -> str:
        """Who waits for the name without the key, in words: a key that one side forgot is the
        usual reason that nobody does. Of a long name it may find nobody."""
        tenant_id, now_us = self._tenant_id, self._catalog.time().at_us
        keyless = events.topic(tenant_id, event_name, None)
        # Those with keys come side by side, after the one that is before all others.
        first_key = events.topic(tenant_id, event_name, " ")
        with self._catalog.read() as snapshot:
            about = partial(snapshot.range, Subscription, "waiting", limit=_OTHERS_TOLD)
            without = about((keyless,), after=(now_us,)) if correlation_key else []
            beside = about(after=(first_key,))
        keyed = takewhile(
            lambda wait: (
                (wait.tenant_id, wait.event_name) == (tenant_id, event_name)
                and wait.correlation_key is not None
            ),
            beside,
        )
        another = "another" if correlation_key else "a"
        told = [
            _count(len(without), "without a correlation key"),
            _count(
                sum(not events.is_over(wait, now_us) for wait in keyed),
                f"with {another} correlation key",
            ),
        ]
        return ", ".join(filter(None, told))

    def subscribe(
        self,
        run: str,
        step: str,
        event_name: str,
        correlation_key: str | None = None,
        timeout_us: int | None = None,
        *,
        renew: bool = False,
    ) -> Subscription:
        """Begin the wait of a step ("wait_for_pdfs", "x#2"), or find it where it began before;
        durable on return. An open event is given at once: `claim` tells.

        `event_name` "" waits for the time alone. A wait that is found keeps its time, unless
        `renew` lets it count anew; a found one that timed out begins again then.

        Of a run, it takes the correlation key from a client that waits with it, whose wait is
        over then.

        Raises InvalidRequest, InvalidName, RunEnded for a step whose run has ended,
        SubscriptionTaken (another one waits with this
        correlation key), KeyReused (this step waits for another event), TooManyWaiters,
        TooManyKept (as much is remembered of what clients were told as may be).
        """
        check_segment(run, "run")
        if not 1 <= len(step) <= STEP_CHARS_MAX:
            raise InvalidRequest("step", f"1 to {STEP_CHARS_MAX} characters")
        if event_name:
            events.check_event_name(event_name)
            events.check_correlation_key(correlation_key)
        elif timeout_us is None or correlation_key is not None:
            raise InvalidRequest("event_name", "a wait has an event, or a time alone")
        if timeout_us is not None and not 0 <= timeout_us <= _TIMEOUT_US_MAX:
            raise InvalidRequest("timeout", "a wait takes up to ten years")

        def change(txn: Transaction) -> Subscription:
            return events.subscribe(
                txn,
                self._tenant_id,
                run,
                step,
                event_name,
                correlation_key,
                timeout_us,
                renew=renew,
                room=self._room,
            )

        return self._catalog.write(change, actor=self._actor, request_id=self._request_id)

    def claim(self, subscription_id: str, begun: Subscription | None = None) -> Claimed | None:
        """What the wait was given, or that its time is over; None while it waits.

        Durable on return: who asks again gets the same for `[events] keep`, whatever happened
        to the answer. Raises NotFound, also for another tenant's, and where the wait that was
        `begun` is gone and its step waits anew; RunEnded where the run of its step has ended,
        and what was not claimed is for others.
        """
        with self._catalog.read() as snapshot:
            wait = self._own(snapshot, subscription_id, begun)
            if wait.claimed_at is not None:
                return self._claimed(snapshot, wait)
        if events.is_waiting(wait) and not events.is_over(wait, self._catalog.time().at_us):
            return None

        def change(txn: Transaction) -> Claimed | None:
            own = self._own(txn, subscription_id, begun)
            taken = events.claim(txn, own, self._settings.keep)
            return self._claimed(txn, taken) if taken.claimed_at is not None else None

        return self._catalog.write(change, actor=self._actor, request_id=self._request_id)

    def conclude(self, subscription_id: str) -> Claimed | None:
        """What the wait was given, as `claim` tells; else nothing is left of it: None.

        For who cannot ask again. Durable on return. Raises NotFound.
        """

        def change(txn: Transaction) -> Claimed | None:
            taken = events.claim(txn, self._own(txn, subscription_id), self._settings.keep)
            if taken.event_id is not None:
                return self._claimed(txn, taken)
            events.drop(txn, taken)
            return None

        return self._catalog.write(change, actor=self._actor, request_id=self._request_id)

    def leave(self, subscription_id: str) -> Claimed | None:
        """What the wait was given, where nobody else may have it; else nothing is left of it, and
        a held event is there for others again: None.

        For a client that is all but gone, and cannot ask again. Durable on return. Raises
        NotFound.
        """

        def change(txn: Transaction) -> Claimed | None:
            left = events.leave(txn, self._own(txn, subscription_id), self._settings.keep)
            return None if left is None else self._claimed(txn, left)

        return self._catalog.write(change, actor=self._actor, request_id=self._request_id)

    def claim_within(self, subscription_id: str, timeout_s: float | None) -> Claimed | None:
        """The same, but wait for it up to `timeout_s` (None: for ever) in this thread.

        None: it waits still. At once where the watcher is closed. Raises NotFound.
        """
        rung = threading.Event()
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            unwatch = self._watcher.watch(subscription_id, rung.set)
        except CatalogClosed:
            return self.claim(subscription_id)
        try:
            while True:
                claimed = self.claim(subscription_id)
                if claimed is not None or self._watcher.closed:
                    return claimed
                left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
                if not rung.wait(left_s):
                    return self.claim(subscription_id)
                rung.clear()
        finally:
            unwatch()

    def wait(
        self,
        event_name: str,
        correlation_key: str | None = None,
        timeout_s: float | None = None,
        *,
        run: str = DIRECT_RUN,
        step: str | None = None,
    ) -> Claimed:
        """Wait in this thread until the event comes or `timeout_s` is over (None: for ever).

        With a `step` of a `run` it goes on with the wait that this step began before, whose
        time counts from then. Without one, nothing is left of it where it is interrupted or
        ends without an event. A wait outside of runs may end before its time: see `subscribe`.

        Raises what `subscribe` does, and CatalogClosed when the store is closed meanwhile.
        """
        timeout_us = None if timeout_s is None else max(0, round(timeout_s * SECOND_US))
        # Under a name that is made here nobody can ask again what it was given.
        nameless = f"{NAMELESS_STEP if run == DIRECT_RUN else ''}wait-{uuid.uuid4()}"
        name = step or nameless
        wait = self.subscribe(run, name, event_name, correlation_key, timeout_us)
        try:
            # The record's own end decides, by catalog time; this thread waits for its ring.
            claimed = self.claim_within(wait.subscription_id, None)
            if claimed is None:
                raise CatalogClosed
        except BaseException:
            if step is None:
                # Else an event could be given to nobody. A closed store keeps it, though.
                with suppress(CatalogClosed, NotFound):
                    self.cancel(wait.subscription_id)
            raise
        if step is None and claimed.event is None:
            with suppress(CatalogClosed, NotFound):
                self.cancel(wait.subscription_id)
        return claimed

    def cancel(self, subscription_id: str) -> None:
        """End a wait and forget it; durable on return. A held event that it was given and has
        not claimed is there for others again. Raises NotFound."""

        def change(txn: Transaction) -> None:
            events.drop(txn, self._own(txn, subscription_id))

        self._catalog.write(change, actor=self._actor, request_id=self._request_id)

    def end(self, run: str, step: str, event_id: str | None = None) -> None:
        """Forget the wait of a step, where there is one; durable on return. An event that it has
        claimed goes with it, unless others have it or may have it; one that it has not is there
        for others again.

        With an `event_id` only where that is what it was given: so who ends it late, or once
        more, ends no wait that has begun under the same name since. Raises InvalidName.
        """
        wait_id = events.subscription_id(self._tenant_id, check_segment(run, "run"), step)

        def change(txn: Transaction) -> None:
            wait = txn.get(Subscription, wait_id)
            if wait is not None and event_id in (None, wait.event_id):
                events.drop(txn, wait)

        self._catalog.write(change, actor=self._actor, request_id=self._request_id)

    def _own(
        self, snapshot: Snapshot, subscription_id: str, begun: Subscription | None = None
    ) -> Subscription:
        wait = snapshot.get(Subscription, subscription_id)
        if wait is None or wait.tenant_id != self._tenant_id:
            raise NotFound("subscription", subscription_id)
        if begun is not None and not events.is_same(wait, begun):
            raise NotFound("subscription", subscription_id)
        return wait

    @staticmethod
    def _claimed(snapshot: Snapshot, wait: Subscription) -> Claimed:
        if wait.event_id is None:
            return Claimed(wait, None)
        event = snapshot.get(Event, wait.event_id)
        if event is None:  # the sweep keeps what a wait was given for as long as the wait
            raise NotFound("event", wait.event_id)
        return Claimed(wait, event)


def _count(waits: int, how: str) -> str:
    """So many, in words; "" for none."""
    if not waits:
        return ""
    number = f"{waits} or more" if waits >= _OTHERS_TOLD else str(waits)
    return f"{number} {'waits' if waits == 1 else 'wait'} for this name {how}"
