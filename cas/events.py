"""Events: what happened, committed in the transaction of the change (invariant 6)."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from cas.catalog import Transaction
from cas.identifiers import new_id
from cas.records import Event

_encode = msgspec.json.Encoder().encode


def append_event(
    txn: Transaction,
    tenant_id: str,
    event_name: str,
    payload: Mapping[str, object],
    correlation_key: str | None = None,
) -> Event:
    """Record an event inside the transaction of what it speaks of.

    The store's own events are kept until something consumes them, so a workflow that waits
    later than the upload completes still gets it.
    """
    event = Event(
        new_id(txn.now_us), tenant_id, event_name, correlation_key, _encode(payload), txn.now_us
    )
    txn.insert(event)
    return event
