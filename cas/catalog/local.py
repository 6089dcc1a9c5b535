"""The catalog of one ROOT on local disk: journal, LMDB index, many processes."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar, cast, final

import lmdb
import msgspec

from cas.catalog import Change, Position, Snapshot, Transaction
from cas.catalog.ballast import Ballast
from cas.catalog.bulk import Progress
from cas.catalog.checkpoint import Checkpoint, checkpoints_in
from cas.catalog.committer import Committer, Pending
from cas.catalog.ground import Boot, Lock, mount_of, refuse_network
from cas.catalog.history import Found, RawFrame, locate, raw_frames
from cas.catalog.images import Head, put_head
from cas.catalog.journal import Segment, Stop, Tail, read_frame, segments_in, valid_at_or_after
from cas.catalog.layout import LAYOUT_OF_NUMBER, SCHEMA
from cas.catalog.lmdb import Index, Reading
from cas.catalog.recovery import (
    Folders,
    begin_segment,
    build_index,
    catch_up,
    checkpoint_of,
    entries_add_up,
    follow,
    is_full,
    roll_forward,
    save_journal,
    state_of,
)
from cas.catalog.snapshot import LmdbSnapshot
from cas.clock import DAY_US, SECOND_US, Clock, read
from cas.clock import Reading as TimeReading
from cas.durable import Disk, is_temporary, locked, opened
from cas.errors import (
    CatalogClosed,
    CatalogError,
    CatalogFailed,
    IndexDamaged,
    JournalDamaged,
    StoreBusy,
    StoreFull,
    WrongProcess,
)

T = TypeVar("T")

_SEGMENT_BYTES_MAX = 64 << 20
_BALLAST_EVERY_US = 5 * SECOND_US  # between two tries to lay it again
_CHECKPOINTS_KEPT = 2  # the newest may turn out bad; the journal after the older one stays too

# LMDB forbids two environments of one file in one process (its locks would be lost).
_open_roots: set[Path] = set()
_open_roots_lock = threading.Lock()
_inherited_roots: set[Path] = set()  # open in the process that this one was forked from
_open_catalogs: weakref.WeakSet[LocalCatalog] = weakref.WeakSet()


@final
class CatalogSettings(msgspec.Struct, frozen=True):
    """What the catalog lets its operator decide; see config.ini."""

    checkpoint_bytes: int = 256 << 20  # of journal, after which a checkpoint is due
    journal_keep_us: int = 7 * DAY_US  # how long covered journal stays
    clock_gap_us_max: int = 30 * DAY_US
    min_free_bytes: int = 0  # kept free beside the ballast
    lock_wait_s: float = 45.0  # for ROOT alone; longer than a stopping server finishes requests


@final
class LocalCatalog:
    """See `cas.catalog.Catalog`. Open it after fork, once per process; threads share it."""

    def __init__(self, root: Path, settings: CatalogSettings, *, clock: Clock, disk: Disk) -> None:
        """Open the catalog of `root` (an existing folder), making what is missing.

        Raises UnsuitableRoot, StoreBusy (the index must be remade, others have it open),
        WrongProcess (forked from one that has it open), JournalDamaged, StoreFull.
        """
        self._root = root.resolve()
        self._settings = settings
        self._clock = clock
        self._disk = disk
        self._folders = Folders(self._root)
        self.ballast = Ballast(self._folders.ballast, disk, settings.min_free_bytes)
        self._pid = os.getpid()
        self._closed = False
        self._shown_seq = 0  # what an index of this boot showed had been acknowledged
        if self._root in _inherited_roots:
            raise WrongProcess
        refuse_network(self._root, mount_of(self._root))
        with _open_roots_lock:
            if self._root in _open_roots:
                raise StoreBusy(self._root, "open it a second time in one process")
            _open_roots.add(self._root)
        try:
            self._lock = Lock(self._folders.lock, disk, settings.lock_wait_s)
            try:
                try:
                    self._folders.make(disk)
                    self._index = self._open_index()
                except (OSError, lmdb.Error) as error:
                    # A full disk must open, or nothing could be deleted from it.
                    if not is_full(error):
                        raise
                    if not self.ballast.release():
                        raise StoreFull(self.ballast.free_bytes(), 0, self._root) from error
                    self._folders.make(disk)
                    self._index = self._open_index()
            except BaseException:
                self._lock.close()
                raise
        except BaseException:
            self._forget()
            raise
        self.ballast.restore()
        self._checkpointing = threading.Lock()
        self._last_segment: Segment | None = None
        self._ballast_due_us = 0
        self._committer = Committer(
            self._index,
            self._folders,
            self.ballast,
            clock,
            disk,
            segment_bytes_max=min(_SEGMENT_BYTES_MAX, max(settings.checkpoint_bytes // 4, 1)),
            clock_gap_us_max=settings.clock_gap_us_max,
            after_group=self._after_group,
        )
        _open_catalogs.add(self)

    # --- opening

    def _open_index(self) -> Index:
        """The index, if it may be trusted; else one made anew, with ROOT held alone."""
        index = self._trusted(self._lock.alone)
        if index is not None:
            return index
        before = self._boot_inode()
        with self._lock.exclusive(
            "rebuild the index", done=lambda: self._boot_inode() not in (0, before)
        ) as alone:
            # Another process may have done it while this one waited.
            index = self._trusted(alone=False)
            if index is not None:
                return index
            if not alone:
                raise StoreBusy(self._root, "rebuild the index again")
            if not segments_in(self._folders.journal) and not checkpoints_in(
                self._folders.checkpoints
            ):
                begin_segment(self._folders, Segment(1, 1), self._disk)
            index, _ = build_index(self._folders, self.ballast, self._disk, self._shown_seq)
            self._write_boot()
            return index

    def _boot_inode(self) -> int:
        """Another number for each BOOT that was written; 0 while there is none."""
        try:
            return (self._folders.index / "BOOT").stat().st_ino
        except FileNotFoundError:
            return 0

    def _trusted(self, alone: bool) -> Index | None:
        """Open the index when BOOT, schema and journal agree with it."""
        folder = self._folders.index
        boot = Boot.read(folder)
        try:
            if boot is None or not boot.holds(Boot.of(folder, self._disk), alone):
                return None
        except FileNotFoundError:
            return None
        try:
            index = Index(folder)
        except IndexDamaged:
            return None
        try:
            with index.read() as snapshot:
                head = snapshot.head
            self._shown_seq = head.position.seq
            if head.schema != SCHEMA:
                raise IndexDamaged("it was built by another schema")
            reason = head.failed or self._off_journal(head)
            if reason:
                self._renew(index, boot, reason)
            else:
                self._follow_journal(index)
        except lmdb.DiskError:
            index.close()
            raise
        except (IndexDamaged, JournalDamaged, lmdb.Error):
            # The journal decides. Where it is damaged beyond this index, a checkpoint after
            # the damage may help, and if none does, building the index names what is lost.
            index.close()
            return None
        except BaseException:
            index.close()
            raise
        return index

    def _off_journal(self, head: Head) -> str:
        """Why the frame that the index stands on is not in the journal; "" when it is."""
        path = self._folders.journal / Segment(head.segment_epoch, head.segment_first_seq).filename
        try:
            with opened(path) as fd:
                if head.frame_start == head.frame_end:
                    return "" if os.fstat(fd).st_size >= head.frame_end else "its segment is short"
                read = read_frame(fd, head.frame_start)
        except FileNotFoundError:
            return "its segment is gone"
        if isinstance(read, str):
            return read
        return "" if read[1] == head.position else "another frame stands in its place"

    def _went_another_way(self, head: Head) -> bool:
        """Whether valid frames stand where the index knows of others: then the journal is right.

        Else the journal only lost its end, and what the index shows is all there is.
        """
        path = self._folders.journal / Segment(head.segment_epoch, head.segment_first_seq).filename
        try:
            with opened(path) as fd:
                at = valid_at_or_after(fd, head.frame_start)
                read = "" if at is None else read_frame(fd, at)
        except FileNotFoundError:
            return False
        if isinstance(read, str):
            return False
        return at != head.frame_end or read[0].chain != head.position.chain

    def _follow_journal(self, index: Index) -> None:
        """Show what the journal holds beyond the index before anybody reads.

        Else an index that was restored from a copy, or whose last writer was killed, would
        hide acknowledged writes until the next write.
        """
        tail = Tail(self._folders.journal, self._disk, _SEGMENT_BYTES_MAX)
        try:
            txn = index.begin()
            try:
                head = roll_forward(txn, self._folders, tail, self._disk)
                txn.commit()
            except BaseException:
                txn.abort()
                raise
        finally:
            tail.close()
        if head.failed:
            raise CatalogFailed(head.failed)

    def _renew(self, index: Index, boot: Boot, reason: str) -> None:
        """Begin a fresh segment after a failed sync, or where the journal lost its end.

        The index was written in this boot, so it shows acknowledged writes only, and
        discarding it would lose them: with what the journal holds beyond it, it becomes a
        checkpoint that the journal goes on from. The suspect segment is never written again,
        and its frames are not counted on: they may be in the page cache alone. Raises
        JournalDamaged or IndexDamaged where the journal knows more than the index can follow.
        """

        def remade() -> bool:
            return Boot.read(self._folders.index) != boot

        def mended() -> bool:
            if remade():
                return True
            with index.read() as snapshot:
                head = snapshot.head
            return not head.failed and not self._off_journal(head)

        with self._lock.exclusive(f"repair the journal ({reason})", done=mended) as alone:
            if remade():
                raise IndexDamaged("it was remade meanwhile")
            if not alone:
                return
            txn = index.begin()
            try:
                head = LmdbSnapshot(txn).head
                # Another process may have done it while this one waited.
                if not head.failed and not self._off_journal(head):
                    txn.abort()
                    return
                if not head.failed and self._went_another_way(head):
                    raise IndexDamaged("the journal went another way")
                position = head.position
                checkpoints = checkpoints_in(self._folders.checkpoints)
                if checkpoints and checkpoints[-1] > Checkpoint(position.epoch, position.seq):
                    raise IndexDamaged("a checkpoint is newer")
                segment = Segment(head.segment_epoch, head.segment_first_seq)
                segments = segments_in(self._folders.journal)
                # A lost segment that was the last one leaves nothing to catch up with.
                if segment in segments or (segments and segments[-1] > segment):
                    head, torn = catch_up(txn, head, self._folders)
                    if torn is not None:
                        # Nobody was told of it; left there, it would look like damage
                        # once the journal goes on in the next segment.
                        with opened(torn.path, os.O_RDWR) as fd:
                            self._disk.truncate(fd, torn.start)
                            self._disk.sync_data(fd)
                put_head(txn, head)
                txn.commit()
            except BaseException:
                txn.abort()
                raise
            save_journal(index, self._folders, self._disk)

    def _write_boot(self) -> None:
        boot = Boot.of(self._folders.index, self._disk)
        self._disk.write_file(self._folders.index / "BOOT", msgspec.json.encode(boot), 0o600)

    # --- the seam

    def read(self) -> AbstractContextManager[Snapshot]:
        """See `cas.catalog.Catalog.read`."""
        return self.inspect()

    def write(
        self, change: Callable[[Transaction], T], *, actor: str = "", request_id: str = ""
    ) -> T:
        """See `cas.catalog.Catalog.write`."""
        self._usable()
        pending = Pending(change, actor, request_id)
        self._committer.submit(pending)
        pending.done.acquire()
        if pending.error is not None:
            if isinstance(pending.error, IndexDamaged):
                self._distrust()
            raise pending.error
        return cast(T, pending.result)

    def alone(self, act: Callable[[Snapshot], T]) -> T:
        """See `cas.catalog.Catalog.alone`: a write without ops, which leaves no frame."""
        return self.write(act)

    def changes(self, after_seq: int) -> Iterator[Change]:
        """See `cas.catalog.Catalog.changes`; stops at the newest committed frame."""
        newest = self.position()
        start = self._position_before(after_seq, newest)
        for item in follow(self._folders.journal, start):
            if isinstance(item, Stop):
                if item.valid_after is not None:
                    raise item.error()
                return
            frame = item.frame
            if frame.seq > newest.seq:
                return
            if frame.seq <= after_seq:
                continue
            for write in frame.writes:
                yield Change(
                    frame.seq,
                    frame.at_us,
                    write.actor,
                    write.request_id,
                    [
                        (
                            LAYOUT_OF_NUMBER[number].kind,
                            key,
                            None if raw is None else LAYOUT_OF_NUMBER[number].decode(raw),
                        )
                        for number, key, raw in write.ops
                    ],
                )

    def _position_before(self, seq: int, newest: Position) -> Position:
        """The position that the oldest kept segment needed for `seq` begins at."""
        segments = segments_in(self._folders.journal)
        chosen = [s for s in segments if s.first_seq <= seq + 1][-1:] or segments[:1]
        with opened(self._folders.journal / chosen[0].filename) as fd:
            read = read_frame(fd, 0)
        segment = chosen[0]
        if isinstance(read, str):
            if segment.first_seq <= newest.seq:
                raise JournalDamaged(self._folders.journal / segment.filename, 0, read)
            return newest  # empty, or its first frame is just being written
        frame = read[0]
        return Position(segment.epoch, segment.first_seq - 1, frame.chain, bytes(16), 0)

    def position(self) -> Position:
        """See `cas.catalog.Catalog.position`."""
        with self.read() as snapshot:
            return snapshot.position

    def checkpoint(self) -> Position:
        """See `cas.catalog.Catalog.checkpoint`. One process at a time; others wait."""
        self._usable()
        with locked(self._folders.checkpoints, os.O_RDONLY | os.O_DIRECTORY):
            with self.inspect() as snapshot:
                position = checkpoint_of(snapshot, self._folders, self._disk)
            self._prune()
        return position

    def accept_clock(self) -> None:
        """Let catalog time follow the clock at the next write, however far it leads.

        For an operator who knows that the clock is right: after a long rest without a time
        service nothing else tells a right clock from a wrong one (invariant 10).
        """
        self._usable()
        self._committer.accept_clock()

    def close(self) -> None:
        """Decide what waits, then let go of ROOT. Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        if os.getpid() != self._pid:
            return
        self._committer.close()
        # A checkpoint that runs in the background still reads the index.
        with self._checkpointing:
            self._index.close()
        self._lock.close()
        self._forget()

    # --- beyond the seam: what only this form has

    def inspect(self) -> Reading:
        """A snapshot that also shows the index itself: for doctor and the refcount audit."""
        self._usable()
        return self._index.read(self._distrust)

    def reader_check(self) -> int:
        """Free the reader slots of processes that were killed; returns how many."""
        self._usable()
        return self._index.reader_check()

    def oldest_reader_lag(self) -> int:
        """By how many commits the oldest reader of any process is behind; 0 without readers."""
        self._usable()
        return self._index.oldest_reader_lag()

    def last_commit(self) -> int:
        """A number that each commit of any process moves on: a look costs about a µs."""
        self._usable()
        return self._index.last_commit()

    def time(self) -> TimeReading:
        """Catalog time as a write at this moment would have it (invariant 10)."""
        return read(self._clock, self.position().at_us, self._settings.clock_gap_us_max)

    @property
    def commits(self) -> tuple[int, int]:
        """Groups committed by this process, and the writes in them."""
        return self._committer.groups, self._committer.writes

    def locate(self, seq: int, chain: bytes) -> tuple[Found, Position]:
        """Where a position lies to this journal, and the newest committed frame; see `locate`."""
        with self.inspect() as snapshot:
            head = snapshot.head
        return locate(self._folders.journal, head, seq, chain), head.position

    def raw_frames(self, seq: int, chain: bytes, place: tuple[Segment, int]) -> Iterator[RawFrame]:
        """The committed frames after `seq`, as they are on disk; see `history.raw_frames`."""
        newest = self.position()
        return raw_frames(self._folders.journal, newest, seq, chain, place)

    def verify_state(self) -> Position:
        """Add up all records and entries; raises IndexDamaged when either is not as it must be.

        Records must be the state that the journal states, and the entries of unique keys and
        indexes must be those of the records: a damaged entry hides a record from a list
        without any error.
        """
        with self.inspect() as snapshot:
            position = snapshot.position
            if state_of(snapshot) != position.state:
                raise IndexDamaged("its records do not add up to the state the journal states")
            if not entries_add_up(snapshot):
                raise IndexDamaged("its entries are not those of its records")
        return position

    def rebuild(
        self, progress: Progress | None = None, built: Callable[[int], None] | None = None
    ) -> Position:
        """Make the index anew, prove its records by the state digest, and close the catalog.

        `built` is told the number of ops applied before the proof begins. Returns where the
        index stands. Raises StoreBusy while others have ROOT open (the index is as it was
        then), JournalDamaged, IndexDamaged.
        """
        shown_seq = self.position().seq
        self._closed = True  # for all other threads
        try:
            self._committer.close()
            with self._checkpointing:
                self._index.close()
            with self._lock.exclusive("rebuild the index", done=lambda: False):
                index, ops = build_index(
                    self._folders, self.ballast, self._disk, shown_seq, progress
                )
                if built is not None:
                    built(ops)
                try:
                    with index.read() as snapshot:
                        position = snapshot.position
                        if state_of(snapshot) != position.state:
                            raise IndexDamaged("the journal does not add up to its own state")
                    self._write_boot()
                finally:
                    index.close()
        finally:
            self._lock.close()
            self._forget()
        return position

    # --- housekeeping

    def _after_group(self, head: Head) -> None:
        """Runs in the committer thread after a group was acknowledged; must be quick."""
        try:
            self._keep_house(head)
        except Exception:  # noqa: BLE001
            # None of it is worth the thread that everybody's writes depend on.
            return

    def _keep_house(self, head: Head) -> None:
        if self.ballast.given_back and self._clock.now_us() >= self._ballast_due_us:
            self._ballast_due_us = self._clock.now_us() + _BALLAST_EVERY_US
            self.ballast.restore()
        segment = Segment(head.segment_epoch, head.segment_first_seq)
        if segment == self._last_segment:
            return
        rotated, self._last_segment = self._last_segment is not None, segment
        if not rotated:
            return
        self.ballast.restore()
        self._index.reader_check()
        if self._journal_bytes() >= self._settings.checkpoint_bytes:
            threading.Thread(
                target=self._checkpoint_in_background, name="checkpoint", daemon=True
            ).start()

    def _journal_bytes(self) -> int:
        """Bytes of journal that no checkpoint covers."""
        newest = (checkpoints_in(self._folders.checkpoints) or [Checkpoint(0, 0)])[-1]
        covered = Segment(newest.epoch, newest.seq)
        return sum(
            (self._folders.journal / segment.filename).stat().st_size
            for segment in segments_in(self._folders.journal)
            if segment > covered
        )

    def _checkpoint_in_background(self) -> None:
        if not self._checkpointing.acquire(blocking=False):
            return
        try:
            if not self._closed:
                self.checkpoint()
        except (OSError, lmdb.Error, CatalogError):
            # Checkpoints save time, not data: the next rotation tries again, and doctor
            # tells what is wrong with the index or the disk.
            return
        finally:
            self._checkpointing.release()

    def _prune(self) -> None:
        """Remove checkpoints and journal that two newer, proved checkpoints cover."""
        checkpoints = checkpoints_in(self._folders.checkpoints)
        if len(checkpoints) < _CHECKPOINTS_KEPT:
            return
        for old in checkpoints[:-_CHECKPOINTS_KEPT]:
            self._disk.unlink(self._folders.checkpoints / old.filename)
        # Left by a process that was killed: whoever prunes is the only one who writes here.
        for name in os.listdir(self._folders.checkpoints):
            if is_temporary(name):
                self._disk.unlink(self._folders.checkpoints / name)
        self._disk.sync_folder(self._folders.checkpoints)
        oldest = checkpoints[-_CHECKPOINTS_KEPT]
        segments = segments_in(self._folders.journal)
        forget_before_us = self._clock.now_us() - self._settings.journal_keep_us
        for segment, following in itertools.pairwise(segments):
            path = self._folders.journal / segment.filename
            covered = Segment(oldest.epoch, oldest.seq + 1) >= following
            if not covered or path.stat().st_mtime_ns // 1000 > forget_before_us:
                break
            self._disk.unlink(path)
            # One by one: a power cut may undo any of several unsynced removals, and a gap
            # in the journal looks like damage.
            self._disk.sync_folder(self._folders.journal)

    def _distrust(self) -> None:
        """Have the index made anew at the next opening, once everybody has let go of it."""
        self._disk.unlink(self._folders.index / "BOOT")

    def _usable(self) -> None:
        if self._closed:
            raise CatalogClosed if os.getpid() == self._pid else WrongProcess

    def _forked(self) -> None:
        """In a child: this catalog belongs to the parent, its locks and threads stayed there."""
        if not self._closed:
            self._closed = True
            self._lock.close()
            # LMDB's environment came along and must not be closed here, since that would
            # clear the reader slots of the parent, nor opened a second time beside it.
            _inherited_roots.add(self._root)

    def _forget(self) -> None:
        with _open_roots_lock:
            _open_roots.discard(self._root)


def _after_fork() -> None:
    for catalog in _open_catalogs:
        catalog._forked()


os.register_at_fork(after_in_child=_after_fork)
