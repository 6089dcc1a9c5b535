"""Events: posting one to the workflows that wait for it, and waiting for one by long-poll.

    POST   /api/v1/events/{tenant_id}         given to all that wait, or held, or refused
    GET    /api/v1/events/{tenant_id}/wait    answered when the event comes, or the time is over
    DELETE /api/v1/events/{tenant_id}/wait    the waiter has its answer, or wants none any more

All need a bearer token of that very tenant; to any other token there is nothing here
(invariant 9). Who may post may not wait for that alone: a payment system posts, and has no
business with what approvals and webhooks say. The gateway runs no workflow: it records the
event, which wakes who waits.

A waiter may have a name of its own. What is recorded is the wait of that name, not the request:
it outlives a lost connection by LINGER_S, so that who asks again by the same name misses
nothing, and is told the same event again where the first answer was lost, until it says that it
has it: then the name is free for the next. One without a name
ends with its request, and leaves nothing behind when it was in vain; not for long, either, where
the process is killed that held it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Final, Literal, NotRequired, TypedDict, final

import falcon
import msgspec

from cas.clock import SECOND_US
from cas.config import EventSettings
from cas.errors import (
    InvalidName,
    InvalidRequest,
    KeyReused,
    NotFound,
    NoWaitingWorkflow,
    StoreFull,
    SubscriptionTaken,
    TooLarge,
    TooManyHeld,
    TooManyKept,
    TooManyWaiters,
)
from cas.records import CLIENT_STEP, NAMELESS_STEP, Subscription
from cas.references import DIRECT_RUN, check_name
from cas.setting_kinds import parse_duration
from gateway import forms, idempotency
from gateway.auth import EMIT_EVENTS, MANAGE_WORKFLOWS, WAIT_EVENTS, Caller, Tokens
from gateway.board import Waiters
from gateway.body import BodyTooSlow, BodyTruncated, read_small, refuse_encodings
from gateway.door import Door
from gateway.errors import PermissionMissing
from gateway.operations import Parameter, Reply, Right, operation
from gateway.parking import CAN_PARK, PARKED, RESUMED, Parked
from workflows.events import Claimed, Emitted, Events

# After its last poll, a wait goes on for so long: for the next poll of the same waiter.
LINGER_S: Final = 300
# Of a body, besides the payload; and it may be written with spaces and escapes.
_ENVELOPE_BYTES: Final = 16 * 1024
_TIMEOUT_S_MAX: Final = 24 * 3600  # a longer poll than [events] poll_max is cut to that


class EventForm(msgspec.Struct, forbid_unknown_fields=True):
    """What happened. `hold` keeps it for the first waiter that comes, where there is none yet:
    true for as long as the server does, else a number of seconds or a text such as "2h"."""

    event_name: str
    correlation_key: str | None = None
    payload: Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={"default": {}})] = (
        msgspec.field(default_factory=lambda: msgspec.Raw(b"{}"))
    )
    hold: bool | int | str = False


class AcceptedForm(TypedDict):
    """The event was taken. `delivered_to`: how many waits it was given to, 0 where it is held."""

    status: Literal["accepted"]
    event_id: str
    delivered_to: int
    message: str


class WaitedForm(TypedDict):
    """How a poll ended; what speaks of the event is there when one was delivered. `waiter` is
    the one that was given, or a name that was made for the request, by which nobody can ask
    again. A timeout may come early:
    where the server stops, a workflow comes to wait with the same correlation key, or the client
    sends more than 8 KiB before it is answered. With `ended` nothing is left of the wait that
    was asked about: it was ended (DELETE), also where its name waits again since. To ask once
    more would begin another."""

    status: Literal["delivered", "timeout"]
    subscription_id: str
    waiter: str
    ended: NotRequired[Literal[True]]
    event_id: NotRequired[str]
    event_name: NotRequired[str]
    correlation_key: NotRequired[str | None]
    payload: NotRequired[Any]


@final
@dataclass(frozen=True, slots=True)
class _Poll:
    """One request that waits."""

    caller: Caller
    wait: Subscription  # as it was when this began: its name may wait for another event since
    waiter: str
    named: bool  # by the client, which can ask again by this name


@final
class EventsResource:
    """`/api/v1/events/{tenant_id}` and `/wait` below it"""

    def __init__(
        self, door: Door, tokens: Tokens, waiters: Waiters, settings: EventSettings
    ) -> None:
        self._door = door
        self._tokens = tokens
        self._waiters = waiters
        self._settings = settings

    @operation(
        Right.BEARER,
        name="postEvent",
        body=EventForm,
        parameters=[idempotency.PARAMETER],
        replies={200: Reply("The event is recorded, durably.", AcceptedForm)},
        refuses=[
            InvalidRequest,
            NotFound,
            NoWaitingWorkflow,
            PermissionMissing,
            KeyReused,
            TooLarge,
            TooManyHeld,
            TooManyKept,
            BodyTruncated,
            BodyTooSlow,
        ],
    )
    def on_post(self, req: falcon.Request, resp: falcon.Response, tenant_id: str) -> None:
        """Tell waiting workflows that something happened.

        It wakes those that wait for this name with this correlation key, or both without one.
        """
        caller = self._caller(req, tenant_id)
        caller.need(EMIT_EVENTS)
        self._door.event(req, caller)
        refuse_encodings(req.env)
        body = read_small(req.env, 2 * self._settings.payload_max + _ENVELOPE_BYTES)
        key = idempotency.once_key(req, "events", body)
        events = self._door.events(caller, req.context.request_id)
        with forms.building(body):
            asked = forms.read(body, EventForm)
            emitted = events.emit(
                asked.event_name,
                forms.built("payload", asked.payload, Any, self._settings.payload_max),
                asked.correlation_key,
                hold_us=self._hold_us(asked.hold),
                key=key,
            )
        forms.answer(resp, _accepted(emitted))

    @operation(
        Right.BEARER,
        name="waitForEvent",
        parameters=[
            Parameter("event_name", "What is waited for.", required=True),
            Parameter("correlation_key", "Which one of them; without, those that have none."),
            Parameter(
                "timeout",
                "Seconds after which there is an answer in any case; the server has a most, "
                "which is what counts without it.",
                int,
            ),
            Parameter(
                "waiter",
                "A name of the client's choice for this one wait. Who asks again by it goes on "
                f"with the same wait, up to {LINGER_S} s after the last poll, and is answered "
                "the same event, until the wait is ended (DELETE). Without, nothing is left of the "
                "wait after a timeout, and what comes between two polls is missed, unless it is "
                "held.",
            ),
            Parameter(
                "linger",
                "Seconds for which the wait goes on when this poll is over, for the next poll of "
                f"the same waiter: {LINGER_S} at most, and where none are given. With 0, and of "
                "one without a name, nothing is left that would take an event from others.",
                int,
            ),
            Parameter(
                "run",
                "A run whose own events are waited for, beside those that are meant for all; it "
                "needs the permission manage_workflows. They are not taken from the run.",
            ),
        ],
        replies={200: Reply("The event, or that the time is over.", WaitedForm)},
        refuses=[
            InvalidRequest,
            InvalidName,
            NotFound,
            PermissionMissing,
            SubscriptionTaken,
            TooManyKept,
            TooManyWaiters,
            StoreFull,
        ],
    )
    def on_get_wait(self, req: falcon.Request, resp: falcon.Response, tenant_id: str) -> None:
        """Wait for an event, and take it.

        It needs the permission wait_events or manage_workflows: to emit events is not enough.
        With a correlation key there is one waiter at a time; without, all of them get it. A
        workflow that waits with the same key comes first, and ends this wait. A client must
        keep its connection open in both directions: one that closes its sending side is
        answered at once.
        """
        if req.method == "HEAD":  # it would take the event and not tell it
            raise falcon.HTTPMethodNotAllowed(["GET"])
        parked: Parked | None = req.env.get(RESUMED)
        if parked is None:
            form = self._begin(req, tenant_id)
            if form is None:
                return
        else:
            parked.leave()
            form = self._end(req, parked)
        forms.answer(resp, form)

    @operation(
        Right.BEARER,
        name="endWait",
        parameters=[
            Parameter("waiter", "The name that was waited under.", required=True),
            Parameter(
                "event_id",
                "The event that it was told: the wait is ended only where this is what it came "
                "to. Give it, and to ask for this once more, however late, is harmless also "
                "where the name waits again.",
            ),
            Parameter("run", "As the wait has it."),
        ],
        replies={204: Reply("There is no such wait, whether there was one or not.")},
        refuses=[InvalidRequest, InvalidName, NotFound, PermissionMissing],
    )
    def on_delete_wait(self, req: falcon.Request, resp: falcon.Response, tenant_id: str) -> None:
        """End the wait of a waiter, which has its event or wants none any more.

        It needs what waiting needs. What the waiter was told is kept for nobody else, counts no
        more, and the name may wait for another event. Of a wait that goes on, and of one that
        was not told its event yet, a held event is there for others. Requests that wait under
        the name are answered a timeout with `ended`, when their time is over at the latest.
        """
        caller, run = self._waiting_caller(req, tenant_id)
        waiter = req.get_param("waiter")
        if not waiter:
            raise InvalidRequest("waiter", "say whose wait is to end")
        events = self._door.events(caller, req.context.request_id)
        events.end(run, f"{CLIENT_STEP}{check_name(waiter)}", req.get_param("event_id"))
        resp.status = 204

    def _begin(self, req: falcon.Request, tenant_id: str) -> WaitedForm | None:
        """Begin the wait, or go on with it, in this thread where it cannot be parked; None where
        it is."""
        caller, run = self._waiting_caller(req, tenant_id)
        event_name = req.get_param("event_name")
        if not event_name:
            raise InvalidRequest("event_name", "say what is waited for")
        most_s = self._settings.poll_max // SECOND_US
        patience_s = min(forms.whole_number(req, "timeout", most_s, 0, _TIMEOUT_S_MAX), most_s)
        linger_s = forms.whole_number(req, "linger", LINGER_S, 0, LINGER_S)
        given = req.get_param("waiter")
        waiter = f"poll-{uuid.uuid4()}" if given is None else check_name(given)
        if given is None:
            linger_s = 0
        events = self._door.events(caller, req.context.request_id)
        self._waiters.enter(caller.tenant_id)
        leaving: list[Callable[[], object]] = [partial(self._waiters.leave, caller.tenant_id)]
        try:
            try:
                wait = events.subscribe(
                    run,
                    # Which is no step of any run.
                    f"{NAMELESS_STEP if given is None else CLIENT_STEP}{waiter}",
                    event_name,
                    req.get_param("correlation_key"),
                    (patience_s + linger_s) * SECOND_US,
                    renew=True,
                )
            except KeyReused:
                raise InvalidRequest("waiter", "this one waits for another event") from None
            poll = _Poll(caller, wait, waiter, given is not None)
            parked = Parked(poll, req.context.request_id, patience_s)
            form = _look(events, poll) if patience_s else _last_look(events, poll)
            if form is None:
                leaving.append(self._door.watch(wait, parked.ring))
                if req.env.get(CAN_PARK):
                    parked.on_leaving(leaving)
                    leaving = []
                    req.env[PARKED] = parked
                else:
                    parked.wait()
                    form = _last_look(events, poll)
            return form
        finally:
            for act in leaving:
                act()

    def _end(self, req: falcon.Request, parked: Parked) -> WaitedForm:
        """What came while it was parked. A client that left may have closed its sending side
        alone, and read still: it is told what nobody else may have any more."""
        poll: _Poll = parked.kept
        events = self._door.events(poll.caller, req.context.request_id)
        return _last_look(events, poll, gone=parked.gone)

    def _waiting_caller(self, req: falcon.Request, tenant_id: str) -> tuple[Caller, str]:
        """Who may wait here, and the run whose events are meant."""
        caller = self._caller(req, tenant_id)
        caller.need(WAIT_EVENTS)
        run = req.get_param("run", default=DIRECT_RUN)
        if run != DIRECT_RUN:  # what its approvals and webhooks say is not for everybody
            caller.need(MANAGE_WORKFLOWS)
        return caller, run

    def _caller(self, req: falcon.Request, tenant_id: str) -> Caller:
        caller = self._tokens.caller(req)
        if caller.tenant_id != tenant_id:
            raise NotFound("tenant", tenant_id)
        return caller

    def _hold_us(self, hold: bool | int | str) -> int | None:
        """For how long an event is held; the longest is judged where it is recorded."""
        if isinstance(hold, bool):
            return self._settings.hold_max if hold else None
        if isinstance(hold, int):
            return hold * SECOND_US  # any number of digits, as far as JSON goes
        try:
            return parse_duration(hold)
        except ValueError as error:
            raise InvalidRequest("hold", str(error)) from None


def _look(events: Events, poll: _Poll) -> WaitedForm | None:
    """What a wait came to; None while it goes on."""
    try:
        claimed = events.claim(poll.wait.subscription_id, poll.wait)
    except NotFound:  # ended meanwhile, or forgotten, since it took minutes to get here
        return {**_in_vain(poll), "ended": True}
    return None if claimed is None else _waited(poll, claimed)


def _last_look(events: Events, poll: _Poll, *, gone: bool = False) -> WaitedForm:
    """The same when the time is over. Nothing is left of a wait that nobody can ask for; where
    its client is `gone`, a held event is there for others again."""
    if poll.named:
        return _look(events, poll) or _in_vain(poll)
    finish = events.leave if gone else events.conclude
    try:
        claimed = finish(poll.wait.subscription_id)
    except NotFound:  # forgotten
        claimed = None
    return _in_vain(poll) if claimed is None else _waited(poll, claimed)


def _accepted(emitted: Emitted) -> AcceptedForm:
    count = emitted.delivered_to
    if count == 0:
        message = "Event held for the first workflow that waits for it"
    elif count == 1:
        message = "Event delivered to waiting workflow"
    else:
        message = f"Event delivered to {count} waiting workflows"
    return {
        "status": "accepted",
        "event_id": emitted.event_id,
        "delivered_to": count,
        "message": message,
    }


def _in_vain(poll: _Poll) -> WaitedForm:
    return {
        "status": "timeout",
        "subscription_id": poll.wait.subscription_id,
        "waiter": poll.waiter,
    }


def _waited(poll: _Poll, claimed: Claimed) -> WaitedForm:
    if claimed.event is None:
        return _in_vain(poll)
    return {
        "status": "delivered",
        "subscription_id": poll.wait.subscription_id,
        "waiter": poll.waiter,
        "event_id": claimed.event.event_id,
        "event_name": claimed.event.event_name,
        "correlation_key": claimed.event.correlation_key,
        "payload": claimed.payload,
    }
