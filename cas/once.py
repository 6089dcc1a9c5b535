"""Doing a thing once, however often it is asked for: after a crash, or by a client that retries.

What was done is remembered in the transaction that does it (invariant 6), so that there is no
moment at which it is done and not remembered. For the steps of runs this is invariant 14.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final, final

import msgspec

from cas.catalog import Transaction
from cas.clock import DAY_US
from cas.errors import KeyReused
from cas.events import refuse_ended
from cas.records import Once

CLIENT_KEYS_US: Final = DAY_US  # how long keys that a client chose are remembered
KEY_CHARS_MAX: Final = 255
_OF_RUN: Final = "run:"


@final
class OnceKey(msgspec.Struct, frozen=True):
    """Under which name something is done once. `asked` is what is asked for (any bytes), so
    that the same name with another question is refused; b"" takes any."""

    scope: str  # whose names they are: "run:<run>", "events", …
    name: str
    asked: bytes = b""
    keep_us: int | None = CLIENT_KEYS_US  # None: until its run is forgotten


def once(
    txn: Transaction, tenant_id: str, key: OnceKey | None, act: Callable[[], str]
) -> tuple[str, bool]:
    """What `act` returns, and whether it was done now: it is not done where the same key was
    used before, whose result is returned in its place. Without a key it is always done.

    What `act` raises leaves no trace of the key. Raises KeyReused where the key was used for
    another question, RunEnded where it is that of a step whose run has ended.
    """
    if key is None:
        return act(), True
    asked = hashlib.sha256(key.asked).digest() if key.asked else b""
    found = txn.get(Once, tenant_id, key.scope, key.name)
    if found is not None:
        if found.asked != asked:
            raise KeyReused(key.name)
        return found.result, False
    if key.scope.startswith(_OF_RUN):  # a step of a run that has ended begins nothing
        refuse_ended(txn, tenant_id, key.scope.removeprefix(_OF_RUN))
    result = act()
    expires_at = None if key.keep_us is None else txn.now_us + key.keep_us
    undated_at = None if txn.believed or expires_at is None else txn.now_us
    txn.insert(
        Once(tenant_id, key.scope, key.name, result, asked, txn.now_us, expires_at, undated_at)
    )
    return result, True


def step_key(run: str, step: str, what: str) -> OnceKey:
    """The key of what one step of a run does (with its iteration, as in "sum#2")."""
    return OnceKey(f"{_OF_RUN}{run}", f"{step}/{what}", keep_us=None)
