"""Events of the token's tenant at a server: posting them, and waiting for them."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final, final
from urllib.parse import quote

import httpx

from cas.errors import BlobcaskError
from cas.once import OnceKey
from cas.references import DIRECT_RUN
from cas.remote.idempotency import once_header
from cas.remote.wire import JSON, Wire

# Of one request: short enough for the proxies in between, and for what servers allow.
_POLL_S_MAX: Final = 30
# How long the server may be silent when it is to forget what it told: the event is here, and who
# waits for it must not be kept from it.
_FORGETTING_S: Final = 2.0


@final
class RemoteEvents:
    """The events and waits of one tenant. Safe for threads."""

    def __init__(self, wire: Wire, tenant_id: str) -> None:
        self._wire = wire
        self._path = f"/api/v1/events/{quote(tenant_id, safe='')}"

    def emit(
        self,
        event_name: str,
        payload: Any = None,
        correlation_key: str | None = None,
        *,
        hold_s: int | None = None,
        key: OnceKey | None = None,
    ) -> JSON:
        """Post an event; the answer has `event_id` and `delivered_to`. Durable on return.

        `hold_s`: where nobody waits it is kept so long, for the first wait that begins. A lost
        answer is asked for again, and makes no second event.

        Raises NoWaitingWorkflow, TooManyHeld where it is to be held and there is no room,
        TooManyKept where there is none for any, InvalidRequest, TooLarge, KeyReused, AccessDenied.
        """
        asked: JSON = {"event_name": event_name, "payload": payload}
        if correlation_key is not None:
            asked["correlation_key"] = correlation_key
        if hold_s is not None:
            asked["hold"] = hold_s
        return self._wire.form("POST", self._path, form=asked, headers=once_header(key))

    def wait(
        self,
        event_name: str,
        correlation_key: str | None = None,
        timeout_s: float | None = None,
        *,
        run: str = DIRECT_RUN,
        waiter: str | None = None,
    ) -> JSON:
        """Block until the event comes or `timeout_s` is over (None: for ever), asking again as
        often as the server gives up; what comes in between is kept there.

        The answer's `status` is "delivered" or "timeout"; that may come early, where a workflow
        comes to wait with the same correlation key, or, then `ended` is true beside it, the wait
        was ended under its name. Under the name of a `waiter` the same wait
        is found again, and the same event, by a process that takes over, until `end_wait`.
        Without one nothing is kept for later there. Another `run` than "direct" needs the
        permission manage_workflows.

        Raises SubscriptionTaken, TooManyKept, InvalidRequest, AccessDenied, ServerUnreachable.
        """
        ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        params: dict[str, str | int | None] = {
            "event_name": event_name,
            "correlation_key": correlation_key,
            "run": _unless_direct(run),
            "waiter": waiter or uuid.uuid4().hex,
        }
        form = self._poll_until_answered(params, ends_at)
        if waiter is None and form["status"] == "delivered":
            # Nobody else knows the name. Tried once: the event is here, and what is not ended now
            # is so after `[events] keep`.
            with suppress(BlobcaskError, httpx.TransportError):
                once = partial(self._wire.once, silence_s=_FORGETTING_S)
                self._end(once, form["waiter"], form["event_id"], run)
        return form

    def end_wait(self, waiter: str, event_id: str | None = None, *, run: str = DIRECT_RUN) -> None:
        """Have the server forget what this waiter was told, which is kept there for who asks
        again: its name may wait for the next event then. Ends a wait that goes on, too, for which
        `wait` returns a timeout, `ended`, within seconds, or half a minute where the name waits
        again at once; one that was just between two requests goes on.

        With the `event_id` that it was told, only where this is what the wait came to. Nothing
        happens where there is no such wait. Raises InvalidName, AccessDenied, ServerUnreachable.
        """
        self._end(self._wire.ask, waiter, event_id, run)

    def _end(self, ask: Callable[..., object], waiter: str, event_id: str | None, run: str) -> None:
        named = {"waiter": waiter, "event_id": event_id, "run": _unless_direct(run)}
        ask("DELETE", f"{self._path}/wait", params=named)

    def _poll_until_answered(
        self, params: dict[str, str | int | None], ends_at: float | None
    ) -> JSON:
        while True:
            left_s = _POLL_S_MAX if ends_at is None else max(0.0, ends_at - time.monotonic())
            # In whole seconds, as the server counts them, and never too short. It may give up
            # earlier than it was asked to.
            params["timeout"] = min(_POLL_S_MAX, math.ceil(left_s))
            if not left_s:
                # Nothing may be left of it there, which would take an event that others need.
                params["linger"] = 0
            form = self._wire.form("GET", f"{self._path}/wait", params=params)
            # Of one that was ended nothing is left to go on with.
            if form["status"] != "timeout" or form.get("ended") or not left_s:
                return form


def _unless_direct(run: str) -> str | None:
    return None if run == DIRECT_RUN else run
