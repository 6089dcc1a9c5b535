"""The mirror: the job that copies to one target whatever its rows want there.

The catalog says what is to be done: a row for each blob, made with it. A step looks at what
is due, longest due first, and starts as many copies as there are places; each lands by
itself, and what became of it is written down together with others, one write for many.

    places      `concurrency` at a time; large blobs, and those that must be fetched from
                another target first, have a quarter of them, so that nothing waits for hours
                behind a few of those
    failures    a row that failed waits, and so does a target: see `patience`
    wrong here  bytes that are not the digest's are never sent: the scrub looks at them, says
                that they are missing, and an upload or another target heals them
    asked for   `copy_now` makes one copy ahead of the queue, for an upload that waits for it

No target knows of another one: each has its own places, threads and patience. Time here is
catalog time that goes on when the clock is wrong: catalog time itself stands still then, and
no failed row would ever be tried again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final, TypeVar, final

import msgspec

from cas.clock import SECOND_US
from cas.digest import Digest
from cas.errors import BlobElsewhere, BlobUnavailable, CopyUnconfirmed
from cas.records import COPYING, DELETING, Copy, Replica
from cas.replicas import Copying, Done, Failed, Outcome
from cas.scrub import Scrub
from cas.store import Store
from replicator.bandwidth import Bandwidth, SendingStopped
from replicator.copying import PARTS_AT_ONCE, Copier, Keep, UploadForgotten, Wanted
from replicator.link import Link
from replicator.loop import ENDING
from replicator.patience import PAUSE_US_MAX, Patience, foreseen, manner_of
from replicator.settling import Settling
from replicator.targets import HEAD, BytesDiffer, TargetError
from replicator.waiting import Item, Look, Waiting, item_of

T = TypeVar("T")
Bring = Callable[[Digest], Awaitable[bool]]

LOOK_S: Final = 0.1  # how soon a commit that made rows is noticed
_LARGE_SHARE: Final = 4  # one of so many places may be a large blob's
_ASKED_PLACES: Final = 16  # copies that somebody waits for, beside the others
_ASKED_TRIES: Final = 8
_SOON_US: Final = 60 * SECOND_US  # a copy due by then shows how a target is
_CLOSE_S: Final = 3.0  # what is in flight may take so long when the process is stopped
_STOP_S: Final = 2.0  # and so long to notice that it is broken off

_log = logging.getLogger("blobcask.mirror")


@final
class Mirror:
    """See the module. A `replicator.loop.Job`, one for each target."""

    interval_s: Final = LOOK_S

    def __init__(
        self,
        store: Store,
        link: Link,
        *,
        concurrency: int = 16,
        bandwidth: Bandwidth | None = None,
        bring: Bring | None = None,
        patience: Patience | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`bandwidth` is that of all targets together. `bring` has the bytes of an evicted
        blob brought here again, and says whether they are; without it it cannot be copied."""
        self.name = f"mirror {link.name}"
        self._store = store
        self._link = link
        self._places = concurrency
        self._bring = bring
        self._patience = patience or Patience(concurrency)
        self._now_s = now_s
        # Of its own: a target that hangs must not keep a thread from another one. Each copy
        # has one, the parts of large ones have theirs, and some are for the catalog.
        parts = PARTS_AT_ONCE * max(1, concurrency // _LARGE_SHARE)
        self._threads = ThreadPoolExecutor(
            concurrency + _ASKED_PLACES + parts + 4, thread_name_prefix=self.name
        )
        self._copier = Copier(
            link.target, store.blobs, self._threads, bandwidth or Bandwidth(0), link.nameless
        )
        self._settling = Settling(store, self._in_thread)
        self._waiting = Waiting(link.name, self._is_large)
        self._working: dict[Digest, asyncio.Event] = {}  # until it is written down: set then
        self._flying = 0  # of them, those that have a place
        self._large = 0  # of those, the large ones
        self._overtaken: set[Digest] = set()  # waiting, and asked for meanwhile
        self._trial: Digest | None = None  # with which a target that is down is tried out
        self._flights: set[asyncio.Task[None]] = set()
        self._asked_places = asyncio.Semaphore(_ASKED_PLACES)
        self._news = asyncio.Event()
        self._broken: BaseException | None = None
        self._closed = False
        self._ahead_us = -(1 << 62)  # of the monotonic clock
        with store.catalog.read() as snapshot:
            self._advance(store.now_us(snapshot))

    async def step(self, now_us: int) -> bool:
        """Start what is due and has a place; True while anything is under way.

        Raises what the catalog raises. What copies raise is a matter of their rows.
        """
        self._advance(now_us)
        self._raise_broken()
        self._listen()
        if self._may_send() and len(self._waiting.small) < self._places:
            await self._look()
        self._news.clear()
        self._launch()
        if not self._working:
            if self._patience.down and self._may_send():
                await self._try_out()
            return self._may_send() and not self._waiting.dry
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), LOOK_S)
        return True

    async def copy_now(self, digest: Digest, anew: bool = False) -> None:
        """Return when the copy of a blob is verified at the target, and written down as done.

        It goes ahead of the queue. `anew` sends the bytes even where they are there, and joins
        no copy that was begun before: the time it takes tells nothing of others (invariant 9).
        Raises CopyUnconfirmed when that cannot be done now.
        """
        for tried in range(_ASKED_TRIES):
            self._refuse_if_closed(digest)
            item = await self._free_item(digest, anew)
            if item.row.held and not anew:
                return
            self._refuse_unless_up(digest)
            error = await self._copy_asked(item, anew)
            if error is None:
                return
            if manner_of(error).lasting:
                raise CopyUnconfirmed(digest.hex(), str(error)) from error
            self._refuse_unless_up(digest)
            await asyncio.sleep(self._patience.pause_us(error, tried) / SECOND_US)
        raise CopyUnconfirmed(digest.hex(), self._link.last_error or "it did not succeed")

    async def close(self) -> None:
        """End what is in flight, in the middle if it takes long; the rows are as they were."""
        self._closed = True
        self._settling.hurry()
        if self._flights:
            await asyncio.wait(self._flights, timeout=_CLOSE_S)
        self._copier.stop()
        if self._flights:
            await asyncio.wait(self._flights, timeout=_STOP_S)
        self._threads.shutdown(wait=False, cancel_futures=True)

    # --- looking

    def _may_send(self) -> bool:
        return (
            self._link.open
            and not self._closed
            and self._broken is None
            and self._patience.width(self._now_s()) > 0
        )

    async def _look(self) -> None:
        """Read the next rows that are due."""
        working = frozenset(self._working)
        found = await self._in_thread(self._looked, self._time_us(), working)
        self._waiting.add(found, self._working.keys())
        if found.next_us is not None:
            # No pause is longer: when this was written down, the clock was ahead.
            self._ahead_us += max(0, found.next_us - PAUSE_US_MAX - self._time_us())

    def _listen(self) -> None:
        """Notice that a target which was down answers, also in the middle of a large copy."""
        self._patience.heard(self._copier.answers)
        if self._link.down and not self._patience.down:
            self._tell(self._link.last_error)

    def _looked(self, now_us: int, working: frozenset[Digest]) -> Look:
        with self._store.catalog.read() as snapshot:
            return self._waiting.look(snapshot, now_us, working)

    async def _try_out(self) -> None:
        """Ask a target that was down, and for which no copy is due, whether it is there: else
        it would count as down until the next one is."""
        next_us = self._waiting.next_us
        if len(self._waiting) or (next_us is not None and next_us - self._time_us() < _SOON_US):
            return
        began_s = self._now_s()
        try:
            await self._in_thread(self._link.target.stat, HEAD)
        except TargetError as error:
            if manner_of(error).strikes:
                self._patience.failed(error, began_s, self._now_s(), self._copier.answers)
                return
        self._patience.worked()
        self._tell("")

    def _is_large(self, item: Item) -> bool:
        return not item.here or self._wanted(item.row).in_parts

    def _wanted(self, row: Replica) -> Wanted:
        profile = self._link.profile
        assert profile is not None  # the link is open
        return Wanted(row.digest, row.size_bytes, profile)

    # --- the queue

    def _launch(self) -> None:
        """Start copies while there are places."""
        if not self._may_send():
            return
        width, waiting = self._patience.width(self._now_s()), self._waiting
        if self._patience.down:
            if self._trial in self._working:
                return
            width += self._flying  # what was begun before may hang for long
        while self._flying < width:
            # A small one shows soonest whether a target that was down is there again.
            may_be_large = self._large < max(1, width // _LARGE_SHARE) and not (
                self._patience.down and waiting.small
            )
            if waiting.large and may_be_large:
                self._start(waiting.next_large(), large=True)
            elif waiting.small:
                self._start(waiting.next_small(), large=False)
            else:
                return

    def _start(self, item: Item, *, large: bool) -> None:
        digest = item.row.digest
        if digest in self._working or digest in self._overtaken:
            self._overtaken.discard(digest)
            return  # the next look shows whether there is still anything to do
        self._take(digest)  # at once: the task runs later
        if self._patience.down:
            self._trial = digest
        self._flying += 1
        self._large += large
        flight = asyncio.create_task(self._fly(item, large))
        self._flights.add(flight)
        flight.add_done_callback(self._landed)

    async def _fly(self, item: Item, large: bool) -> None:
        """One copy, from its place to what is written down of it."""
        try:
            try:
                outcome, _ = await self._attempt(item, self._keeping(item.row))
            finally:
                self._flying -= 1
                self._large -= large
            self._launch()  # the place is free, whenever the outcome is written down
            if not self._waiting.small:
                self._news.set()  # the step has more read
            if outcome is not None:
                await self._settling.add(outcome)
        finally:
            self._leave(item.row.digest)

    def _landed(self, flight: asyncio.Task[None]) -> None:
        self._flights.discard(flight)
        if not flight.cancelled() and (error := flight.exception()) is not None:
            self._broken = error
            self._news.set()
        elif not self._working:
            self._news.set()

    def _raise_broken(self) -> None:
        broken, self._broken = self._broken, None
        if broken is not None:
            raise broken

    def _take(self, digest: Digest) -> None:
        """Nobody else begins with `digest` from now on, except anew."""
        self._working[digest] = asyncio.Event()

    def _leave(self, digest: Digest) -> None:
        self._working.pop(digest).set()

    # --- one copy

    async def _attempt(
        self, item: Item, keep: Keep | None
    ) -> tuple[Outcome | None, Exception | None]:
        """Make one copy: what is to be written down of it, if anything, and what went wrong."""
        row, began_s = item.row, self._now_s()
        try:
            if not item.here:
                await self._bring_here(row.digest)
            await self._copier.copy(self._wanted(row), item.unfinished, keep)
        except (SendingStopped, UploadForgotten) as error:
            return None, error
        except ENDING:
            raise
        except Exception as error:  # noqa: BLE001  it is the row's, and told
            return await self._failure(row, error, began_s), error
        self._patience.worked()
        self._tell("")
        self._link.speed.add(1, row.size_bytes)
        return Done(row), None

    async def _failure(self, row: Replica, error: Exception, began_s: float) -> Failed:
        reason = str(error) or type(error).__name__
        if not foreseen(error):
            _log.error("copying %s to %s failed", row.digest.hex(), self._link.name, exc_info=error)
        damaged = isinstance(error, BlobUnavailable)
        if damaged:
            await self._look_here(row.digest)
        # A blob that is wrong there again and again may be the only one: no news of the target.
        if self._patience.down or not (isinstance(error, BytesDiffer) and row.attempts):
            self._patience.failed(error, began_s, self._now_s(), self._copier.answers)
        self._tell(reason)
        next_us = self._time_us() + self._patience.pause_us(error, row.attempts)
        return Failed(row, reason, next_us, afresh=damaged)

    async def _look_here(self, digest: Digest) -> None:
        """Have the scrub look at bytes that are not good, or not here."""
        try:
            await self._in_thread(lambda: Scrub(self._store).look_at(digest))
        except OSError as error:
            _log.warning("%s could not be looked at: %s", digest.hex(), error)

    async def _bring_here(self, digest: Digest) -> None:
        if self._bring is None:
            raise BlobElsewhere(digest.hex(), "its bytes are at other targets only")
        if not await self._bring(digest):
            raise BlobElsewhere(digest.hex(), "its bytes could not be fetched from where they are")

    def _keeping(self, row: Replica) -> Keep:
        async def keep(copy: Copy) -> bool:
            now = await self._settling.add(Copying(row, copy), urgent=True)
            return now is not None and now.state == COPYING

        return keep

    def _tell(self, error: str) -> None:
        link, down = self._link, self._patience.down
        if down and not link.down:
            _log.warning("%s is left alone for now: %s", link.name, down)
        if link.down and not down:
            _log.warning("%s works again", link.name)
        link.down, link.last_error = down, error

    # --- copies that somebody waits for

    async def _free_item(self, digest: Digest, anew: bool) -> Item:
        """The row, once no DELETE is under way and, unless `anew`, nobody works at it."""
        while True:
            if not anew and (over := self._working.get(digest)) is not None:
                await over.wait()
            item = await self._in_thread(self._item_of, digest)
            if item is None:
                raise CopyUnconfirmed(digest.hex(), "no blob has this digest")
            if item.row.state != DELETING and (anew or digest not in self._working):
                return item
            self._refuse_unless_up(digest)
            if item.row.state == DELETING:
                await asyncio.sleep(LOOK_S)

    def _item_of(self, digest: Digest) -> Item | None:
        with self._store.catalog.read() as snapshot:
            row = snapshot.get(Replica, self._link.name, digest)
            return None if row is None else item_of(snapshot, row)

    async def _copy_asked(self, item: Item, anew: bool) -> Exception | None:
        """One attempt, beside the queue; what went wrong, None once it is written down."""
        digest = item.row.digest
        async with self._asked_places:
            if digest in self._working:
                if not anew:
                    return UploadForgotten("somebody else began with it")
                return await self._copy_beside(item)
            if digest in self._waiting:
                self._overtaken.add(digest)
            self._take(digest)
            try:
                keep = None if item.row.held else self._keeping(item.row)
                outcome, error = await self._attempt(item, keep)
                return await self._written(outcome, error)
            finally:
                self._leave(digest)

    async def _copy_beside(self, item: Item) -> Exception | None:
        """The same while the queue works at the same blob; nothing of it outlives it."""
        alone = msgspec.structs.replace(item, unfinished=None)
        outcome, error = await self._attempt(alone, None)
        return await self._written(outcome, error)

    async def _written(self, outcome: Outcome | None, error: Exception | None) -> Exception | None:
        if outcome is None:
            return error
        row = await self._settling.add(outcome, urgent=True)
        if error is None and (row is None or not row.held):
            return UploadForgotten("the blob was removed, or wanted anew, meanwhile")
        return error

    def _refuse_unless_up(self, digest: Digest) -> None:
        self._refuse_if_closed(digest)
        link = self._link
        if not link.open:
            why = link.fenced or "the target was not probed yet"
            raise CopyUnconfirmed(digest.hex(), why)
        if link.down:
            raise CopyUnconfirmed(digest.hex(), link.down)

    def _refuse_if_closed(self, digest: Digest) -> None:
        if self._closed:
            raise CopyUnconfirmed(digest.hex(), "the replicator is being stopped")

    # --- time and threads

    def _advance(self, now_us: int) -> None:
        """Take over catalog time where it is ahead of ours."""
        self._ahead_us = max(self._ahead_us, now_us - self._monotonic_us())

    def _time_us(self) -> int:
        return self._monotonic_us() + self._ahead_us

    def _monotonic_us(self) -> int:
        return int(self._now_s() * SECOND_US)

    async def _in_thread(self, call: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *args)
