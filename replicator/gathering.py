"""Gathering: checkpoint and journal of a store from a target, as far as they hold together.

Objects are brought side by side and judged by their content: which stretches follow one
another is told by chain values alone, so one that another node left, or that a killed
shipper left twice, is passed over. The end is the position that HEAD names. Where the chain
breaks before it, what is lost is told, and nothing is given unless that is accepted.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, final

import msgspec
import zstandard

from cas.catalog import Position
from cas.catalog.checkpoint import Checkpoint, read_checkpoint
from cas.catalog.journal import BEGINNING, Segment, read_frame
from cas.catalog.recovery import Folders, begin_segment
from cas.clock import rfc3339
from cas.durable import Disk, opened
from cas.errors import Conflict, Damaged, JournalDamaged, NotFound
from replicator.archive import Archive, State, Stretch
from replicator.fence import Head
from replicator.targets import ObjectAbsent, Target

FETCHES: Final = 16  # objects at a time
_LOOKED_AT_ONCE: Final = 256  # stretches, on the way to a time that is asked for
_FIRST_FRAME_BYTES: Final = 64 << 10  # of an unpacked checkpoint; its first frame has 130 bytes

Say = Callable[[str], None]


class HistoryBroken(Damaged, Conflict):
    """The history at a target does not reach its HEAD; `lost` says what is missing."""

    def __init__(self, place: str, lost: str) -> None:
        super().__init__(f"{place}: {lost}")
        self.lost = lost


@final
class Gathered(msgspec.Struct, frozen=True):
    """What lies in the folders now."""

    epoch: int
    end: Position  # of the newest frame
    lost: str  # what HEAD promised and the chain does not reach; "" when nothing


@final
class _Scanned:
    """A stretch that was brought here: its frames up to the first bad one."""

    def __init__(self, stretch: Stretch, path: Path) -> None:
        self.stretch = stretch
        self.path = path
        self.chains: list[bytes] = []  # before each frame
        self.starts: list[int] = []  # byte offsets of each, and the end of the last
        self.times: list[int] = []
        self.last: Position | None = None
        self.damage = ""
        with opened(path) as fd:
            self._scan(fd, os.fstat(fd).st_size)

    def _scan(self, fd: int, size_bytes: int) -> None:
        offset = 0
        while offset < size_bytes:
            read = read_frame(fd, offset)
            if isinstance(read, str):
                self._damaged(offset, read)
                break
            frame, position, end = read
            follows = self.last is None or (
                frame.chain == self.last.chain and frame.seq == self.last.seq + 1
            )
            if not follows or frame.seq < self.stretch.first_seq:
                self._damaged(offset, f"frame {frame.seq} does not follow")
                break
            self.chains.append(frame.chain)
            self.starts.append(offset)
            self.times.append(frame.at_us)
            self.last, offset = position, end
        else:
            if self.last is None or self.last.seq != self.stretch.last_seq:
                self._damaged(offset, "it was cut short")
        self.starts.append(offset)

    def _damaged(self, offset: int, reason: str) -> None:
        self.damage = f"{self.stretch.filename} is damaged at byte {offset} ({reason})"

    @property
    def first_seq(self) -> int:
        return self.last.seq - len(self.chains) + 1 if self.last else 0

    def goes_on_from(self, seq: int, chain: bytes) -> bool:
        """Whether it holds the frame after `seq`, of this history."""
        number = seq + 1 - self.first_seq
        return 0 <= number < len(self.chains) and self.chains[number] == chain


# Where it begins, what leads on from there, and what is lost.
_Found = tuple[Position, list[_Scanned], str]


def damage_of(archive: Archive, stretch: Stretch, folder: Path) -> str:
    """Why an object of the journal is no stretch of anybody, in words; "" when it is whole.

    It is brought to a file in `folder` for that, which goes again. Raises TargetError.
    """
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        path = Path(file.name)
        archive.fetch_stretch(stretch, path)
        return _Scanned(stretch, path).damage


def time_of(archive: Archive, state: State, folder: Path) -> int | None:
    """The catalog time of the state that a checkpoint shows; None where it cannot be read.

    Its first bytes are brought to a file in `folder`, which goes again. Raises TargetError.
    """
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        path = Path(file.name)
        try:
            archive.fetch_state(state, path, _FIRST_FRAME_BYTES)
        except (zstandard.ZstdError, ObjectAbsent):
            return None
        with opened(path) as fd:
            read = read_frame(fd, 0)
        return None if isinstance(read, str) else read[1].at_us


@final
class Gathering:
    """Brings one store's catalog from `target` into `folders`, which are empty."""

    def __init__(
        self,
        target: Target,
        head: Head,
        folders: Folders,
        disk: Disk,
        say: Say,
        stop: threading.Event | None = None,
    ) -> None:
        """`stop`, once set, ends it with SendingStopped."""
        self._target = target
        self._head = head
        self._folders = folders
        self._disk = disk
        self._say = say
        self._archive = Archive(target, head.store_id, stop=stop)
        self._brought = folders.catalog / "brought"
        self._scans: dict[Stretch, _Scanned] = {}
        self._stretches: list[Stretch] = []
        self._states: list[State] = []
        self._damaged: set[int] = set()  # epochs with a checkpoint that is
        # Epochs with a checkpoint from after the time that is asked for: the first one's frame.
        self._after: dict[int, int] = {}

    def gather(self, *, at_us: int | None = None, accept_loss: bool = False) -> Gathered:
        """Bring all that is needed for the state at HEAD, or at catalog time `at_us`.

        Raises HistoryBroken where it cannot be had whole (unless `accept_loss`), NotFound
        where nothing reaches back to `at_us`, TargetError.
        """
        self._folders.make(self._disk)
        self._disk.make_folder(self._brought)
        self._stretches = list(self._archive.stretches())
        self._states = list(self._archive.states())
        best: _Found | None = None
        troubles: list[str] = []
        for start in self._starts(at_us, troubles):
            path, lost = self._path(start, at_us)
            found = (start, path, lost)
            if best is None or self._rank(found) > self._rank(best):
                best = found
            if not lost:
                break
        if best is None or (_reached(best).seq == 0 and self._head.seq):
            raise self._nothing(at_us, [*troubles, *([best[2]] if best and best[2] else [])])
        start, path, lost = best
        if not lost:
            for trouble in troubles:
                self._say(f"{trouble}; an older one serves.")
        lost = "; ".join([*troubles, lost]) if lost else ""
        if lost and not accept_loss:
            raise HistoryBroken(self._target.place, lost)
        end = self._lay(start, path, at_us)
        if not end.seq:
            raise self._nothing(at_us, troubles)
        return Gathered(end.epoch, end, lost)

    def _nothing(self, at_us: int | None, troubles: list[str]) -> Exception:
        if at_us is None:
            return HistoryBroken(self._target.place, "; ".join(troubles))
        kept = f"history at {self._target.place} that reaches back to"
        return NotFound(kept, rfc3339(at_us))

    # --- where to begin

    def _starts(self, at_us: int | None, troubles: list[str]) -> Iterator[Position]:
        """Checkpoints that may be begun from, newest first, and the beginning of all.

        Each lies in the folder while the next one is not asked for.
        """
        newest = (self._head.epoch, self._head.seq)
        # Nothing of what is newer than HEAD is in it.
        known = [state for state in self._states if (state.epoch, state.seq) <= newest]
        lived = [state for state in known if self._lived(state.epoch, state.seq)]
        for state in reversed(lived):
            yield from self._start(state, at_us, troubles)
        yield BEGINNING
        for state in reversed(known):
            if state not in lived:
                yield from self._start(state, at_us, troubles)

    def _start(self, state: State, at_us: int | None, troubles: list[str]) -> Iterator[Position]:
        path = self._folders.checkpoints / Checkpoint(state.epoch, state.seq).filename
        try:
            if at_us is not None and self._begins_at(state, path) > at_us:
                self._after[state.epoch] = state.seq  # they come newest first
            else:
                self._archive.fetch_state(state, path)
                yield _read_through(path)
        except (JournalDamaged, zstandard.ZstdError, ObjectAbsent) as error:
            self._damaged.add(state.epoch)
            troubles.append(f"checkpoint {state.filename} is damaged ({error})")
        self._disk.unlink(path)

    def _lived(self, epoch: int, seq: int) -> bool:
        """Whether a node went on from there. A restore that ended before it was in HEAD leaves
        a checkpoint too, and the node before it goes on."""
        if epoch == self._head.epoch or any(one.epoch == epoch for one in self._stretches):
            return True
        return not any(one.epoch < epoch and one.last_seq > seq for one in self._stretches)

    def _rank(self, found: _Found) -> tuple[bool, int, int]:
        epoch, reached = found[0].epoch, _reached(found)
        return self._lived(epoch, found[0].seq), epoch, reached.seq

    def _begins_at(self, state: State, path: Path) -> int:
        self._archive.fetch_state(state, path, _FIRST_FRAME_BYTES)
        with opened(path) as fd:
            read = read_frame(fd, 0)
        if isinstance(read, str):
            raise JournalDamaged(path, 0, read)
        return read[1].at_us

    # --- how to go on

    def _path(self, start: Position, at_us: int | None) -> tuple[list[_Scanned], str]:
        """The stretches that lead from `start` to the end, and what is lost on the way."""
        head = self._head
        end = (head.seq, head.chain_value) if start.epoch == head.epoch else None
        if end == (start.seq, start.chain):
            return [], ""
        wanted = [
            stretch
            for stretch in self._stretches
            if stretch.epoch == start.epoch
            and stretch.last_seq > start.seq
            and (end is None or stretch.first_seq <= end[0])
        ]
        path: list[_Scanned] = []
        step = _LOOKED_AT_ONCE if at_us is not None else len(wanted) or 1
        for count in range(step, len(wanted) + step, step):
            self._bring(wanted[:count])
            scans = [self._scans[stretch] for stretch in wanted if stretch in self._scans]
            path = _longest(start, scans, end)
            reached = _end_of(start, path)
            if at_us is not None and reached.at_us > at_us:
                return path, ""
        reached = _end_of(start, path)
        if end == (reached.seq, reached.chain):
            return path, ""
        damage = [
            self._scans[one].damage if one in self._scans else f"{one.filename} is gone"
            for one in wanted
            if one not in self._scans or self._scans[one].damage
        ]
        if end is None:
            return path, self._lost_of_older(reached, wanted, damage, at_us)
        return path, self._lost(reached, damage)

    def _lost(self, reached: Position, damage: list[str]) -> str:
        count = self._head.seq - reached.seq
        lost = f"the last {count} frames, written" if count > 0 else "what was written"
        return (
            f"{'; '.join(damage) or 'an object is missing'}: lost are {lost} after "
            f"{rfc3339(reached.at_us)} and up to {rfc3339(self._head.at)}"
        )

    def _lost_of_older(
        self, reached: Position, wanted: list[Stretch], damage: list[str], at_us: int | None
    ) -> str:
        """What is lost where an epoch before HEAD's leads to `reached`.

        Its end is written down nowhere. It is whole, for a time that is asked for, where all
        that was shipped in it is there, and the next epoch is known to have begun after that
        time and from no later frame.
        """
        head = self._head
        until = f"after {rfc3339(reached.at_us)} and up to"
        if at_us is None:
            return f"epoch {head.epoch} cannot be reached: lost is all {until} {rfc3339(head.at)}"
        spoken = {one.epoch for one in self._stretches} | self._damaged | {head.epoch}
        later = {epoch for epoch in spoken if reached.epoch < epoch <= head.epoch}
        unknown = sorted(epoch for epoch in later if not self._began_after(epoch))
        if unknown:
            damage = [*damage, f"the beginning of epoch {unknown[0]} is missing"]
        next_epoch = min((epoch for epoch in self._after if epoch > reached.epoch), default=0)
        promised = max([self._after.get(next_epoch, 0), *(one.last_seq for one in wanted)])
        if not unknown and promised <= reached.seq:
            return ""
        return (
            f"{'; '.join(damage) or 'an object is missing'}: lost is all {until} {rfc3339(at_us)}"
        )

    def _began_after(self, epoch: int) -> bool:
        """Whether the very first checkpoint of an epoch is there, and after the time asked for."""
        first = self._after.get(epoch)
        firsts = (one.first_seq for one in self._stretches if one.epoch == epoch)
        return first is not None and all(seq > first for seq in firsts)

    def _bring(self, wanted: list[Stretch]) -> None:
        missing = [stretch for stretch in wanted if stretch not in self._scans]
        with ThreadPoolExecutor(FETCHES, thread_name_prefix="gather") as pool:
            for stretch, path in zip(missing, pool.map(self._fetch, missing), strict=True):
                if path is not None:
                    self._scans[stretch] = _Scanned(stretch, path)

    def _fetch(self, stretch: Stretch) -> Path | None:
        path = self._brought / stretch.filename
        try:
            self._archive.fetch_stretch(stretch, path)
        except ObjectAbsent:  # compacted at this moment
            return None
        return path

    # --- laying it down

    def _lay(self, start: Position, path: list[_Scanned], at_us: int | None) -> Position:
        """Make segments of the stretches, one frame after the other, up to `at_us`."""
        checkpoint = Checkpoint(start.epoch, start.seq).filename
        if start != BEGINNING and not (self._folders.checkpoints / checkpoint).exists():
            self._archive.fetch_state(
                State(start.epoch, start.seq), self._folders.checkpoints / checkpoint
            )
        end = start
        for scan in path:
            end = self._lay_one(scan, end, at_us)
            if at_us is not None and scan.times[-1] > at_us:
                break
        for scan in self._scans.values():
            self._disk.unlink(scan.path)
        self._brought.rmdir()
        if end == start:
            begin_segment(self._folders, Segment(end.epoch, end.seq + 1), self._disk)
        return end

    def _lay_one(self, scan: _Scanned, end: Position, at_us: int | None) -> Position:
        first = end.seq + 1 - scan.first_seq
        beyond = len(scan.times)
        if at_us is not None:
            beyond = next((n for n, time in enumerate(scan.times) if time > at_us), beyond)
        if beyond <= first:
            return end
        with opened(scan.path) as fd:
            data = os.pread(fd, scan.starts[beyond] - scan.starts[first], scan.starts[first])
            last = read_frame(fd, scan.starts[beyond - 1])
        assert not isinstance(last, str)
        segment = Segment(scan.stretch.epoch, end.seq + 1)
        (self._folders.journal / segment.filename).write_bytes(data)
        return last[1]


def _reached(found: _Found) -> Position:
    start, path, _ = found
    return _end_of(start, path)


def _end_of(start: Position, path: list[_Scanned]) -> Position:
    return path[-1].last or start if path else start


def _read_through(path: Path) -> Position:
    """The position of a checkpoint that is whole; raises JournalDamaged."""
    position: Position | None = None
    for item in read_checkpoint(path):
        if isinstance(item, Position):
            position = item
    assert position is not None
    return position


def _longest(
    start: Position, scans: list[_Scanned], end: tuple[int, bytes] | None
) -> list[_Scanned]:
    """The stretches from `start` to `end`; where it is not reached, those that lead farthest."""
    beginning: defaultdict[tuple[int, bytes], list[_Scanned]] = defaultdict(list)
    for scan in scans:
        if scan.chains:
            beginning[scan.first_seq, scan.chains[0]].append(scan)
    best = (start.seq, start.chain)
    # Each place that is reached, by which stretch and from where: paths are thousands long.
    came: dict[tuple[int, bytes], tuple[tuple[int, bytes], _Scanned] | None] = {best: None}
    frontier = [best]
    while frontier:
        seq, chain = frontier.pop()
        if (seq, chain) == end:
            return _way(came, (seq, chain))
        if seq > best[0]:
            best = (seq, chain)
        going_on = beginning.get((seq + 1, chain), []) or [
            scan for scan in scans if scan.goes_on_from(seq, chain)
        ]
        for scan in going_on:
            last = scan.last
            if last is not None and last.seq > seq and (last.seq, last.chain) not in came:
                came[last.seq, last.chain] = ((seq, chain), scan)
                frontier.append((last.seq, last.chain))
    return _way(came, best)


def _way(
    came: dict[tuple[int, bytes], tuple[tuple[int, bytes], _Scanned] | None],
    end: tuple[int, bytes],
) -> list[_Scanned]:
    way: list[_Scanned] = []
    while step := came[end]:
        end, scan = step
        way.append(scan)
    return way[::-1]
