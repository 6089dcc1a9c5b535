"""Signs: what the heartbeat tells of each target, with ages by a clock that nobody sets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import final

from cas.background import Heartbeat, JobState, TargetState
from cas.clock import SECOND_US
from cas.store import Store
from replicator.link import NOT_ASKED, Link


@final
class Signs:
    """Watches links. Ages go on from the last process's heartbeat, if it left one: a process
    that is started again and again must not look well."""

    def __init__(
        self,
        store: Store,
        links: Sequence[Link],
        before: Heartbeat | None,
        *,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        since_us = max(0, store.clock.now_us() - before.at) if before else 0
        states = {state.name: state for state in before.targets} if before else {}
        with store.catalog.read() as snapshot:
            seq = snapshot.position.seq
        self._store = store
        self._watched = [
            _Watched(link, states.get(link.name), since_us, seq, now_s) for link in links
        ]

    def states(self, jobs: Iterable[JobState] = ()) -> list[TargetState]:
        """How each target is now; `jobs` may have failed on its account."""
        errors = {job.name.rpartition(" ")[2]: job.last_error for job in jobs if job.failures}
        with self._store.catalog.read() as snapshot:
            seq = snapshot.position.seq
        return [watched.state(seq, errors) for watched in self._watched]


@final
class _Watched:
    """One link, and since when what is true of it."""

    def __init__(
        self,
        link: Link,
        before: TargetState | None,
        since_us: int,
        seq: int,
        now_s: Callable[[], float],
    ) -> None:
        self._link = link
        self._now_s = now_s
        self._began_s = now_s()
        self._worked_before = before is not None and before.canary_worked
        # A frame that is not there yet, and since when that is known; seq 0: none.
        self._lacking_seq, self._lacking_since_s = seq, self._began_s
        if before is not None and before.place == link.target.place:
            if before.behind_us:
                self._lacking_since_s -= (before.behind_us + since_us) / SECOND_US
            self._began_s -= (before.canary_us + since_us) / SECOND_US

    def state(self, seq: int, errors: Mapping[str, str]) -> TargetState:
        link, now_s = self._link, self._now_s()
        rows_per_s, bytes_per_s = link.speed.a_second()
        sung_at_s = link.canary_at_s
        return TargetState(
            name=link.name,
            place=link.target.place,
            probed=link.profile is not None,
            fenced="" if link.fenced == NOT_ASKED else link.fenced,
            down=link.down,
            last_error=link.last_error or errors.get(link.name, ""),
            rows_per_s=rows_per_s,
            bytes_per_s=bytes_per_s,
            shipped_seq=link.shipped_seq,
            shipped_at=link.shipped_at_us,
            behind_us=self._behind_us(seq, now_s),
            canary_us=_us(now_s - (self._began_s if sung_at_s is None else sung_at_s)),
            canary_worked=sung_at_s is not None or self._worked_before,
            canary_error=link.canary_error,
        )

    def _behind_us(self, seq: int, now_s: float) -> int:
        """How long the oldest frame has waited that is not at the target, to a heartbeat."""
        shipped_seq = self._link.shipped_seq
        if shipped_seq >= seq:
            self._lacking_seq = 0
            return 0
        if shipped_seq >= self._lacking_seq:
            # Those that were lacking are there, those that came since then are not.
            self._lacking_seq, self._lacking_since_s = seq, now_s
        return max(1, _us(now_s - self._lacking_since_s))


def _us(seconds: float) -> int:
    return max(0, int(seconds * SECOND_US))
