"""Doing a thing once, however often it is asked for: after a crash, or by a client that retries.

What was done is remembered in the transaction that does it (invariant 6), so that there is no
moment at which it is done and not remembered. For the steps of runs this is invariant 14.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final, final

import msgspec

from cas.catalog import Snapshot, Transaction
from cas.clock import DAY_US
from cas.errors import KeyReused
from cas.events import Room, refuse_ended
from cas.records import Once

CLIENT_KEYS_US: Final = DAY_US  # how long keys that a client chose are remembered
KEY_CHARS_MAX: Final = 255
# Of a name that is kept as it is: the record has it once and the index three times.
_NAME_CHARS_MAX: Final = 64
_OF_RUN: Final = "run:"


@final
class OnceKey(msgspec.Struct, frozen=True):
    """Under which name something is done once. `asked` is what is asked for (any bytes), so
    that the same name with another question is refused; b"" takes any."""

    scope: str  # whose names they are: "run:<run>", "events", …
    name: str
    asked: bytes = b""
    keep_us: int | None = CLIENT_KEYS_US  # None: until its run is forgotten

    @property
    def of_run(self) -> bool:
        """Whether it is of a step of a run."""
        return self.scope.startswith(_OF_RUN)

    @property
    def kept_name(self) -> str:
        """Under which it is kept: a long name of others by its SHA-256, which no short name is
        spelt as. Those of steps stay as they are, since runs last longer than versions."""
        if self.of_run or len(self.name) <= _NAME_CHARS_MAX:
            return self.name
        return f"sha256:{hashlib.sha256(self.name.encode()).hexdigest()}"


def remembered(snapshot: Snapshot, tenant_id: str, key: OnceKey) -> Once | None:
    """What is remembered under this key; None where nothing was done under it."""
    return snapshot.get(Once, tenant_id, key.scope, key.kept_name)


def once(
    txn: Transaction,
    tenant_id: str,
    key: OnceKey | None,
    act: Callable[[], str],
    *,
    room: Room | None = None,
) -> tuple[str, bool]:
    """What `act` returns, and whether it was done now: it is not done where the same key was
    used before, whose result is returned in its place. Without a key it is always done.

    `room` is given where `act` tells an event, which may be gone soon: its key counts for the
    tenant then, unless it is of a step, which goes with its run.

    What `act` raises leaves no trace of the key. Raises KeyReused where the key was used for
    another question, RunEnded where it is that of a step whose run has ended, TooManyKept where
    there is no `room` for a new key.
    """
    if key is None:
        return act(), True
    asked = hashlib.sha256(key.asked).digest() if key.asked else b""
    found = remembered(txn, tenant_id, key)
    if found is not None:
        if found.asked != asked:
            raise KeyReused(key.name)
        return found.result, False
    if key.of_run:  # a step of a run that has ended begins nothing
        refuse_ended(txn, tenant_id, key.scope.removeprefix(_OF_RUN))
        room = None
    result = act()
    if room is not None:
        room.check_key(txn, tenant_id)
    expires_at = None if key.keep_us is None else txn.now_us + key.keep_us
    undated_at = None if txn.believed or expires_at is None else txn.now_us
    txn.insert(
        Once(
            tenant_id,
            key.scope,
            key.kept_name,
            result,
            asked,
            txn.now_us,
            expires_at,
            undated_at,
            of_event=room is not None,
        )
    )
    return result, True


def webhook_scope(webhook_id: str) -> str:
    """Whose names those of the calls are that a webhook took. They go with it."""
    return f"webhook:{webhook_id}"


def step_key(run: str, step: str, what: str) -> OnceKey:
    """The key of what one step of a run does (with its iteration, as in "sum#2")."""
    return OnceKey(f"{_OF_RUN}{run}", f"{step}/{what}", keep_us=None)
