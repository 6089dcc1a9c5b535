"""The fence: one node ships to a target (invariant 12).

    PREFIX/HEAD.json    whose history is there, how far it goes, and which node ships it
    ROOT/NODE           which node this is

A node writes to a target while HEAD names it, and HEAD's position lies in its own journal.
Every change of HEAD is compared and swapped. A copy of ROOT finds out that it is one, since
NODE also holds what a copy cannot have: the inode of NODE itself, and this machine's
identifier. Where even those are alike (a machine cloned, disk and all), the first of the two
to ship wins: the other's journal does not hold the new HEAD.
"""

from __future__ import annotations

import io
import logging
import os
import platform
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final, final

import msgspec

from cas.catalog import Position
from cas.catalog.history import Lies
from cas.catalog.journal import BEGINNING, Segment
from cas.catalog.local import LocalCatalog
from cas.clock import rfc3339
from cas.durable import Disk, temporary_name
from cas.errors import Conflict
from cas.format import FORMAT_VERSION
from replicator.targets import HEAD, BytesDiffer, Changed, ObjectAbsent, Target

NODE: Final = "NODE"
_MACHINE: Final = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
_HEAD_BYTES_MAX: Final = 1 << 16
_CONDITIONS_TRIED: Final = 2

_log = logging.getLogger("blobcask.replicator")


class Fenced(Conflict):
    """This node may not write to the target; the text says why and what to do."""


# --- which node this is


@final
class Node(msgspec.Struct, frozen=True):
    """The content of ROOT/NODE: the identifier, and by what a copy is told from it."""

    node: str
    inode: int
    device: int  # only compared within one boot: numbers of devices change
    boot_id: str
    machine_id: str

    def is_of(self, found: os.stat_result, boot_id: str) -> bool:
        """Whether the file `found` on this machine is the one that was written then."""
        same = (self.inode, self.machine_id) == (found.st_ino, _machine_id())
        return same and (self.boot_id != boot_id or self.device == found.st_dev)


def node_of(root: Path, disk: Disk) -> str:
    """The identifier of the node that works on `root`; a new one where ROOT is a copy."""
    path = root / NODE
    try:
        node = msgspec.json.decode(path.read_bytes(), type=Node)
        if node.is_of(path.stat(), disk.boot_id()):
            return node.node
    except (FileNotFoundError, msgspec.MsgspecError):
        pass
    return new_node(root, disk)


def new_node(root: Path, disk: Disk) -> str:
    """Write ROOT/NODE anew; durable on return."""
    aside = root / temporary_name()
    fd = disk.create(aside)
    try:
        found = os.fstat(fd)
        node = Node(str(uuid.uuid4()), found.st_ino, found.st_dev, disk.boot_id(), _machine_id())
        disk.write(fd, msgspec.json.encode(node) + b"\n")
        disk.sync_data(fd)
        disk.rename(aside, root / NODE)
    except BaseException:
        disk.unlink(aside)
        raise
    finally:
        os.close(fd)
    disk.sync_folder(root)
    return node.node


def _machine_id() -> str:
    for path in _MACHINE:
        try:
            return path.read_text().strip()
        except OSError:
            continue
    return ""


# --- what is at the target


@final
class Head(msgspec.Struct, frozen=True):
    """The content of HEAD.json."""

    store_id: str
    epoch: int
    seq: int
    chain: str  # hex
    at: int  # catalog time of that frame, µs since 1970 UTC
    node: str
    host: str  # for people
    target: str  # by what name that node knows the target
    format_version: int = FORMAT_VERSION  # of the records that the frames hold

    @classmethod
    def of(cls, store_id: str, position: Position, node: str, target: str) -> Head:
        """The head of what this node has shipped."""
        return cls(
            store_id,
            position.epoch,
            position.seq,
            position.chain.hex(),
            position.at_us,
            node,
            platform.node(),
            target,
        )

    @property
    def chain_value(self) -> bytes:
        return bytes.fromhex(self.chain)

    @property
    def told(self) -> str:
        return f"frame {self.seq} of epoch {self.epoch}, of {rfc3339(self.at)}"


@final
class Seen(msgspec.Struct, frozen=True):
    """HEAD as it was read, with what a swap compares."""

    head: Head | None
    etag: str = ""
    data: bytes = b""


def read_head(target: Target) -> Seen:
    """HEAD.json as it is now; raises TargetError, and Fenced where nobody can read it."""
    try:
        with target.get(HEAD) as incoming:
            pieces = []
            while piece := incoming.read(_HEAD_BYTES_MAX):
                pieces.append(piece)
            data = b"".join(pieces)
            etag = incoming.stat.etag
    except ObjectAbsent:
        return Seen(None)
    try:
        return Seen(msgspec.json.decode(data, type=Head), etag, data)
    except msgspec.MsgspecError as error:
        raise Fenced(f"HEAD.json at {target.place} is not readable: {error}") from None


def swap_head(
    target: Target,
    seen: Seen,
    head: Head,
    *,
    conditional: bool,
    distrust: Callable[[], None] = lambda: None,
) -> Seen:
    """Put `head` in the place of what was `seen`, and read it back.

    Raises Fenced where another one is there meanwhile. `conditional` says that the target
    compares by itself; where it does not, HEAD is read once more before, which leaves two
    nodes the time of one request. One that refuses twice although HEAD is as it was does not
    honour what it was asked, whatever the probe saw: `distrust` is called, and it goes on
    without, or this node would be fenced for ever.
    """
    data = msgspec.json.encode(head) + b"\n"
    for _ in range(_CONDITIONS_TRIED if conditional else 0):
        seen = _swap_once(target, seen, data, conditional=True)
        if seen.data == data:
            return seen
    if conditional:
        _log.warning(
            "%s refuses to change HEAD.json although nobody else changed it: it does not honour "
            "conditions, and is not asked for them any more",
            target.place,
        )
        distrust()
    if read_head(target).data != seen.data:
        raise _raced(target)
    now = _swap_once(target, seen, data, conditional=False)
    if now.data != data:
        raise BytesDiffer(target.name, "HEAD.json cannot be changed: the request is refused")
    return now


def _swap_once(target: Target, seen: Seen, data: bytes, *, conditional: bool) -> Seen:
    """HEAD as it is afterwards: `data`, or where that was refused what was there before,
    perhaps under another etag. Raises Fenced where it is anything else."""
    refused = False
    try:
        target.put(
            HEAD,
            io.BytesIO(data),
            len(data),
            if_match=seen.etag if conditional and seen.head else None,
            if_absent=conditional and not seen.head,
        )
    except Changed:
        refused = True  # by another node, or by this very request, sent twice: reading tells
    now = read_head(target)
    if now.data not in (data, seen.data):
        raise _raced(target)
    if now.data != data and not refused:
        raise BytesDiffer(target.name, "HEAD.json is as it was, though its change was taken")
    return now


def _raced(target: Target) -> Fenced:
    return Fenced(f"another node changed HEAD.json at {target.place} at the same time")


# --- the judgement


@final
class Begin(msgspec.Struct, frozen=True):
    """From where this node ships: after frame `seq`, which stands before `place`.

    `place` None: the journal does not go on from there, so a checkpoint comes first.
    """

    seq: int
    chain: bytes
    place: tuple[Segment, int] | None
    newest: Position


def judge(catalog: LocalCatalog, store_id: str, node: str, target: Target, seen: Seen) -> Begin:
    """Where to go on shipping; raises Fenced with the reason where this node must not.

    Raises JournalDamaged where the own journal cannot tell.
    """
    head = seen.head
    if head is None:
        found, newest = catalog.locate(BEGINNING.seq, BEGINNING.chain)
        place = found.place if newest.epoch == BEGINNING.epoch else None
        return Begin(BEGINNING.seq, BEGINNING.chain, place, newest)
    if head.store_id != store_id:
        raise Fenced(
            f"{target.place} belongs to another store ({head.store_id}, shipped by {head.host}); "
            "give this one a prefix of its own"
        )
    if head.node != node:
        raise Fenced(
            f"another node ({head.node} on {head.host}) ships to {target.place}, last "
            f"{head.told}; where that one is gone for good: blobcask replicate claim {target.name}"
        )
    return place_of(catalog, target, head)


def place_of(catalog: LocalCatalog, target: Target, head: Head) -> Begin:
    """Where HEAD's position lies in the own journal; raises Fenced where it does not."""
    found, newest = catalog.locate(head.seq, head.chain_value)
    if head.epoch > newest.epoch or found.lies is Lies.AHEAD:
        raise Fenced(
            f"{target.place} knows more than this store ({head.told}, here frame {newest.seq} of "
            f"epoch {newest.epoch}): this is an older copy of it; restore from there"
        )
    if found.lies is Lies.FOREIGN:
        raise Fenced(
            f"what is at {target.place} ({head.told}) is no part of this store's history: two "
            "copies of one store went different ways; keep one, restore the other from there"
        )
    # A new epoch begins with records that no frame tells of.
    place = found.place if head.epoch == newest.epoch else None
    return Begin(head.seq, head.chain_value, place, newest)


def claim(
    catalog: LocalCatalog, store_id: str, node: str, target: Target, *, conditional: bool
) -> Head | None:
    """Make this node the one that ships to `target`; returns whose turn it was, None: nobody's.

    Raises Fenced where what is there is not of this store's history; nothing is changed then.
    """
    seen = read_head(target)
    if seen.head is None:
        return None
    mine = msgspec.structs.replace(seen.head, node=node, host=platform.node(), target=target.name)
    judge(catalog, store_id, node, target, msgspec.structs.replace(seen, head=mine))
    if seen.head.node != node:
        swap_head(target, seen, mine, conditional=conditional)
    return seen.head
