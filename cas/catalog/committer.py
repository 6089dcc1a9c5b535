"""The committer: one thread per process that turns waiting writes into durable groups.

All writes that wait while a group is being synced become the next group, so that they
share one sequential sync; the slower the disk, the larger the groups. A group:

    take the writer lock (LMDB's, shared by all processes) → roll forward → run each write
    in its own child transaction → append one frame → one fdatasync → commit → wake

Readers see the group only after the fdatasync, so they see durable state only.
"""

from __future__ import annotations

import errno
import queue
import threading
from collections.abc import Callable
from typing import Any, NoReturn, final

import lmdb
import msgspec

from cas.catalog import Transaction
from cas.catalog.ballast import Ballast
from cas.catalog.images import Head, put_head
from cas.catalog.journal import Frame, Segment, Tail, Write, encode_frame
from cas.catalog.layout import SCHEMA, add_state
from cas.catalog.lmdb import DAMAGE, Index
from cas.catalog.recovery import SHORTAGE, Folders, roll_forward
from cas.catalog.transaction import LmdbTransaction
from cas.clock import Clock, Reading, read
from cas.durable import Disk
from cas.errors import (
    BlobcaskError,
    CatalogClosed,
    CatalogError,
    CatalogFailed,
    IndexDamaged,
    StoreFull,
)

# A group stops growing here, so that no writer waits long for strangers' bytes.
GROUP_BYTES = 4 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


@final
class Pending:
    """One write that waits for its group; `done` is released when it is decided."""

    __slots__ = ("actor", "change", "done", "error", "request_id", "result")

    def __init__(self, change: Callable[[Transaction], Any], actor: str, request_id: str) -> None:
        self.change = change
        self.actor = actor
        self.request_id = request_id
        self.done = threading.Lock()
        self.done.acquire()
        self.result: Any = None
        self.error: BaseException | None = None


@final
class Committer:
    """Runs groups. `submit` may be called from any thread of the process that made it."""

    def __init__(
        self,
        index: Index,
        folders: Folders,
        ballast: Ballast,
        clock: Clock,
        disk: Disk,
        *,
        segment_bytes_max: int,
        clock_gap_us_max: int,
        after_group: Callable[[Head], None],
    ) -> None:
        self._index = index
        self._folders = folders
        self._ballast = ballast
        self._clock = clock
        self._disk = disk
        self._tail = Tail(folders.journal, disk, segment_bytes_max)
        self._clock_gap_us_max = clock_gap_us_max
        self._after_group = after_group
        self._queue: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        self._broken = ""  # why this process may not write any more
        self._behind = False  # there was no room to show what was committed last
        self._accept_clock = False
        self._closing = threading.Lock()  # between a late submit and the end of the thread
        self._closed = False
        self.groups = 0  # how many frames this process wrote, and of how many writes
        self.writes = 0
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
        self._thread.start()

    def submit(self, pending: Pending) -> None:
        """Let a write wait for its group; raises CatalogClosed after `close`."""
        with self._closing:
            # Under the lock, so that nothing comes behind the end of the queue.
            if self._closed:
                raise CatalogClosed
            self._queue.put(pending)

    def close(self) -> None:
        """Decide what waits, then stop."""
        with self._closing:
            self._closed = True
            self._queue.put(None)
        self._thread.join()
        self._tail.close()

    def _run(self) -> None:
        waiting: list[Pending] = []
        try:
            self._decide_all(waiting)
        finally:
            # Should this thread ever end otherwise than by `close`, nobody may wait for it.
            with self._closing:
                self._closed = True
            while not self._queue.empty():
                self._take(self._queue.get(), waiting)
            for pending in waiting:
                pending.error = CatalogClosed()
                pending.done.release()

    def _decide_all(self, waiting: list[Pending]) -> None:
        closing = False
        while waiting or not closing:
            if not waiting:
                self._take(self._queue.get(), waiting)
                closing = not waiting
            # Whatever came meanwhile shares the sync.
            while not closing:
                try:
                    more = self._queue.get_nowait()
                except queue.Empty:
                    break
                self._take(more, waiting)
                closing = more is None
            if waiting:
                waiting[:] = self._decide(waiting)

    def accept_clock(self) -> None:
        """Let the next group follow the clock, however far ahead it is (invariant 10)."""
        self._accept_clock = True

    @staticmethod
    def _take(more: Pending | None, waiting: list[Pending]) -> None:
        if more is not None:
            waiting.append(more)

    def _decide(self, batch: list[Pending]) -> list[Pending]:
        """Commit a group of `batch`; returns the writes that wait for the next group."""
        taken: list[Pending] = []
        try:
            head = self._group(batch, taken)
        except BaseException as error:  # noqa: BLE001
            # Whatever happened, nobody may wait for ever; a write's own error stays.
            head = None
            for pending in taken or batch:
                pending.error = pending.error or self._told(error)
            taken = taken or batch
        for pending in taken:
            pending.done.release()
        if head is not None:
            self._after_group(head)
        return batch[len(taken) :]

    def _group(self, batch: list[Pending], taken: list[Pending]) -> Head | None:
        if self._broken:
            raise CatalogFailed(self._broken)
        if self._behind:
            self._catch_up()
            if self._behind:
                raise StoreFull(self._ballast.free_bytes(), 0, self._folders.index)
        # `outer` holds the writer lock to the end, also when the group inside is undone.
        outer = self._index.begin()
        try:
            head = roll_forward(outer, self._folders, self._tail, self._disk)
            if head.failed:
                self._stop_everybody(outer, head)
            group = self._index.begin_child(outer)
            try:
                frame = self._run_writes(group, head, batch, taken)
                if not frame.writes:
                    group.abort()
                    outer.commit()  # what roll-forward may have applied
                    return None
                after = self._append(frame, head, outer, group)
            except BaseException:
                group.abort()
                raise
        except BaseException:
            outer.abort()
            raise
        # The frame is on stable storage: from here on it is a commit, whatever LMDB says.
        try:
            put_head(group, after)
            group.commit()
            outer.commit()
        except lmdb.Error:
            outer.abort()  # else the writer lock would be held against ourselves
            self._catch_up()
        self.groups += 1
        self.writes += len(frame.writes)
        return after

    def _run_writes(
        self, group: lmdb.Transaction[bytes], head: Head, batch: list[Pending], taken: list[Pending]
    ) -> Frame:
        position = head.position
        time = self._time(position.at_us)
        state, size = position.state, 0
        writes: list[Write] = []
        for pending in batch:
            if size >= GROUP_BYTES:
                break
            taken.append(pending)
            child = self._index.begin_child(group)
            transaction = LmdbTransaction(child, time.at_us, believed=time.believed)
            try:
                pending.result = pending.change(transaction)
                transaction.finish()
                child.commit()
            except BaseException as error:  # noqa: BLE001  # it is raised where it belongs
                child.abort()
                pending.error = self._told(error)
                continue
            if transaction.ops:
                ops = [(number, key, raw) for (number, key), raw in transaction.ops.items()]
                size += sum(len(key) + len(raw or b"") for _, key, raw in ops)
                state = add_state(state, transaction.delta)
                writes.append(Write(pending.actor, pending.request_id, ops))
        return Frame(position.epoch, position.seq + 1, time.at_us, position.chain, state, writes)

    def _time(self, last_us: int) -> Reading:
        """Catalog time of the next frame (invariant 10)."""
        accepted, self._accept_clock = self._accept_clock, False
        if accepted:
            return Reading(max(last_us, self._clock.now_us()), believed=True)
        return read(self._clock, last_us, self._clock_gap_us_max)

    def _append(
        self,
        frame: Frame,
        head: Head,
        outer: lmdb.Transaction[bytes],
        group: lmdb.Transaction[bytes],
    ) -> Head:
        data, position = encode_frame(frame)
        segment = Segment(head.segment_epoch, head.segment_first_seq)
        try:
            placed, start = self._write(data, segment, head.frame_end, frame.seq)
            self._tail.sync()
        except OSError as error:
            # What is on the disk is unknown now, and a second sync would not tell: the
            # kernel may have dropped the pages. Every process stops at this mark. The
            # frame was never acknowledged, so taking it back breaks no promise, and it
            # keeps those who lose the mark with the index from believing in it.
            group.abort()
            self._tail.take_back(segment, head.frame_end)
            reason = f"the journal could not be synced: {error}"
            self._stop_everybody(outer, msgspec.structs.replace(head, failed=reason))
        return Head(position, placed.epoch, placed.first_seq, start, start + len(data), SCHEMA)

    def _stop_everybody(self, outer: lmdb.Transaction[bytes], head: Head) -> NoReturn:
        """Leave the mark that `head.failed` is, for every process, and raise CatalogFailed."""
        # First, so that this process stops even where LMDB cannot commit either.
        self._broken = head.failed
        put_head(outer, head)
        outer.commit()
        raise CatalogFailed(head.failed)

    def _write(self, data: bytes, segment: Segment, end: int, seq: int) -> tuple[Segment, int]:
        """Append, giving the ballast back once when the disk is full."""
        for attempt in (1, 2):
            try:
                return self._tail.append(data, segment, end, seq)
            except OSError as error:
                if error.errno in SHORTAGE:
                    raise CatalogError(f"the journal could not be opened: {error}") from None
                if error.errno not in _FULL:
                    raise
                if attempt == 2 or not self._ballast.release():
                    raise StoreFull(
                        self._ballast.free_bytes(), len(data), self._folders.journal
                    ) from None
        raise AssertionError("the second attempt returns or raises")

    def _catch_up(self) -> None:
        """LMDB refused a commit whose frame is durable: follow the journal at once.

        The usual reason is a full disk, so the ballast goes first. When it still fails, the
        writes of the group stay acknowledged, and show as soon as there is room: what the
        next write begins with. Any other reason ends this process's writing, and the next
        opening follows the journal.
        """
        self._behind = False
        self._ballast.release()
        try:
            txn = self._index.begin()
            try:
                self._broken = roll_forward(txn, self._folders, self._tail, self._disk).failed
                txn.commit()
            except BaseException:
                txn.abort()
                raise
        except lmdb.DiskError:
            self._behind = True
        except (lmdb.Error, OSError, BlobcaskError) as error:
            self._broken = f"the index cannot follow the journal: {error}"

    def _told(self, error: BaseException) -> BaseException:
        """The error a caller sees: LMDB's own are damage of the index, or a full disk."""
        if isinstance(error, lmdb.DiskError):
            try:
                return StoreFull(self._ballast.free_bytes(), 0, self._folders.index)
            except OSError as unreadable:
                return unreadable
        if isinstance(error, lmdb.Error):
            if isinstance(error, DAMAGE):
                return IndexDamaged(str(error))
            return CatalogError(f"the index refused: {error}")
        return error
