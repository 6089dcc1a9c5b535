"""Restoring: a node made from a target alone.

    ROOT/restoring/catalog    brought, replayed, proved, and changed to what is true here
      → the new epoch's checkpoint is put at the target, and HEAD names this node
    ROOT/NODE, ROOT/catalog   which node this is; renamed
    ROOT/VERSION              written last: from here on it is a store

Before VERSION nothing opens ROOT, so a restore that was killed is begun again over what it
left. After it the store is whole: what is not here is fetched when it is read. An eager
restore then fetches all, and goes on where it was killed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Final, final

import msgspec

from cas.catalog import Key, Position, pages
from cas.catalog.lmdb import Index
from cas.catalog.rebase import Rebased, rebase, replayed
from cas.catalog.recovery import Folders
from cas.clock import Clock, SystemClock, advance, rfc3339
from cas.config import Settings
from cas.durable import DISK, Disk, is_temporary
from cas.errors import Mismatch, NotFound, UnsuitableRoot
from cas.format import FORMAT_VERSION
from cas.records import Blob, Mark
from cas.restored import FETCHING, RESTORED_TIME, fetched
from cas.store import Store
from replicator.archive import Archive, State, stores_at
from replicator.fence import NODE, Fenced, Head, Seen, new_node, read_head, swap_head
from replicator.gathering import FETCHES, Gathering, Say
from replicator.listing import Listing
from replicator.probe import Profile
from replicator.relocation import Counted, Relocation
from replicator.targets import Incoming, Target, TargetError, object_key

_STAGE: Final = "restoring"
_OURS: Final = frozenset({"keys", "lost+found", "LOCK", "REPLICATOR"})
_PAGE: Final = 500
_ACTOR: Final = "restore"


@final
class Options(msgspec.Struct, frozen=True):
    """What the operator asks of a restore."""

    at_us: int | None = None  # the state at this catalog time, in place of the newest
    accept_loss: bool = False  # go on where the history at the target is broken
    eager: bool = False  # fetch all bytes too
    claims: bool = True  # this node ships to the target from now on


@final
class Restored(msgspec.Struct, frozen=True):
    """What a restore made."""

    head: Head  # as it was found
    began: Position  # the new epoch's beginning
    state_of_us: int  # catalog time of the newest write that is back
    lost: str  # of the history, in words; "" when nothing
    counted: Counted


class RestoreRefused(UnsuitableRoot):
    """ROOT is not a place to restore to."""


def restore(
    root: Path,
    settings: Settings,
    target: Target,
    profile: Profile | None,
    options: Options,
    *,
    say: Say,
    clock: Clock | None = None,
    disk: Disk = DISK,
) -> Restored:
    """Make a store at `root`, which is absent or empty, from what is at `target`.

    On return it can be opened and serves; no bytes are here yet. `profile` may be None where
    nothing is claimed. Raises RestoreRefused, NotFound (nothing was shipped there),
    HistoryBroken, Fenced (two restores at one moment), TargetError.
    """
    root = root.absolute()
    refuse(root)
    seen = read_head(target)
    head = seen.head or (_without_head(target) if options.accept_loss else None)
    if head is None:
        raise NotFound("HEAD.json, so nothing was shipped,", target.place)
    if head.format_version > FORMAT_VERSION:
        reason = f"{target.place} was written by a newer blobcask (format "
        raise RestoreRefused(root, f"{reason}{head.format_version})")
    restoring = _Restoring(root, settings, target, head, options, clock, disk, say)
    restoring.clear()
    restored = restoring.make()
    if options.claims:
        assert profile is not None
        seen = restoring.claim(seen, restored.began, profile)
        if restoring.has_doubted and restoring.lost_meanwhile():
            # Nobody deletes there any more, so once is enough.
            restoring.clear()
            restored = restoring.make()
            restoring.claim(seen, restored.began, profile)
    restoring.finish()
    return restored


def refuse(root: Path) -> None:
    """Raise RestoreRefused where `root` holds anything but what a killed restore left."""
    if not root.exists():
        return
    found = {entry.name for entry in root.iterdir() if not is_temporary(entry.name)}
    if "VERSION" in found:
        raise RestoreRefused(root, "a store is there; restore into an empty folder")
    left = {_STAGE, "catalog", NODE} if _STAGE in found else set()
    foreign = found - _OURS - left
    if foreign:
        raise RestoreRefused(root, f"it is not empty: {min(foreign)}")


def _without_head(target: Target) -> Head | None:
    """The head that a lost HEAD.json must have been like: as far as anything there goes."""
    stores = stores_at(target)
    if len(stores) != 1:
        return None
    archive = Archive(target, stores.pop())
    ends = [(stretch.epoch, stretch.last_seq) for stretch in archive.stretches()]
    ends += [(state.epoch, state.seq) for state in archive.states()]
    epoch, seq = max(ends)
    return Head(archive.store_id, epoch, seq, "", 0, "unknown", "unknown", target.name)


@final
class _Restoring:
    """The steps of one restore."""

    def __init__(
        self,
        root: Path,
        settings: Settings,
        target: Target,
        head: Head,
        options: Options,
        clock: Clock | None,
        disk: Disk,
        say: Say,
    ) -> None:
        self._root = root
        self._settings = settings
        self._target = target
        self._head = head
        self._options = options
        self._clock = clock or SystemClock()
        self._disk = disk
        self._say = say
        self._stage = root / _STAGE
        self._archive = Archive(target, head.store_id)
        self.name = head.target  # what the records made call the target
        self.has_doubted = False

    def clear(self) -> None:
        """Begin with nothing but the folder that tells that a restore is under way."""
        self._root.mkdir(parents=True, exist_ok=True)
        for path in (self._root / "catalog", self._stage):
            shutil.rmtree(path, ignore_errors=True)
        self._disk.unlink(self._root / NODE)
        self._disk.make_folder(self._stage, 0o700)
        self._disk.sync_folder(self._root)

    def make(self) -> Restored:
        """Bring and change the catalog, in the stage."""
        options = self._options
        folders = Folders(self._stage)
        gathering = Gathering(self._target, self._head, folders, self._disk, self._say)
        gathered = gathering.gather(at_us=options.at_us, accept_loss=options.accept_loss)
        relocation = self._relocation(gathered.end)
        made = self._rebased(folders, gathered.end, relocation)
        self.name, self.has_doubted = relocation.name, relocation.has_doubted
        return Restored(self._head, made.now, gathered.end.at_us, gathered.lost, relocation.counted)

    def _relocation(self, end: Position) -> Relocation:
        options = self._options
        marks = []
        if options.at_us is not None:
            marks.append(Mark(RESTORED_TIME, rfc3339(options.at_us)))
        if options.eager:
            marks.append(Mark(FETCHING, self._target.place))
        return Relocation(
            self._target,
            self._head.target,
            self._now_us(end),
            marks,
            new_name=self._name(),
            distrust=options.at_us is not None,
        )

    def _name(self) -> str:
        """What this node's settings call the target; as the node before did where they do not."""
        known = {target.name for target in self._settings.targets}
        return self._target.name if self._target.name in known else self._head.target

    def _now_us(self, end: Position) -> int:
        return advance(self._clock, end.at_us, self._settings.sweeper.max_clock_gap)

    def _rebased(self, folders: Folders, end: Position, relocation: Relocation) -> Rebased:
        index = replayed(folders, self._disk, prove=False)
        return rebase(index, folders, self._free_epoch(), self._now_us(end), relocation, self._disk)

    def _free_epoch(self) -> int:
        """An epoch that nothing at the target speaks of."""
        spoken = {state.epoch for state in self._archive.states()}
        spoken |= {stretch.epoch for stretch in self._archive.stretches()}
        return max(spoken | {self._head.epoch}) + 1

    def claim(self, seen: Seen, began: Position, profile: Profile) -> Seen:
        """Put the new epoch's checkpoint at the target, and this node into HEAD."""
        archive = Archive(self._target, self._head.store_id, profile)
        state = State(began.epoch, began.seq)
        path = Folders(self._stage).checkpoints / state.filename.removesuffix(".zst")
        archive.put_state(state, path)
        node = new_node(self._root, self._disk)
        head = Head.of(self._head.store_id, began, node, self.name)
        try:
            return swap_head(self._target, seen, head, conditional=profile.conditional)
        except Fenced:
            self._take_back(archive, state)
            raise

    def _take_back(self, archive: Archive, state: State) -> None:
        """Delete the checkpoint of an epoch that does not begin, or a later restore meets it."""
        with suppress(TargetError, Fenced):
            head = read_head(self._target).head
            if head is not None and head.epoch < state.epoch:
                archive.delete_state(state)

    def lost_meanwhile(self) -> bool:
        """Whether the node before deleted, before this one had HEAD, what was seen there."""
        listing = Listing(self._target)
        index = Index(Folders(self._stage).index)
        try:
            with index.read() as snapshot:
                return any(
                    blob.evicted_at is not None and listing.size_of(blob.digest) is None
                    for blob in chain.from_iterable(pages(snapshot, Blob))
                )
        finally:
            index.close()

    def finish(self) -> None:
        """Give the catalog its place, and say that ROOT is a store; durable on return."""
        self._disk.rename(self._stage / "catalog", self._root / "catalog")
        self._disk.sync_folder(self._root)
        # Records of an older format are brought to this one when the store is opened.
        self._disk.write_file(self._root / "VERSION", f"{FORMAT_VERSION}\n".encode())
        shutil.rmtree(self._stage)


# --- the bytes


@final
class Fetched(msgspec.Struct):
    """What an eager restore brought."""

    blobs: int = 0
    size_bytes: int = 0
    failed: dict[str, str] = msgspec.field(default_factory=dict)  # digest: why


def fetch_all(
    store: Store,
    target: Target,
    progress: Callable[[int], None],
    others: Sequence[Target] = (),
) -> Fetched:
    """Bring every evicted blob of `store` here, verified; `progress` is told of bytes.

    What `target` does not give is asked of the `others`, in their order. What is killed goes
    on where it was. What could not be fetched stays at the target, and is
    fetched when it is read.
    """
    done = Fetched()
    after: Key = ()
    with ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch") as pool:
        while True:
            with store.catalog.read() as snapshot:
                blobs = snapshot.range(Blob, "evicted", after=after, limit=_PAGE)
            if not blobs:
                break
            after = (blobs[-1].evicted_at or 0, blobs[-1].digest)
            for blob, error in zip(
                blobs,
                pool.map(lambda one: _fetch(store, [target, *others], one), blobs),
                strict=True,
            ):
                if error:
                    done.failed[blob.digest.hex()] = error
                    continue
                done.blobs += 1
                done.size_bytes += blob.size_bytes
                progress(blob.size_bytes)
    if not done.failed:
        fetched(store.catalog, actor=_ACTOR)
    return done


def _fetch(store: Store, targets: Sequence[Target], blob: Blob) -> str:
    """Why it could not be fetched; "" when it is here."""
    troubles = []
    for target in targets:
        try:
            with target.get(object_key(blob.digest)) as incoming:
                staged = store.blobs.stage(
                    _Stream(incoming), promised_size=blob.size_bytes, promised_digest=blob.digest
                )
            with staged:
                store.adoption.bring_back(staged, actor=_ACTOR)
        except (TargetError, Mismatch) as error:
            troubles.append(str(error))
        else:
            return ""
    return "; ".join(troubles)


@final
class _Stream:
    """An object being read, as a source of bytes."""

    def __init__(self, incoming: Incoming) -> None:
        self._incoming = incoming

    def readinto(self, buffer: memoryview, /) -> int:
        piece = self._incoming.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)
