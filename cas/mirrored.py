"""Mirrored: how far each target has come, for whoever shares ROOT with the background process.

What waits is counted in the catalog, in constant time; how the target itself is, only the
process that speaks to it knows, and says in its heartbeat.
"""

from __future__ import annotations

from typing import Final, final

import msgspec

from cas.background import Background, TargetState
from cas.clock import DAY_US, HOUR_US, SECOND_US
from cas.config import ReplicatorSettings
from cas.replicas import Backlog, backlog, targets
from cas.store import Store

_MINUTE_US: Final = 60 * SECOND_US


@final
class Mirrored(msgspec.Struct, frozen=True):
    """One target at one moment."""

    name: str
    place: str
    backlog: Backlog
    state: TargetState | None  # None: no process has spoken to it since it was configured
    stalled: tuple[str, ...]  # why it counts as stalled, in words; () when it does not

    @property
    def catch_up_s(self) -> float | None:
        """How long the backlog takes at the rate of the last minute; None: at none."""
        if not self.backlog.rows:
            return 0.0
        if self.state is None or not self.state.rows_per_s:
            return None
        by_rows_s = self.backlog.rows / self.state.rows_per_s
        if not self.state.bytes_per_s:
            return by_rows_s
        return max(by_rows_s, self.backlog.size_bytes / self.state.bytes_per_s)


def mirrored_of(store: Store, background: Background) -> list[Mirrored]:
    """The targets of a store, those included that are configured and not yet known to it."""
    beat = background.beat
    states = {state.name: state for state in beat.targets} if beat else {}
    with store.catalog.read() as snapshot:
        now_us = store.now_us(snapshot)
        places = {target.name: target.place for target in targets(snapshot)}
        backlogs = {name: backlog(snapshot, name, now_us) for name in places}
    for target in store.settings.targets:
        places.setdefault(target.name, "")
    found = []
    for name, place in places.items():
        waiting = backlogs.get(name, Backlog(0, 0, 0))
        state = _aged(states.get(name), background)
        stalled = tuple(_stalled(name, waiting, state, store.settings.replicator))
        found.append(Mirrored(name, place, waiting, state, stalled))
    return found


def _aged(state: TargetState | None, background: Background) -> TargetState | None:
    """A state with the time since its heartbeat added to its ages."""
    silent_us = background.silent_us or 0
    if state is None:
        return None
    return msgspec.structs.replace(
        state,
        canary_us=state.canary_us + silent_us,
        behind_us=state.behind_us + silent_us if state.behind_us else 0,
    )


def _stalled(
    name: str, waiting: Backlog, state: TargetState | None, settings: ReplicatorSettings
) -> list[str]:
    """Why a target counts as stalled. Each of the three ages alone is enough: a mirror that
    copies and does not ship cannot be restored from, and one that says all is well while
    nothing comes back is the worst."""
    limit_us = settings.stalled_after
    last_error = (state.down or state.last_error) if state else ""
    reason = f": {last_error}" if last_error else ""
    found = []
    if waiting.oldest_us > limit_us:
        copies = "1 copy waits" if waiting.rows == 1 else f"{waiting.rows:,} copies wait"
        oldest = shown_age(waiting.oldest_us)
        why = _why_waiting(waiting, state)
        found.append(f"target {name} is stalled: {copies}, the oldest for {oldest}{why}")
    if state is None:
        return found
    if state.fenced and state.probed:
        found.append(f"target {name} gets nothing from here: {state.fenced}")
    if state.behind_us > limit_us:
        age = shown_age(state.behind_us)
        found.append(f"target {name} is stalled: its metadata is {age} behind{reason}")
    # Between two canaries the last one is as old as their interval.
    if state.canary_us > max(limit_us, 2 * settings.canary_every):
        told = f": {state.canary_error}" if state.canary_error else reason
        age = shown_age(state.canary_us)
        found.append(f"target {name} is stalled: no canary came back for {age}{told}")
    return found


def _why_waiting(waiting: Backlog, state: TargetState | None) -> str:
    """A target that is down says why itself; else the oldest copy does, for the others may
    well succeed all the time."""
    if state is not None and state.down:
        return f": {state.down}"
    if waiting.oldest is not None and waiting.oldest_error:
        return f", {waiting.oldest.hex()}: {waiting.oldest_error}"
    return f": {state.last_error}" if state is not None and state.last_error else ""


def shown_age(age_us: int) -> str:
    """`45 s`, `12 min`, `5 h`, `3 days`: as a person would say it."""
    for unit_us, unit in ((DAY_US, "days"), (HOUR_US, "h"), (_MINUTE_US, "min")):
        if age_us >= 2 * unit_us:
            return f"{age_us // unit_us} {unit}"
    return f"{age_us // SECOND_US} s"
