"""Events: what happened, given to those who wait for it in the same transaction (invariant 6).

An event and a wait (`Subscription`) meet by their topic: tenant, name and correlation key,
all of them equal. Whichever comes second finds the other one, inside its own transaction, so
none of the two is ever missed (invariant 13).

    an event comes    every wait of its topic gets it; a wait with a correlation key is alone
    a wait comes      it gets the oldest open event of its topic that its run has not had

The store's own events (an upload completed, an approval decided) stay open for every later
wait; an event that was posted is open only where it is to be held, and for one wait only.
One that speaks of a run is for the waits of that run alone, and is there for as long as the
run is open.

Waits are of steps, or of clients that ask by a name of their own, or by none. A client keeps
nothing from a run: what it was told, the steps of the run that it asked about still get, and
where a step comes to wait with a correlation key that a client waits with, the client's wait is
over.

Who gets an event is written in the transaction of the event, by all writers one after the
other. So no topic has more than TOPIC_WAITS_MAX waits, of which clients can take half, and no
tenant's clients have more than CLIENT_WAITS_MAX.

What others told counts for its tenant for as long as it is kept, and so do a wait that a client
has claimed and the key of an event that is told once, of which there may be as many as a client
thinks of names; all together have a limit, and what is open to later waits has one of its own
(`Room`). What the store itself tells is always kept. An event goes with the last wait that could
ask for it again: those of a run go with its end (`cas.endings`).

What wakes who waits is a doorbell and may be lost or rung twice: the event is in the catalog,
`claim` reads it, and reads the same one each time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Final, final

import msgspec

from cas.catalog import Catalog, Snapshot, Transaction, pages
from cas.clock import DAY_US, SECOND_US
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
from cas.identifiers import new_id
from cas.records import KEY_BYTES, WAIT_BYTES, Event, Mark, Run, Subscription
from cas.totals import held_of, kept_of, waits_for, waits_of

# How long a wait is remembered of a client that waited in vain, or cannot ask again: there is
# nothing to tell it. Others are remembered for `[events] keep`, so that who asks again after a
# crash is told the same: a runner that is down for longer begins its wait anew.
IN_VAIN_US: Final = 300 * SECOND_US
# Of one topic: an event that is given to so many takes a second, in which nobody else writes.
TOPIC_WAITS_MAX: Final = 10_000
CLIENT_WAITS_MAX: Final = 20_000  # of a tenant, unclaimed

NAME_CHARS_MAX: Final = 255
OF_STORE: Final = ("upload_", "approval_")
RESERVED: Final = (*OF_STORE, "webhook_")

_ACTOR: Final = "events"
_BATCH: Final = 500  # events a transaction
# For how long an upgrade keeps what had no end before it: as long as `[events] keep` is unless
# it is set, which it does not know.
_KEPT_US: Final = 30 * DAY_US
_PAGE: Final = 200  # events looked at, at once, for one that a run has not had
_encode = msgspec.json.Encoder().encode


@final
class Room(msgspec.Struct, frozen=True):
    """How much may be kept for a tenant of what others tell; 0: no limit."""

    held_bytes_max: int = 0  # of events that are open to later waits
    kept_bytes_max: int = 0  # of all of them, of waits that clients claimed, and of keys

    def check_event(self, txn: Transaction, event: Event) -> None:
        """Raise TooManyHeld, TooManyKept where there is none for an event, which is not
        recorded yet."""
        if self.held_bytes_max and event.held_of is not None:
            held_bytes = held_of(txn, event.held_of)
            if held_bytes + event.size_bytes > self.held_bytes_max:
                raise TooManyHeld(self.held_bytes_max, held_bytes, event.size_bytes)
        if event.kept_of is not None:
            self._check(txn, event.kept_of, event.size_bytes)

    def check_wait(self, txn: Transaction, wait: Subscription) -> None:
        """Raise TooManyKept where there is none for one more wait of a client. One without a
        name has it in any case: it is forgotten in minutes, and so is what it was given."""
        if wait.of_client and not wait.nameless:
            self._check(txn, wait.tenant_id, WAIT_BYTES)

    def check_key(self, txn: Transaction, tenant_id: str) -> None:
        """Raise TooManyKept where there is none for one more key of an event that is told once,
        which outlives its event."""
        self._check(txn, tenant_id, KEY_BYTES)

    def _check(self, txn: Transaction, tenant_id: str, needed_bytes: int) -> None:
        if not self.kept_bytes_max:
            return
        kept_bytes = kept_of(txn, tenant_id)
        if kept_bytes + needed_bytes > self.kept_bytes_max:
            raise TooManyKept(self.kept_bytes_max, kept_bytes, needed_bytes)


NO_LIMIT: Final = Room()


def topic(tenant_id: str, event_name: str, correlation_key: str | None) -> str:
    """What an event and a wait must have in common. JSON: no two topics are spelt alike."""
    return json.dumps([tenant_id, event_name, correlation_key], ensure_ascii=False)


def subscription_id(tenant_id: str, run: str, step: str) -> str:
    """The identifier of the wait of one step of one run (with its iteration): the same
    whenever it is asked for, so that a step that begins again after a crash finds it."""
    named = json.dumps([tenant_id, run, step], ensure_ascii=False).encode()
    return hashlib.sha256(b"subscription\0" + named).hexdigest()[:32]


def check_event_name(event_name: str, *, posted: bool = False, of_webhook: bool = False) -> None:
    """Pass a name that an event can have; raises InvalidRequest.

    `posted`: by somebody outside. Names of the store's own events are not for them: whoever
    may post events could approve in the name of others, or tell what nobody signed.
    `of_webhook`: what is told by its calls, which are signed.
    """
    _check_text("event_name", event_name)
    reserved = RESERVED if posted else OF_STORE if of_webhook else ()
    if event_name.startswith(reserved):
        raise InvalidRequest(
            "event_name", f"names that begin with {' or '.join(reserved)} are the store's own"
        )


def check_correlation_key(correlation_key: str | None) -> None:
    """Pass a key that an event can have; raises InvalidRequest."""
    if correlation_key is not None:
        _check_text("correlation_key", correlation_key)


def _check_text(field: str, text: str) -> None:
    if not 1 <= len(text) <= NAME_CHARS_MAX or not text.isprintable():
        raise InvalidRequest(field, f"1 to {NAME_CHARS_MAX} printable characters")


def append_event(
    txn: Transaction,
    tenant_id: str,
    event_name: str,
    payload: Mapping[str, object],
    correlation_key: str | None = None,
    *,
    run: str = "",
    keep_us: int,
) -> Event:
    """Record one of the store's own events inside the transaction of what it speaks of.

    It is given to all that wait for it, and open to those that wait later, for `keep_us`.
    `run`: the run whose waits alone it is for.
    """
    return publish(
        txn,
        tenant_id,
        event_name,
        _encode(payload),
        correlation_key,
        run=run,
        open_us=keep_us,
        own=True,
    )[0]


def post(
    txn: Transaction,
    tenant_id: str,
    event_name: str,
    payload: bytes,
    correlation_key: str | None,
    *,
    hold_us: int | None = None,
    keep_us: int,
    room: Room = NO_LIMIT,
) -> tuple[Event, int]:
    """Record an event that somebody outside posted; see `publish`.

    With `hold_us` it is kept so long for the first wait that begins later, where none is
    there. Raises NoWaitingWorkflow where none is and it is not to be held; TooManyHeld,
    TooManyKept.
    """
    return publish(
        txn,
        tenant_id,
        event_name,
        payload,
        correlation_key,
        open_us=hold_us,
        once=hold_us is not None,
        keep_us=keep_us,
        for_waits_only=hold_us is None,
        room=room,
    )


def publish(
    txn: Transaction,
    tenant_id: str,
    event_name: str,
    payload: bytes,
    correlation_key: str | None = None,
    *,
    run: str = "",
    open_us: int | None = None,
    once: bool = False,
    keep_us: int = 0,
    for_waits_only: bool = False,
    own: bool = False,
    room: Room = NO_LIMIT,
) -> tuple[Event, int]:
    """Record an event and give it to all that wait for it; returns how many those were.
    Raises NoWaitingWorkflow where there are none and it is `for_waits_only`; TooManyHeld,
    TooManyKept where there is no `room`. One of the store's `own` has it in any case.

    `open_us`: for how long a wait that begins later gets it too; None: not at all. With
    `once` it is open to one wait only, and to none where one has got it already. One that is
    never open is kept for `keep_us`; any is kept for as long as a wait that got it, and goes
    with the last one of these where it is open to none.
    """
    about = topic(tenant_id, event_name, correlation_key)
    waits = list(_waiting(txn, about, run))
    if for_waits_only and not waits:
        raise NoWaitingWorkflow(event_name)
    used_up = once and any(_uses_up(run, wait) for wait in waits)
    still_open = open_us is not None and not used_up
    kept_us = keep_us if open_us is None else open_us
    event = Event(
        new_id(txn.now_us),
        tenant_id,
        event_name,
        correlation_key,
        payload,
        txn.now_us,
        expires_at=txn.now_us + kept_us,
        workflow_run_id=run,
        open_for=about if still_open else None,
        once=once,
        undated_at=_undated(txn),
        seq=_frame(txn),
        own=own,
    )
    room.check_event(txn, event)
    txn.insert(event)
    for wait in waits:
        txn.replace(given(txn, wait, event.event_id))
    return event, len(waits)


def _waiting(
    txn: Transaction, about: str, run: str, page_size: int = _PAGE
) -> Iterator[Subscription]:
    """Those who wait for a topic, of `run` or of any, the first to end first; not those whose
    time is over, whether they have noticed or not, which cost nothing here, nor those of a run
    that has ended, which may be there still (`cas.endings`)."""
    index, prefix = ("waiting_run", (about, run)) if run else ("waiting", (about,))
    ended: dict[str, bool] = {}
    after: tuple[int | str, ...] = (txn.now_us,)
    while page := txn.range(Subscription, index, prefix, after=after, limit=page_size):
        for wait in page:
            of_run = wait.workflow_run_id
            if of_run not in ended:
                ended[of_run] = has_run_ended(txn, wait.tenant_id, of_run)
            if not ended[of_run] or wait.of_client:
                yield wait
        after = (page[-1].lapses_at, page[-1].subscription_id)


def is_waiting(wait: Subscription) -> bool:
    """Whether it has been given nothing yet, as far as its record says."""
    return wait.delivered_at is None and wait.claimed_at is None


def is_same(wait: Subscription, begun: Subscription) -> bool:
    """Whether a record is still that of the wait `begun`. Where that one was dropped, its run and
    step may have begun another one since, and the identifier is the same."""
    return (wait.subscription_id, wait.event_name, wait.correlation_key, wait.created_at) == (
        begun.subscription_id,
        begun.event_name,
        begun.correlation_key,
        begun.created_at,
    )


def is_over(wait: Subscription, now_us: int) -> bool:
    """Whether its time ended at `now_us` (catalog time) before it was given an event."""
    return wait.open_until is not None and wait.open_until <= now_us


def given(txn: Transaction, wait: Subscription, event_id: str | None) -> Subscription:
    """The wait with its event, or with none because its time is over; not yet claimed."""
    in_vain = event_id is None
    return msgspec.structs.replace(
        wait,
        waiting_for=None,
        # What is over keeps nobody else from waiting.
        keyed_for=None if in_vain else wait.keyed_for,
        open_until=None,
        event_id=event_id,
        delivered_at=txn.now_us,
        forget_at=txn.now_us + IN_VAIN_US if _is_brief(wait, event_id) else None,
        # How long it is kept for who has not claimed it counts from now, too.
        undated_at=_undated(txn),
        seq=_frame(txn),
    )


def _is_brief(wait: Subscription, event_id: str | None) -> bool:
    """Whether a wait that ended so is remembered but for IN_VAIN_US: a client has nothing to be
    told again, or only its request could ask, which does so at once, unless its process was
    killed."""
    return wait.of_client and (event_id is None or wait.nameless)


def subscribe(
    txn: Transaction,
    tenant_id: str,
    run: str,
    step: str,
    event_name: str,
    correlation_key: str | None,
    timeout_us: int | None,
    *,
    renew: bool = False,
    room: Room = NO_LIMIT,
) -> Subscription:
    """Begin the wait of a step, or find it where it began before; an open event is given at
    once. `event_name` "" waits for the time alone.

    A wait that is found keeps its time. With `renew` it counts anew, and one that is over
    without an event begins again.

    Raises RunEnded for a step whose run has ended, which would take what others wait for,
    SubscriptionTaken when another one waits with the same correlation key (a step of
    a run takes it from a client, whose wait is over then), KeyReused when this step waits, or
    waited, for another event, TooManyWaiters, TooManyKept where there is no `room` for another
    name of a client.
    """
    identifier = subscription_id(tenant_id, run, step)
    found = txn.get(Subscription, identifier)
    if found is not None and (found.event_name, found.correlation_key) != (
        event_name,
        correlation_key,
    ):
        raise KeyReused(step)
    if found is not None and (found.event_id is not None or not renew):
        return found
    about = topic(tenant_id, event_name, correlation_key) if event_name else None
    keyed = about if correlation_key is not None else None
    ends_at = None if timeout_us is None else txn.now_us + timeout_us
    wait = Subscription(
        identifier,
        tenant_id,
        run,
        step,
        event_name,
        correlation_key,
        txn.now_us if found is None else found.created_at,
        ends_at,
        waiting_for=about,
        keyed_for=keyed,
        open_until=ends_at if txn.believed else None,
        undated_at=None if ends_at is None else _undated(txn),
        seq=_frame(txn),
    )
    if not wait.of_client:
        refuse_ended(txn, tenant_id, run)
    if keyed is not None:
        _make_way(txn, keyed, wait)
    _find_place(txn, found, wait)
    if found is None:
        room.check_wait(txn, wait)
    event = open_event(txn, wait) if about else None
    if event is not None:
        wait = given(txn, wait, event.event_id)
        if event.once and _uses_up(event.workflow_run_id, wait):
            txn.replace(msgspec.structs.replace(event, open_for=None))
    if found is None:
        txn.insert(wait)
    else:
        txn.replace(wait)
    return wait


def _make_way(txn: Transaction, keyed: str, wait: Subscription) -> None:
    """Have this correlation key free for a wait; raises SubscriptionTaken.

    One past its time keeps nobody from waiting, nor does a client keep a run from it, which
    would fail there for ever. What it was given stays its own, though. One of a run that has
    ended is over with it.
    """
    holder = txn.find(Subscription, "keyed", keyed)
    if holder is None or holder.subscription_id == wait.subscription_id:
        return
    if not holder.of_client and has_run_ended(txn, holder.tenant_id, holder.workflow_run_id):
        drop(txn, holder)
        return
    ended = holder.undated_at is None and (holder.expires_at or txn.now_us + 1) <= txn.now_us
    if not ended and not (holder.of_client and not wait.of_client):
        raise SubscriptionTaken(holder.event_name, holder.correlation_key or "")
    if is_waiting(holder):
        holder = given(txn, holder, None)
    txn.replace(msgspec.structs.replace(holder, keyed_for=None))


def _find_place(txn: Transaction, found: Subscription | None, wait: Subscription) -> None:
    """Raise TooManyWaiters where there are too many beside this one."""
    about, tenant_id = wait.waiting_for, wait.client_of
    if about is not None and (found is None or found.waiting_for is None):
        # Clients cannot take all places, and keep runs from waiting.
        most = TOPIC_WAITS_MAX // 2 if wait.of_client else TOPIC_WAITS_MAX
        if waits_for(txn, about) >= most:
            raise TooManyWaiters(most, " with this event name and key")
    if (
        tenant_id is not None
        and (found is None or found.client_of is None)
        and waits_of(txn, tenant_id) >= CLIENT_WAITS_MAX
    ):
        raise TooManyWaiters(CLIENT_WAITS_MAX, " of this tenant")


def open_event(txn: Transaction, wait: Subscription) -> Event | None:
    """The oldest open event that this wait should get, none that its run has had before."""
    about = wait.waiting_for or ""
    own_run = wait.workflow_run_id
    found: list[Event] = []
    for run in ("", own_run) if own_run else ("",):
        after: tuple[int | str, ...] = ()
        while page := txn.range(Event, "open", (about, run), after=after, limit=_PAGE):
            fresh = next((event for event in page if _is_open(txn, event, wait)), None)
            if fresh is not None:
                found.append(fresh)
                break
            after = (page[-1].seq, page[-1].event_id)
    return min(found, key=lambda event: (event.seq, event.event_id), default=None)


def _is_open(txn: Transaction, event: Event, wait: Subscription) -> bool:
    """Whether a wait that begins now may have it."""
    if event_is_over(txn, event, txn.now_us):
        return False
    # Clients' waits have nothing to do with each other, nor with what a run has had.
    had_by = wait.had_by
    return not had_by or not txn.range(Subscription, "event", (event.event_id, had_by), limit=1)


def _uses_up(run: str, wait: Subscription) -> bool:
    """Whether this wait is the one that gets an event which is for one wait: what is for a run
    is there for its steps, whatever clients are told of it."""
    return not (run and wait.of_client)


def event_is_over(snapshot: Snapshot, event: Event, now_us: int) -> bool:
    """Whether its term is over: never under a clock in doubt (invariant 10), nor while the run
    is open that it is for, which may come to its wait however late."""
    if event.undated_at is not None or event.expires_at is None or event.expires_at > now_us:
        return False
    return not is_run_open(snapshot, event.tenant_id, event.workflow_run_id)


def is_run_open(snapshot: Snapshot, tenant_id: str, run_id: str) -> bool:
    """Whether this is a run of that tenant which has not ended."""
    run = snapshot.get(Run, run_id)
    return run is not None and run.tenant_id == tenant_id and run.open is not None


def has_run_ended(snapshot: Snapshot, tenant_id: str, run_id: str) -> bool:
    """Whether this is a run of that tenant which has ended: its waits are over, whatever their
    records say. What is no run has no end."""
    run = snapshot.get(Run, run_id)
    return run is not None and run.tenant_id == tenant_id and run.open is None


def refuse_ended(snapshot: Snapshot, tenant_id: str, run_id: str) -> None:
    """Raise RunEnded for a run of that tenant which has ended: nobody is left to hear anything.
    A run of which nothing is known here may be anything, such as a name that a client chose."""
    run = snapshot.get(Run, run_id)
    if run is not None and run.tenant_id == tenant_id and run.open is None:
        raise RunEnded(run.status)


def claim(txn: Transaction, wait: Subscription, keep_us: int) -> Subscription:
    """Take what the wait was given (or that its time is over); once more changes nothing
    (invariant 13). It is remembered for `keep_us`, `[events] keep`.

    A wait that still waits is returned as it is. Raises RunEnded where nobody is left to claim
    it for: what it was given is there for others, once the wait is dropped (`cas.endings`).
    """
    if wait.claimed_at is None and not wait.of_client:
        refuse_ended(txn, wait.tenant_id, wait.workflow_run_id)
    if is_waiting(wait):
        if not is_over(wait, txn.now_us):
            return wait
        wait = given(txn, wait, None)
    if wait.claimed_at is not None:
        return wait
    if _is_brief(wait, wait.event_id):
        keep_us = IN_VAIN_US
    claimed = msgspec.structs.replace(
        wait,
        keyed_for=None,
        delivered_at=None,
        claimed_at=txn.now_us,
        forget_at=txn.now_us + keep_us,
        undated_at=_undated(txn),
        seq=None,
    )
    txn.replace(claimed)
    return claimed


def drop(txn: Transaction, wait: Subscription) -> None:
    """Remove a wait. A held event that nobody else may have, and that it has not claimed, is
    there for others again; one that is for nobody any more goes with it."""
    event = _only_for(txn, wait)
    txn.delete(wait)
    if event is None:
        if wait.event_id is not None:
            _forget_unheard(txn, wait.event_id)
        return
    about = topic(event.tenant_id, event.event_name, event.correlation_key)
    # A portion of an end asks this 500 times, and wants one.
    first = next(_waiting(txn, about, event.workflow_run_id, page_size=4), None)
    if first is not None:
        txn.replace(given(txn, first, event.event_id))
        if _uses_up(event.workflow_run_id, first):
            return
    txn.replace(msgspec.structs.replace(event, open_for=about))


def _forget_unheard(txn: Transaction, event_id: str) -> None:
    """Remove an event that nobody can ask for: no wait has it, and none can come to it."""
    if txn.range(Subscription, "event", (event_id,), limit=1):
        return
    event = txn.get(Event, event_id)
    if event is not None and event.open_for is None:
        txn.delete(event)


def _only_for(txn: Transaction, wait: Subscription) -> Event | None:
    """The held event that nobody may have but this wait, which has not claimed it."""
    if wait.event_id is None or wait.claimed_at is not None:
        return None
    event = txn.get(Event, wait.event_id)
    if event is None or not event.once or event.open_for is not None:
        return None
    if event_is_over(txn, event, txn.now_us):
        return None
    clients = ("",) if event.workflow_run_id else ()  # whom it does not count for, see `had_by`
    others = txn.range(Subscription, "event", (event.event_id,), after=clients, limit=2)
    return event if all(one.subscription_id == wait.subscription_id for one in others) else None


def leave(txn: Transaction, wait: Subscription, keep_us: int) -> Subscription | None:
    """End the wait of a client that is all but gone, and cannot ask again.

    Where others may have what it was given, or it was given nothing, nothing is left of it:
    None. Else it is claimed, and may still reach the client.
    """
    given_away = wait.claimed_at is None and _only_for(txn, wait) is not None
    if wait.event_id is None or given_away:
        drop(txn, wait)
        return None
    return claim(txn, wait, keep_us)


def _undated(txn: Transaction) -> int | None:
    return None if txn.believed else txn.now_us


def _frame(txn: Transaction) -> int:
    """The frame of the journal in which this transaction will be."""
    return txn.position.seq + 1


def open_events(catalog: Catalog, done: Mark) -> None:
    """Open to later waits what a store recorded when none could wait; sets the mark `done`.

    Their term counts from now: they had none. Harmless to stop and to repeat.
    """
    with catalog.read() as snapshot:
        closed = [
            event.event_id
            for page in pages(snapshot, Event)
            for event in page
            if _was_before(event)
        ]
    for start in range(0, len(closed), _BATCH):

        def change(txn: Transaction, chunk: list[str] = closed[start : start + _BATCH]) -> None:
            if txn.get(Mark, done.name) is not None:
                return
            for identifier in chunk:
                event = txn.get(Event, identifier)
                if event is None or not _was_before(event):
                    continue
                opened = msgspec.structs.replace(
                    event,
                    open_for=topic(event.tenant_id, event.event_name, event.correlation_key),
                    expires_at=txn.now_us + _KEPT_US,
                    undated_at=_undated(txn),
                )
                txn.replace(opened)

        catalog.write(change, actor=_ACTOR)

    def mark(txn: Transaction) -> None:
        if txn.get(Mark, done.name) is None:
            txn.insert(done)

    catalog.write(mark, actor=_ACTOR)


def _was_before(event: Event) -> bool:
    """Whether it is of a format in which events had no end."""
    return event.expires_at is None and event.open_for is None
