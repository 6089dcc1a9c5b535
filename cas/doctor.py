"""The doctor: checks every invariant that can be checked on this machine; changes nothing.

It looks at the files first, then opens the store as any reader does (an index that cannot
be trusted is remade by that, as always), so others may go on using the store. What changes
while it looks is looked at again before it is called wrong.
"""

from __future__ import annotations

import itertools
import os
import stat as modes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, final

import msgspec

from cas.adoption import object_of
from cas.blobs import SHARDS
from cas.catalog import Position
from cas.catalog.checkpoint import checkpoints_in, read_checkpoint
from cas.catalog.recovery import Folders, entries_add_up, state_of, verify_journal
from cas.config import Settings
from cas.digest import Digest
from cas.errors import BlobcaskError, BlobMissing, IndexDamaged, JournalDamaged
from cas.format import FORMAT_VERSION
from cas.quotas import miscounted_usage
from cas.records import CONDEMNED, DELETING, LIVE, Blob
from cas.refcounts import miscounts
from cas.replicas import faults, homes
from cas.scrub import Scrub
from cas.store import Store
from cas.totals import miscounted_totals

Severity = Literal["damage", "trouble", "note"]
DAMAGE: Severity = "damage"  # bytes or records are lost or at risk
TROUBLE: Severity = "trouble"  # something does not work, or soon will not
NOTE: Severity = "note"  # worth knowing, not wrong

_PAGE = 1000  # blobs looked up in one snapshot
_INODES_FREE_MIN = 10_000
_TOLD_MAX = 100  # of one kind of finding that may come in millions
_SCRUB = "run blobcask scrub"
_REBUILD = "run blobcask rebuild with the store stopped"
_RECOUNT = "run blobcask recount"
_BACKFILL = "run blobcask replicate backfill; report what stays"
_FETCH = "the background process fetches them, or upload the same bytes again"
_HEAL = "upload the same bytes again: that heals the blob"


@final
class Finding(msgspec.Struct, frozen=True):
    """One thing the doctor found. `invariant` is its number in DESIGN.md, or None."""

    severity: Severity
    invariant: int | None
    what: str
    mend: str

    @property
    def wrong(self) -> bool:
        return self.severity != NOTE


def examine(
    root: Path,
    settings: Settings,
    *,
    read_data: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Finding]:
    """Examine the store at `root`, which no part of this process has open.

    See `examine_store` for the arguments. A store that cannot be opened is a finding too.
    """
    yield from _version(root)
    yield from _folders(root)
    position = Position(0, 0, b"", b"", 0)
    for found in _journal(root):
        if isinstance(found, Finding):
            yield found
        else:
            position = found
    try:
        store = Store.open(root, settings)
    except (BlobcaskError, OSError) as error:
        yield Finding(DAMAGE, 5, f"the store cannot be opened: {error}", "see the message")
        return
    with store:
        yield from _opened(store, position, read_data, progress)


def examine_store(
    store: Store,
    *,
    read_data: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Finding]:
    """Examine a store that is open here.

    `read_data` hashes every blob as well; `progress` is called with the bytes hashed, or
    without `read_data` with the blobs looked at. Memory is constant.
    """
    yield from _version(store.root)
    yield from _folders(store.root)
    position = Position(0, 0, b"", b"", 0)
    for found in _journal(store.root):
        if isinstance(found, Finding):
            yield found
        else:
            position = found
    yield from _opened(store, position, read_data, progress)


def _opened(
    store: Store, position: Position, read_data: bool, progress: Callable[[int], None] | None
) -> Iterator[Finding]:
    yield from _space(store)
    if trouble := store.clock_trouble():
        yield Finding(TROUBLE, 10, trouble, "set the clock; nothing is swept until then")
    yield from _mail(store.settings)
    yield from _index(store, position)
    yield from _blobs(store, read_data, progress)
    yield from _leftovers(store)
    yield from _partials(store)


# --- files


def _version(root: Path) -> Iterator[Finding]:
    try:
        text = (root / "VERSION").read_text().strip()
    except OSError as error:
        yield Finding(DAMAGE, None, f"VERSION cannot be read: {error.strerror}", "restore it")
        return
    if text != str(FORMAT_VERSION):
        older = text.isdigit() and int(text) < FORMAT_VERSION
        yield Finding(
            NOTE if older else TROUBLE,
            None,
            f"the format is {text!r}, not {FORMAT_VERSION}",
            "opening the store upgrades it" if older else "use a newer blobcask",
        )


def _folders(root: Path) -> Iterator[Finding]:
    wanted = [root / name for name in ("objects", "partial", "quarantine", "catalog")]
    wanted += [root / "objects" / f"{number:02x}" for number in range(SHARDS)]
    for folder in wanted:
        if not folder.is_dir():
            yield Finding(
                TROUBLE, None, f"folder {folder} is missing", "opening the store makes it again"
            )
    keys = root / "keys"
    if keys.is_dir():
        for path, most in [(keys, 0o700), *((key, 0o600) for key in sorted(keys.iterdir()))]:
            mode = modes.S_IMODE(path.stat().st_mode)
            if mode & ~most:
                yield Finding(
                    TROUBLE,
                    None,
                    f"others may use {path} (mode {mode:o})",
                    f"chmod {most:o} {path}",
                )
    quarantined = len(os.listdir(root / "quarantine")) if (root / "quarantine").is_dir() else 0
    if quarantined:
        yield Finding(
            NOTE, 7, f"{quarantined} damaged files are in quarantine", "look, then remove them"
        )


def _journal(root: Path) -> Iterator[Finding | Position]:
    """Findings in journal and checkpoints, and the last good position."""
    folders = Folders(root)
    position: Position | None = None
    mend = "keep all files; restore the journal from a copy, or a checkpoint after the damage"
    try:
        for item in _verified(folders):
            if isinstance(item, JournalDamaged):
                yield Finding(DAMAGE, 5, f"journal: {item}", mend)
            else:
                position = item
        for checkpoint in checkpoints_in(folders.checkpoints):
            try:
                for _ in read_checkpoint(folders.checkpoints / checkpoint.filename):
                    pass
            except FileNotFoundError:
                continue  # pruned meanwhile
            except JournalDamaged as error:
                yield Finding(TROUBLE, 5, f"checkpoint: {error}", "run blobcask checkpoint twice")
        for path in sorted(folders.journal.glob("*.damaged")):
            yield Finding(NOTE, 5, f"{path} was set aside", "keep it until its loss is explained")
    except OSError as error:
        yield Finding(DAMAGE, 5, f"the journal cannot be read: {error}", mend)
    if position is not None:
        yield position


def _verified(folders: Folders) -> Iterator[Position | JournalDamaged]:
    """`verify_journal`, again when a segment was pruned under it."""
    for attempt in (1, 2, 3):
        try:
            yield from list(verify_journal(folders))
            return
        except FileNotFoundError:
            if attempt == 3:
                raise


def _space(store: Store) -> Iterator[Finding]:
    usage = os.statvfs(store.root)
    free, least = usage.f_bavail * usage.f_frsize, store.settings.store.min_free
    if free < least:
        yield Finding(
            TROUBLE, None, f"{free:,} bytes free, less than min_free ({least:,})", "make room"
        )
    if usage.f_files and usage.f_favail < _INODES_FREE_MIN:
        yield Finding(TROUBLE, None, f"{usage.f_favail:,} inodes free", "make room for files")


def _mail(settings: Settings) -> Iterator[Finding]:
    """What mails need besides what is refused at the start; no server is asked."""
    mail = settings.mail
    if not mail.host:
        return
    if not settings.gateway.public_url:
        what = "mails hold links to where the gateway listens: [gateway] public_url is empty"
        yield Finding(NOTE, None, what, "set it to what their receivers can reach")
    if mail.ca_file is not None and not os.access(mail.ca_file, os.R_OK):
        what = f"[mail] ca_file {mail.ca_file} cannot be read: no mail is sent"
        yield Finding(TROUBLE, None, what, "put it there, readable for the background process")


# --- the index


def _index(store: Store, position: Position) -> Iterator[Finding]:
    """The index equals the replay of the journal; counts equal references."""
    with store.catalog.inspect() as snapshot:
        # Inside the snapshot: an error that left it would have the index remade, and the
        # doctor changes nothing.
        try:
            now = snapshot.position
            if (now.epoch, now.seq) == (position.epoch, position.seq) and now != position:
                yield Finding(DAMAGE, 5, f"frame {now.seq} of index and journal differ", _REBUILD)
            if state_of(snapshot) != now.state:
                what = "the index's records do not add up to the journal's state"
                yield Finding(DAMAGE, 5, what, _REBUILD)
            if not entries_add_up(snapshot):
                yield Finding(DAMAGE, 5, "index entries are not those of the records", _REBUILD)
            for recorded, counted in miscounted_usage(snapshot)[:_TOLD_MAX]:
                what = (
                    f"tenant {counted.tenant_id} stores {counted.files:,} files of "
                    f"{counted.size_bytes:,} bytes, and is charged for {recorded.files:,} of "
                    f"{recorded.size_bytes:,}"
                )
                yield Finding(TROUBLE, None, what, _RECOUNT)
            for total, sums in miscounted_totals(snapshot)[:_TOLD_MAX]:
                what = (
                    f"the total {total.name} says {total.count:,} with {total.size_bytes:,} bytes, "
                    f"and there are {sums.count:,} with {sums.size_bytes:,}"
                )
                yield Finding(TROUBLE, None, what, _RECOUNT)
            for digest, what in itertools.islice(faults(snapshot), _TOLD_MAX):
                yield Finding(TROUBLE, 6, f"blob {digest.hex()}: {what}", _BACKFILL)
            for wrong in miscounts(snapshot)[:_TOLD_MAX]:
                name = wrong.digest.hex()
                if wrong.recorded is None:
                    what = f"{wrong.counted} records name blob {name}, which has no record"
                    yield Finding(DAMAGE, 3, what, _HEAL)
                else:
                    what = f"blob {name} counts {wrong.recorded} references of {wrong.counted}"
                    yield Finding(DAMAGE, 3, what, "report it, and do not collect until mended")
        except IndexDamaged as error:
            yield Finding(DAMAGE, 5, str(error), _REBUILD)


# --- blobs


def _blobs(
    store: Store, read_data: bool, progress: Callable[[int], None] | None
) -> Iterator[Finding]:
    """Every blob record against its file."""
    after: tuple[Digest] | tuple[()] = ()
    told = looked = 0

    def hashed(size_bytes: int) -> None:
        nonlocal looked
        looked += size_bytes
        if progress:
            progress(looked)

    while True:
        with store.catalog.read() as snapshot:
            blobs = snapshot.range(Blob, "", after=after, limit=_PAGE)
            now_us = store.now_us(snapshot)
        if not blobs:
            return
        after = (blobs[-1].digest,)
        for blob in blobs:
            found = _blob(store, blob, now_us)
            if found is None and read_data and blob.state != DELETING and blob.local:
                found = _bytes(store, blob, hashed)
            if found is not None and _same(store, blob):
                told += 1
                if told <= _TOLD_MAX:
                    yield found
        if progress and not read_data:
            looked += len(blobs)
            progress(looked)


def _blob(store: Store, blob: Blob, now_us: int) -> Finding | None:
    name = blob.digest.hex()
    if blob.state == DELETING:
        if blob.refcount:
            return Finding(DAMAGE, 3, f"blob {name} is named and being deleted", _HEAL)
        if now_us - (blob.deleting_at or 0) > store.settings.store.grace:
            what = f"the removal of blob {name} never ended"
            return Finding(NOTE, 2, what, "run blobcask collect")
        return None
    counted = LIVE if blob.refcount else CONDEMNED
    if blob.state != counted or (blob.condemned_at is None) != (counted == LIVE):
        what = f"blob {name} is {blob.state} with {blob.refcount} references"
        return Finding(DAMAGE, 2, what, "report it, and do not collect until mended")
    if blob.missing_at is not None:
        return _missing(store, blob)
    if not blob.local:
        return _evicted(store, blob)
    placed = store.blobs.stat(blob.digest)
    if placed is None:
        return Finding(DAMAGE, 1, f"blob {name} has no file, and is not listed as missing", _SCRUB)
    if placed.size_bytes != blob.size_bytes:
        what = f"blob {name} has {placed.size_bytes:,} bytes of {blob.size_bytes:,}"
        return Finding(DAMAGE, 7, what, _SCRUB)
    if placed != object_of(blob):
        # A copy of ROOT has other inodes: its bytes are likely good, and not verified yet.
        return Finding(NOTE, 7, f"blob {name} is another file than was verified", _SCRUB)
    return None


def _missing(store: Store, blob: Blob) -> Finding:
    what = f"the bytes of blob {blob.digest.hex()} are missing"
    if not blob.refcount:
        # Nobody needs them; the record goes with the next collection.
        return Finding(NOTE, 1, what, _HEAL)
    held = _homes(store, blob)
    if held:
        return Finding(TROUBLE, 1, f"{what} here; held by {', '.join(held)}", _FETCH)
    return Finding(DAMAGE, 1, what, _HEAL)


def _evicted(store: Store, blob: Blob) -> Finding | None:
    """No damage while a target holds the bytes (invariant 8)."""
    name = blob.digest.hex()
    if not _homes(store, blob):
        what = f"blob {name} is neither here nor at a target, and is not listed as missing"
        return Finding(DAMAGE, 1, what, _HEAL)
    if blob.evicted_at is None:
        return Finding(TROUBLE, 8, f"blob {name} is not here, and was not evicted", _HEAL)
    return None


def _homes(store: Store, blob: Blob) -> list[str]:
    with store.catalog.read() as snapshot:
        return homes(snapshot, blob.digest)


def _bytes(store: Store, blob: Blob, hashed: Callable[[int], None]) -> Finding | None:
    name = blob.digest.hex()
    try:
        measured = store.blobs.check(blob.digest, None, hashed)
    except BlobMissing:
        return Finding(DAMAGE, 1, f"blob {name} has no file, and is not listed as missing", _SCRUB)
    except OSError as error:
        return Finding(DAMAGE, 7, f"blob {name} cannot be read: {error}", _SCRUB)
    if measured.digest != blob.digest:
        what = f"the bytes of blob {name} have digest {measured.digest.hex()}"
        return Finding(DAMAGE, 7, what, _SCRUB)
    if blob.blake3 and measured.blake3 != blob.blake3:
        return Finding(DAMAGE, 7, f"the record of blob {name} has a wrong BLAKE3", _HEAL)
    return None


def _same(store: Store, blob: Blob) -> bool:
    """Whether the record is still as it was when the file was looked at."""
    with store.catalog.read() as snapshot:
        return snapshot.get(Blob, blob.digest) == blob


def _leftovers(store: Store) -> Iterator[Finding]:
    """What no record names, by the eyes of the scrub."""
    walk = Scrub(store, dry_run=True)
    walk.walk_folders()
    report = walk.report
    for count, noun, mend in (
        (len(report.orphans), "objects that no record names, older than the grace", _SCRUB),
        (len(report.leftovers), "files that an eviction left behind", _SCRUB),
        (len(report.temporaries), "temporary files that a crash left behind", _SCRUB),
        (len(report.foreign), "files in objects/ that are no blobs", "look, and move them away"),
        (
            len(store.partial_files.leftovers(store.catalog)),
            "files in partial/ that no record names",
            "run blobcask sweep",
        ),
    ):
        if count:
            yield Finding(NOTE, 2, f"{count:,} {noun}", mend)


def _partials(store: Store) -> Iterator[Finding]:
    for partial in itertools.islice(store.partial_files.short(store.catalog), _TOLD_MAX):
        what = f"resumable upload {partial.partial_id} lost bytes that were acknowledged"
        yield Finding(DAMAGE, 4, what, "its next piece ends it; the sender begins again")
