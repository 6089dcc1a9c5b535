"""The jobs that take away at a target what nobody needs there.

Removal     the copies of blobs that are gone: `delete_delay` after their record went, and only
            once the journal at the target tells so. `deleting` is durable before the first
            DELETE is sent, and the row goes after the target has answered: then, and only
            then, may the same blob be copied there anew. HEAD at the target is judged before
            each batch, whatever shipping knew a while ago: what this node has no use for may
            be another node's by now (invariant 12). A target that takes nothing more, since
            it is full, is still deleted at: that is what gives it room.
Abandoned   multipart uploads that no record names, such as those of a process that was killed
            between beginning one and writing it down. They cost, and are in no listing.

A DELETE that was not answered may still be on its way, in a proxy or in the server, and arrive
after a new copy. So its row stays `deleting` until another one was answered, a while later. The
row tells when it was sent, for a process that is started anew for each round. One that was
answered and refused, as for an object under a lock, comes again later, after all others.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar, final

from cas.clock import DAY_US, HOUR_US, SECOND_US
from cas.digest import Digest
from cas.errors import Conflict
from cas.records import DELETING, Copy, Replica
from cas.replicas import begin_removals, end_removals, put_off_removals, removable
from cas.restored import waits_for_acceptance
from cas.store import Store
from replicator.fence import Fenced, judge, node_of, read_head
from replicator.link import Link
from replicator.targets import (
    HEAD,
    OBJECTS,
    ObjectAbsent,
    ObjectRefused,
    TargetError,
    TargetRefused,
    TargetUnreachable,
    Unfinished,
    object_key,
)

T = TypeVar("T")

# Beyond this no server or proxy that we know of still has a request in its hands.
LATE_S: Final = 120.0
# The same by catalog time, which may leap while a clock is set right: a new process knows no
# other one.
_LATE_US: Final = HOUR_US
# From the first refusal of a DELETE to its next attempt; doubled after each more.
_REFUSED_US: Final = 60 * SECOND_US
_REFUSED_US_MAX: Final = HOUR_US
_DELETES_AT_ONCE: Final = 8
_BATCH: Final = 256
_ABANDONED_EVERY_S: Final = 3600.0
_ABANDONED_MOST: Final = 10_000  # looked at in a step
# A nameless upload that was begun so long before the newest object there is nobody's, also
# where this process has not seen it twice. Both times are the target's own.
_ABANDONED_US: Final = DAY_US

_log = logging.getLogger("blobcask.mirror")


@final
class Removal:
    """See the module. A `replicator.loop.Job`, one for each target."""

    interval_s: Final = 5.0

    def __init__(
        self,
        store: Store,
        link: Link,
        delete_delay_us: int,
        *,
        late_s: float = LATE_S,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = f"remove {link.name}"
        self._store = store
        self._link = link
        self._delete_delay_us = delete_delay_us
        self._late_s = late_s
        self._now_s = now_s
        self._threads = ThreadPoolExecutor(_DELETES_AT_ONCE + 1, thread_name_prefix=self.name)
        self._begun: set[Digest] = set()  # by this process: no DELETE before ours
        # When the last DELETE that was not answered was sent.
        self._unanswered: dict[Digest, float] = {}
        self._refused: TargetError | None = None  # the first one of this round

    async def step(self, now_us: int) -> bool:
        """One batch; True while there may be more.

        Raises Conflict while something waits that may not be judged by the clock
        (invariant 10), Fenced, and the first TargetError after all others had their turn.
        """
        if not self._link.open:
            return False
        rows, trouble = await self._in_thread(self._begin, now_us)
        silent = threading.Event()
        answers: list[TargetError | None] = await asyncio.gather(
            *(self._in_thread(self._delete, row, silent) for row in rows)
        )
        await self._in_thread(self._end, rows, answers, now_us)
        if len(rows) == _BATCH and all(_is_an_answer(error) for error in answers):
            return True
        refused, self._refused = self._refused, None
        unanswered = next((error for error in answers if not _is_an_answer(error)), None)
        for error in (unanswered, refused, trouble):
            if error is not None:
                raise error
        return False

    async def close(self) -> None:
        """What was begun is ended after the next start."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    # --- which

    def _begin(self, now_us: int) -> tuple[list[Replica], Conflict | None]:
        """The rows to send a DELETE for now: they say `deleting`, durably. And what keeps
        others waiting."""
        store, link = self._store, self._link
        before_us = now_us - self._delete_delay_us
        with store.catalog.read() as snapshot:
            found = removable(snapshot, link.name, before_us, link.shipped_seq, _BATCH)
            restored = waits_for_acceptance(snapshot)
        if restored:
            return [], Conflict(f"nothing is deleted at a target: {restored}") if found else None
        trouble = _trouble(store, found)
        if trouble is not None:
            found = [row for row in found if row.state == DELETING]
        found = [row for row in found if self._is_of_use(row, now_us)]
        if not found:
            return [], trouble
        shipped_seq = _told_seq(store, link)
        begun = begin_removals(
            store.catalog,
            [row for row in found if row.state == DELETING or row.seq <= shipped_seq],
        )
        self._begun.update(row.digest for row in begun)
        _told_seq(store, link)  # once more: so little time lies between this and the DELETEs
        return begun, trouble

    def _is_of_use(self, row: Replica, now_us: int) -> bool:
        """Whether a DELETE sent now can be the last one that arrives."""
        if row.state != DELETING or row.sent_at is None:
            return True
        if row.digest not in self._begun:  # by another process
            if now_us - row.sent_at >= _LATE_US and not self._store.clock_trouble():
                return True
            self._unanswered.setdefault(row.digest, self._now_s())
        sent_s = self._unanswered.get(row.digest)
        return sent_s is None or self._now_s() - sent_s >= self._late_s

    # --- deleting

    def _delete(self, row: Replica, silent: threading.Event) -> TargetError | None:
        """Send one DELETE, and say what went wrong. `silent`: the target answers no more."""
        target = self._link.target
        if silent.is_set():
            return TargetUnreachable(target.name, "it did not answer just now")
        with self._store.catalog.read() as snapshot:
            unfinished = snapshot.get(Copy, row.target, row.digest)
        try:
            if unfinished is not None:
                target.abort(object_key(row.digest), unfinished.upload_id)
            target.delete(object_key(row.digest))
        except TargetUnreachable as error:
            silent.set()
            self._unanswered[row.digest] = self._now_s()
            return error
        except TargetError as error:
            return error
        return None

    def _end(
        self, rows: Sequence[Replica], answers: Sequence[TargetError | None], now_us: int
    ) -> None:
        """Write down what was answered."""
        catalog, told = self._store.catalog, list(zip(rows, answers, strict=True))
        ended = [row for row, error in told if error is None]
        if ended:
            end_removals(catalog, ended)
        before_us = now_us - self._delete_delay_us
        refused = [
            (row, str(error), before_us + _pause_us(row.attempts))
            for row, error in told
            if isinstance(error, ObjectRefused | TargetRefused)
        ]
        if refused:
            put_off_removals(catalog, refused)
        for row, error in told:
            if _is_an_answer(error):
                self._begun.discard(row.digest)
                self._unanswered.pop(row.digest, None)
                self._refused = self._refused or error

    async def _in_thread(self, call: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *args)


def _told_seq(store: Store, link: Link) -> int:
    """The newest frame that HEAD at the target, which is this node's, names now.

    Raises Fenced where it is not, JournalDamaged, TargetError.
    """
    target = link.target
    seen = read_head(target)
    if seen.head is None:
        raise Fenced(f"HEAD.json is gone from {target.place}")
    judge(store.catalog, store.store_id(), node_of(store.root, store.disk), target, seen)
    return seen.head.seq


def _is_an_answer(error: TargetError | None) -> bool:
    """Whether the target has said what became of a DELETE, so that it is not on its way."""
    return error is None or isinstance(error, ObjectRefused | TargetRefused)


def _pause_us(attempts: int) -> int:
    return int(min(_REFUSED_US << min(attempts, 16), _REFUSED_US_MAX))


def _trouble(store: Store, found: list[Replica]) -> Conflict | None:
    """Why those of `found` that are not being deleted already must wait."""
    if all(row.state == DELETING for row in found):
        return None
    trouble = store.clock_trouble()
    return Conflict(f"nothing is deleted at a target: {trouble}") if trouble else None


@final
class Abandoned:
    """Aborts multipart uploads that no record names. A `replicator.loop.Job` of each target.

    One of a blob is aborted when it was found nameless twice, an interval apart: it may have
    been begun a moment ago. Any is when it was begun a day before the newest write there, both
    by the target's clock: then a process that is started for each round ends it too, and one
    of a checkpoint, which a restoring node may be sending, has had its time.
    """

    interval_s: Final = _ABANDONED_EVERY_S

    def __init__(self, store: Store, link: Link) -> None:
        self.name = f"abort {link.name}"
        self._store = store
        self._link = link
        self._threads = ThreadPoolExecutor(1, thread_name_prefix=self.name)
        self._seen: set[tuple[str, str]] = set()  # (key, upload_id), at the last look

    async def step(self, _now_us: int) -> bool:
        """A look at all that are under way; never more to do. Raises TargetError, Fenced."""
        profile = self._link.profile
        if self._link.open and profile is not None and profile.multipart:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._threads, self._abort_nameless)
        return False

    def _abort_nameless(self) -> None:
        found = self._nameless()
        if found:
            _told_seq(self._store, self._link)  # another node has records of its own
        old_us = self._newest_us() - _ABANDONED_US if found else 0
        seen, self._seen = self._seen, set()
        for one in found:
            name = (one.key, one.upload_id)
            twice = name in seen and one.key.startswith(OBJECTS)
            if twice or one.begun_us < old_us:
                self._link.target.abort(*name)
                _log.warning(
                    "%s: aborted an upload of %s that nobody knew", self._link.name, one.key
                )
            else:
                self._seen.add(name)

    def _newest_us(self) -> int:
        """The target's own time, or a little before it."""
        try:
            return self._link.target.stat(HEAD).modified_us
        except ObjectAbsent:
            return 0

    def _nameless(self) -> list[Unfinished]:
        under_way: list[Unfinished] = []
        for unfinished in self._link.target.unfinished():
            under_way.append(unfinished)
            if len(under_way) == _ABANDONED_MOST:
                break
        if not under_way:
            return []
        known = self._known()
        return [
            found
            for found in under_way
            if (found.key, found.upload_id) not in known
            and found.upload_id not in self._link.nameless
        ]

    def _known(self) -> set[tuple[str, str]]:
        known: set[tuple[str, str]] = set()
        after: tuple[bytes, ...] = ()
        with self._store.catalog.read() as snapshot:
            while copies := snapshot.range(Copy, "", (self._link.name,), after=after, limit=1000):
                known.update((object_key(copy.digest), copy.upload_id) for copy in copies)
                after = (copies[-1].digest,)
        return known

    async def close(self) -> None:
        """Nothing is left open between steps."""
        self._threads.shutdown(wait=False, cancel_futures=True)
