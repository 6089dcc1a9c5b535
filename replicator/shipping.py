"""Shipping: the journal goes to each target, frame for frame, with a checkpoint now and then.

How far it has come is derived from HEAD.json at the target, at every step, and stored nowhere
here. A stretch of frames is put and read back, then HEAD is swapped: a shipper that is killed
in between leaves a stretch that HEAD does not name yet, which the next one finds or passes.

A target that was shipped to and has no HEAD any more was emptied, or is another one under the
same address. It is closed then until its listing was compared with the rows, and what is not
there is wanted again; after that it is served like a new one.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, final

import msgspec

from cas.catalog import Position
from cas.catalog.checkpoint import Checkpoint
from cas.catalog.history import RawFrame
from cas.catalog.journal import BEGINNING
from cas.catalog.recovery import Folders
from cas.clock import SECOND_US
from cas.dating import note_time
from cas.errors import JournalDamaged, NotFound
from cas.replicas import begin_shipping, keep_profile, was_shipped_to
from cas.store import Store
from replicator.archive import Archive, State, Stretch, Taken
from replicator.bandwidth import SendingStopped
from replicator.fence import Begin, Fenced, Head, Seen, judge, node_of, read_head, swap_head
from replicator.gathering import damage_of, time_of
from replicator.link import Link
from replicator.patient import Patient
from replicator.probe import Profile
from replicator.regaining import want_absent
from replicator.targets import HEAD, ObjectStat, TargetError

STRETCH_BYTES: Final = 8 << 20  # a stretch ends with the frame that reaches it
_STRETCHES_A_STEP: Final = 8
# A checkpoint is due when what a restore would read after the last one weighs as much as it,
# or this; an object weighs as much as its bytes and the time of a request.
_COMPACT_WEIGHT: Final = 64 << 20
_OBJECT_WEIGHT: Final = 128 << 10
_LOOK_US: Final = 3600 * SECOND_US  # between two listings of what is there
_DELETED_A_STEP: Final = 100
_SOON_S: Final = 0.2
_STATES_KEPT: Final = 2  # the newest may turn out bad
_ACTOR: Final = "replicator"

_log = logging.getLogger("blobcask.replicator")


@final
class Shipped(msgspec.Struct, frozen=True):
    """What a step found out; see `Link`."""

    fenced: str
    position: Position | None = None  # of HEAD, when it is this node's
    more: bool = False


@final
class Ship:
    """The job that ships to one target."""

    def __init__(self, store: Store, link: Link) -> None:
        self.name = f"ship {link.name}"
        self._every_s = store.settings.replicator.ship_every / SECOND_US
        self._store = store
        self._link = link
        self._shipper: Shipper | None = None
        self._stop = threading.Event()

    @property
    def interval_s(self) -> float:
        """Short until the target was reached: nothing is copied before HEAD was looked at."""
        return self._every_s if self._link.profile else min(self._every_s, _SOON_S)

    @property
    def shipper(self) -> Shipper | None:
        """What ships, once the target was reached."""
        return self._shipper

    async def step(self, _now_us: int) -> bool:
        """Ship what is new, up to some stretches; True when there is more."""
        link = self._link
        if link.profile is None:
            return False
        if self._shipper is None or self._shipper.profile.probed_at_us != link.profile.probed_at_us:
            self._shipper = Shipper(self._store, link, link.profile, self._stop)
        try:
            shipped = await asyncio.to_thread(self._shipper.step)
        except SendingStopped:
            return False
        except TargetError:
            link.answers = False
            raise
        link.answers = True
        if not self._shipper.profile.conditional:
            link.profile = msgspec.structs.replace(link.profile, conditional=False)
        if shipped.fenced != link.fenced:
            if shipped.fenced:
                _log.error("nothing is written to %s: %s", link.name, shipped.fenced)
            link.fenced = shipped.fenced
        if shipped.position is not None:
            link.shipped_seq = shipped.position.seq
            link.shipped_at_us = shipped.position.at_us
        return shipped.more

    def stop(self) -> None:
        """End what is being sent, in the middle: also what `Compact` sends."""
        self._stop.set()

    async def close(self) -> None:
        """End the thread, where the step is not waited for."""
        self._stop.set()


@final
class Compact:
    """The job that keeps what was shipped to one target short. Beside shipping, so that no
    write waits for a checkpoint to arrive, and none for a target that deletes nothing."""

    interval_s: Final = 30.0

    def __init__(self, store: Store, link: Link, ship: Ship) -> None:
        self.name = f"compact {link.name}"
        self._store = store
        self._link = link
        self._ship = ship

    async def step(self, now_us: int) -> bool:
        """One checkpoint, or some deletions; True when there is more. Raises TargetError."""
        shipper = self._ship.shipper
        if shipper is None or not self._link.open:
            return False
        try:
            return await asyncio.to_thread(shipper.compact, now_us)
        except SendingStopped:  # shipping was told to stop
            return False

    async def close(self) -> None:
        """Nothing is left open between steps."""


@final
class Shipper:
    """Ships one store to one target. For one thread at a time, and one that compacts."""

    def __init__(
        self, store: Store, link: Link, profile: Profile, stop: threading.Event | None = None
    ) -> None:
        """`stop`, once set, ends what is being sent with SendingStopped."""
        self._store = store
        self._catalog = store.catalog
        # A step is some requests, each of which must succeed.
        self._target = Patient(link.target, stop)
        self._store_id = store.store_id()
        self._archive = Archive(self._target, self._store_id, profile, stop)
        self._kept = profile
        folder = Folders(store.root).checkpoints
        self._compaction = Compaction(self._archive, store.settings.replicator.history, folder)
        self._stop = stop
        self._is_new = False  # known to hold nothing that counts on HEAD
        self._is_bereft = False  # HEAD was there, and is not: told by the last step

    @property
    def profile(self) -> Profile:
        """What the target honours, as far as it is known now."""
        profile = self._archive.profile
        assert profile is not None
        return profile

    def step(self) -> Shipped:
        """Ship up to some stretches.

        Raises TargetError; what was shipped before is at the target then.
        """
        try:
            return self._step()
        finally:
            self._keep_profile()

    def _step(self) -> Shipped:
        node = node_of(self._store.root, self._store.disk)
        try:
            seen = read_head(self._target)
            begin = self._begin(node, seen)
            if self._was_emptied(seen):
                return Shipped(f"HEAD.json is gone from {self._target.place}", None, more=True)
            seen, more = self._advance(node, seen, begin)
            if seen.head is not None:
                self._is_new = self._is_bereft = False
        except Fenced as fenced:
            return Shipped(str(fenced))
        return Shipped("", seen.head and position_of(seen.head), more)

    def _was_emptied(self, seen: Seen) -> bool:
        """Whether HEAD is found gone just now. The step after that, which begins when nothing
        is written or evicted on the word of the rows any more, has them say what is there."""
        name = self._target.name
        with self._catalog.read() as snapshot:
            shipped_before = was_shipped_to(snapshot, name)
        if not shipped_before:
            with suppress(NotFound):
                begin_shipping(self._catalog, name)
        if seen.head is not None or self._is_new:
            return False
        if shipped_before and not self._is_bereft:
            self._is_bereft = True
            return True
        if shipped_before and (count := want_absent(self._store, self._target, self._stop)):
            _log.error("%s has lost %d copies, which are made anew", name, count)
        self._is_new = True
        return False

    def _begin(self, node: str, seen: Seen) -> Begin:
        try:
            return judge(self._catalog, self._store_id, node, self._target, seen)
        except JournalDamaged as error:
            # The index is right, or a checkpoint of it would be refused: begin with one.
            _log.warning("the journal is not shipped but passed by a checkpoint: %s", error)
            head, newest = seen.head, self._catalog.position()
            if head is None:
                return Begin(BEGINNING.seq, BEGINNING.chain, None, newest)
            return Begin(head.seq, head.chain_value, None, newest)

    def _advance(self, node: str, seen: Seen, begin: Begin) -> tuple[Seen, bool]:
        if begin.place is None:
            return self._swap(node, seen, self._ship_state()), True
        for _ in range(_STRETCHES_A_STEP):
            try:
                frames = self._next_frames(begin)
                if not frames:
                    return seen, False
                position, frames = self._ship_next(begin, frames)
            except JournalDamaged:
                return self._swap(node, seen, self._ship_state()), True
            seen = self._swap(node, seen, position)
            place = next(frame.place for frame in frames if frame.position == position)
            begin = Begin(position.seq, position.chain, place, begin.newest)
        return seen, True

    def _swap(self, node: str, seen: Seen, position: Position) -> Seen:
        head = Head.of(self._store_id, position, node, self._target.name)
        return swap_head(
            self._target,
            seen,
            head,
            conditional=self.profile.conditional,
            distrust=self._archive.distrust,
        )

    def _keep_profile(self) -> None:
        """Write down what was found out about the target by using it."""
        if self.profile != self._kept:
            self._kept = self.profile
            with suppress(NotFound):
                keep_profile(self._catalog, self._target.name, self._kept.to_json())

    def _next_frames(self, begin: Begin, fewest: int = 1) -> list[RawFrame]:
        """As many as a stretch holds, and `fewest` where there are so many."""
        assert begin.place is not None
        found: list[RawFrame] = []
        size_bytes = 0
        frames: Iterator[RawFrame] = self._catalog.raw_frames(begin.seq, begin.chain, begin.place)
        for frame in frames:
            if found and frame.position.epoch != found[0].position.epoch:
                break
            found.append(frame)
            size_bytes += len(frame.data)
            if size_bytes >= STRETCH_BYTES and len(found) >= fewest:
                break
        return found

    def _ship_next(self, begin: Begin, frames: list[RawFrame]) -> tuple[Position, list[RawFrame]]:
        """Ship `frames`, or another stretch from there on; returns where it ends, and of what."""
        try:
            return self._ship_stretch(begin, frames), frames
        except Taken as taken:
            longer = self._longer(begin, frames, taken)
        return self._ship_stretch(begin, longer), longer

    def _longer(self, begin: Begin, frames: list[RawFrame], taken: Taken) -> list[RawFrame]:
        """A stretch that ends later, and so has another name; raises `taken` where the next
        write is to be waited for.

        What is no stretch of anybody, such as one that was stored half, is no reason to wait:
        then a frame is written here.
        """
        longer = self._next_frames(begin, len(frames) + 1)
        if len(longer) <= len(frames):
            last = frames[-1].position
            stretch = Stretch(last.epoch, begin.seq + 1, last.seq)
            damage = damage_of(self._archive, stretch, Folders(self._store.root).checkpoints)
            if not damage:
                raise taken
            _log.warning("going round what is at %s: %s", self._target.place, damage)
            self._catalog.write(note_time, actor=_ACTOR)
            longer = self._next_frames(begin, len(frames) + 1)
        return longer

    def _ship_stretch(self, begin: Begin, frames: list[RawFrame]) -> Position:
        """Put frames, all or all but the last; returns the position after them.

        Another node that was fenced since may have left its frames under the very name.
        """
        for some in (frames, frames[:-1]):
            if not some:
                break
            last = some[-1].position
            stretch = Stretch(last.epoch, begin.seq + 1, last.seq)
            data = b"".join(frame.data for frame in some)
            try:
                self._archive.put_stretch(stretch, data)
            except Taken as error:
                taken = error
                continue
            self._compaction.added(len(data))
            return last
        raise Taken(f"{taken}; the next write goes round it")

    def _ship_state(self) -> Position:
        position = self._catalog.checkpoint()
        state = State(position.epoch, position.seq)
        name = Checkpoint(position.epoch, position.seq).filename
        size_bytes = self._archive.put_state(state, Folders(self._store.root).checkpoints / name)
        self._compaction.compacted(size_bytes)
        return position

    def compact(self, now_us: int) -> bool:
        """Delete some of what nobody can want any more, and ship a checkpoint where one is due;
        True when there is more. `now_us` is catalog time. Raises TargetError.

        Deleting comes first: a full target takes no checkpoint before.
        """
        node = node_of(self._store.root, self._store.disk)
        try:
            seen = read_head(self._target)
            judge(self._catalog, self._store_id, node, self._target, seen)
        except (Fenced, JournalDamaged):
            return False  # shipping tells, and goes past damage
        if seen.head is None:
            return False
        self._compaction.look(now_us, seen.head)
        more = False
        if not self._store.clock_trouble():
            more = self._compaction.delete(self._target.stat(HEAD).modified_us, now_us, seen.head)
        if self._compaction.due():
            self._ship_state()
            return True
        return more


@final
class Compaction:
    """Decides what of an archive a restore still needs. Looks once an hour, and counts.

    What lies beyond HEAD is left alone: a restore that came to nothing may have left it.
    """

    def __init__(self, archive: Archive, history_us: int, folder: Path) -> None:
        """In `folder` a checkpoint's first bytes are looked at."""
        self._archive = archive
        self._history_us = history_us
        self._folder = folder
        self._looked_us: int | None = None
        self._objects = 0  # after the newest checkpoint
        self._bytes = 0
        self._state_bytes = 0
        self._stretches: dict[Stretch, ObjectStat] = {}
        self._states: dict[State, ObjectStat] = {}
        self._times: dict[State, int | None] = {}  # catalog time; None: it is damaged

    def added(self, size_bytes: int) -> None:
        self._objects += 1
        self._bytes += size_bytes

    def compacted(self, state_bytes: int) -> None:
        self._objects = self._bytes = 0
        self._state_bytes = state_bytes
        self._looked_us = None

    def look(self, now_us: int, head: Head) -> None:
        """Look at what is there, where that is due."""
        if self._looked_us is None or not 0 <= now_us - self._looked_us < _LOOK_US:
            self._looked_us = now_us
            self._look(head)

    def due(self) -> bool:
        """Whether a checkpoint should be shipped."""
        weight = self._bytes + self._objects * _OBJECT_WEIGHT
        return weight >= max(_COMPACT_WEIGHT, self._state_bytes)

    def delete(self, modified_us: int, now_us: int, head: Head) -> bool:
        """Delete some of what is older than the history that is kept; True when there is more.

        All that lies before a checkpoint goes, once that one is older than the history, and
        the newest but one at most. It must be older by the target's time, in which HEAD is of
        `modified_us`, and by catalog time `now_us`: a clock may be wrong, the target's too,
        which is this machine's where the target is a folder.
        """
        states = [one for one in sorted(self._states) if _is_within(one.epoch, one.seq, head)]
        states = states[: 1 - _STATES_KEPT]
        old = [
            state
            for state in states
            if self._states[state].modified_us <= modified_us - self._history_us
        ]
        base = next((one for one in reversed(old) if self._is_of_before(one, now_us)), None)
        if base is None:
            return False
        doomed: list[Stretch | State] = [
            stretch
            for stretch in self._stretches
            if (stretch.epoch, stretch.last_seq) <= (base.epoch, base.seq)
        ]
        doomed += [state for state in states if state < base]
        for one in doomed[:_DELETED_A_STEP]:
            if isinstance(one, Stretch):
                self._archive.delete_stretch(one)
                del self._stretches[one]
            else:
                self._archive.delete_state(one)
                del self._states[one]
        return len(doomed) > _DELETED_A_STEP

    def _is_of_before(self, state: State, now_us: int) -> bool:
        """Whether it shows a state from before the history that is kept."""
        if state not in self._times:
            self._times[state] = time_of(self._archive, state, self._folder)
        at_us = self._times[state]
        return at_us is not None and at_us <= now_us - self._history_us

    def _look(self, head: Head) -> None:
        # Of this epoch a checkpoint may be a little ahead of HEAD.
        self._stretches = {
            one: stat for one, stat in self._archive.stretches().items() if one.epoch <= head.epoch
        }
        self._states = {
            one: stat for one, stat in self._archive.states().items() if one.epoch <= head.epoch
        }
        self._times = {one: at for one, at in self._times.items() if one in self._states}
        newest = max(self._states, default=State(0, 0))
        after = [
            stat
            for stretch, stat in self._stretches.items()
            if (stretch.epoch, stretch.last_seq) > (newest.epoch, newest.seq)
        ]
        self._objects = len(after)
        self._bytes = sum(stat.size_bytes for stat in after)
        self._state_bytes = self._states[newest].size_bytes if self._states else 0


def _is_within(epoch: int, seq: int, head: Head) -> bool:
    return (epoch, seq) <= (head.epoch, head.seq)


def position_of(head: Head) -> Position:
    """HEAD as a position; it knows no state digest."""
    return Position(head.epoch, head.seq, head.chain_value, b"", head.at)
