"""The catalog: all records, behind a seam of few operations.

Everything above speaks to these three protocols only, so that another form (SQL) is
finished when it passes `tests/contracts/test_catalog.py`. The form of this package keeps
an append-only journal as the truth and an LMDB index as its shadow:

    local        LocalCatalog: committer thread, roll-forward, opening and closing
    journal      frames and segments
    checkpoint   the whole state as one file of frames
    lmdb         the index: one LMDB environment
    layout       record types compiled: keys, index entries, the state digest
    images       records as they stand in the index
    snapshot     reading; transaction: changing, with counts kept by the catalog itself
    tuples       order-preserving keys
    ground       what ROOT stands on: LOCK, BOOT, filesystem, PID namespace
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar, final

import msgspec

from cas.catalog.tuples import Value
from cas.records import Record

R = TypeVar("R", bound=Record)
T = TypeVar("T")

Key = tuple[Value, ...]

_PAGE = 1000  # records read at once by `pages`


class Snapshot(Protocol):
    """The catalog as it was at one commit. Sees durable state only (invariant 4)."""

    def get(self, kind: type[R], *key: Value) -> R | None:
        """The record with this primary key, or None."""
        ...

    def find(self, kind: type[R], unique: str, *values: Value) -> R | None:
        """The record with these values in the unique key named `unique`, or None."""
        ...

    def range(
        self,
        kind: type[R],
        index: str,
        prefix: Key = (),
        *,
        after: Key = (),
        before: Key = (),
        limit: int = 100,
        bytes_max: int | None = None,
        reverse: bool = False,
    ) -> list[R]:
        """Up to `limit` records in the order of `index`, or of the primary key for "". With
        `bytes_max` no more than come to so many bytes as they are kept, but for the first one.

        `prefix` fixes the first fields; `after` and `before` (both exclusive, continuing
        the prefix) bound what follows. An `after` that names fewer fields than the index
        skips every record that begins with it. The cost is that of the records returned.
        """
        ...

    @property
    def position(self) -> Position:
        """Which frame of the journal this snapshot shows."""
        ...


def pages(
    snapshot: Snapshot, kind: type[R], index: str = "", prefix: Key = ()
) -> Iterator[list[R]]:
    """All records of `kind` in the order of `index`, that begin with `prefix`; 1,000 at a time."""
    fields = kind.schema.indexes[index] if index else kind.schema.key
    after: Key = ()
    while page := snapshot.range(kind, index, prefix, after=after, limit=_PAGE):
        yield page
        after = tuple(getattr(page[-1], field) for field in fields[len(prefix) :])


class Transaction(Snapshot, Protocol):
    """A serializable read-write view.

    The catalog itself counts digest fields in `blobs`, and what tenants store in `usage`;
    a write that reads either sees its own changes counted.
    """

    @property
    def now_us(self) -> int:
        """Catalog time: never goes back, not even across restarts (invariant 10)."""
        ...

    @property
    def believed(self) -> bool:
        """Whether the clock was believed. Else `now_us` stands still: a term that begins
        now must not be counted from it (see `cas.dating`)."""
        ...

    def insert(self, record: Record) -> None:
        """Add a record; raises RecordExists when its key or a unique value is taken.

        Raises NotFound("blob") when a digest field names a blob that has no record, and
        BlobDeleting when its bytes are being removed (invariant 3).
        """
        ...

    def replace(self, record: Record) -> None:
        """Put `record` over the one with its primary key; raises NotFound without one."""
        ...

    def delete(self, record: Record) -> None:
        """Remove the record with this one's primary key; raises NotFound without one."""
        ...


@final
class Position(msgspec.Struct, frozen=True, array_like=True):
    """A place in the journal: after frame `seq` of `epoch`, whose chain value is `chain`."""

    epoch: int
    seq: int
    chain: bytes  # 32: BLAKE3 over all that was ever written
    state: bytes  # 16: the digest of all records, see `journal`
    at_us: int  # catalog time of the frame


@final
class Change(msgspec.Struct, frozen=True):
    """One committed write as the journal keeps it; `ops` are (type, key, record or None)."""

    seq: int
    at_us: int
    actor: str
    request_id: str
    ops: list[tuple[type[Record], Key | bytes, Record | None]]


class Catalog(Protocol):
    """All records of one ROOT, shared by threads and processes."""

    def read(self) -> AbstractContextManager[Snapshot]:
        """A snapshot; keep it short, and never across network I/O: it pins index pages."""
        ...

    def write(
        self, change: Callable[[Transaction], T], *, actor: str = "", request_id: str = ""
    ) -> T:
        """Run `change` in a serializable transaction; on return it is durable (invariant 4).

        `change` may run more than once and must have no other effect. What it raises
        undoes it and is raised here. Raises CatalogFailed when a sync failed (the outcome
        is unknown then), StoreFull when there is no space.
        """
        ...

    def alone(self, act: Callable[[Snapshot], T]) -> T:
        """Run `act` while nobody else writes, in this process or any other.

        It sees what is committed and what the writes before it in its own group changed,
        which is undecided: should the group fail, they are undone, and what `act` did stays.
        So `act` must be right with them and without.

        For what is done to files that a writer may be about to name, such as unlinking one
        that no record names. It is journalled nowhere, so it needs no space; unlike a
        change it may have effects, and they stay when it raises. Keep it short.
        """
        ...

    def changes(self, after_seq: int) -> Iterator[Change]:
        """The committed writes after `after_seq`, oldest first, as far as they are kept."""
        ...

    def checkpoint(self) -> Position:
        """Write the whole state beside the journal, durable on return; prunes what it covers."""
        ...

    def position(self) -> Position:
        """The newest committed frame."""
        ...

    def close(self) -> None: ...
