"""Listings: pages of records, newest first, at the cost of what a page holds; and one record
of a tenant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Generic, TypeVar, final

from cas.catalog import Key, Snapshot
from cas.records import Record

R = TypeVar("R", bound=Record)
T = TypeVar("T")

PAGE_MAX: Final = 1000
# Of the records of a page, as they are kept: its reader may take its time, and it lies in memory
# meanwhile.
PAGE_BYTES_MAX: Final = 1 << 20


@final
@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a listing; `next_cursor` asks for the next, None at the end."""

    items: list[T]
    next_cursor: str | None


def newest(
    snapshot: Snapshot, kind: type[R], index: str, prefix: Key, cursor: str | None, limit: int
) -> Page[R]:
    """Up to `limit` records (1 to PAGE_MAX), the newest first, before the one that `cursor`
    names; fewer where they are long (PAGE_BYTES_MAX), but one at least where there is any.

    For types whose key is one identifier that grows with time (`new_id`), and an index of them
    that ends with it. Whoever shows fewer of a page keeps its cursor.
    """
    limit = max(1, min(limit, PAGE_MAX))
    before = () if cursor is None else (cursor,)
    found = snapshot.range(
        kind, index, prefix, before=before, limit=limit, bytes_max=PAGE_BYTES_MAX, reverse=True
    )
    if not found:
        return Page(found, None)
    last = str(found[-1].primary_key()[0])
    more = snapshot.range(kind, index, prefix, before=(last,), limit=1, reverse=True)
    return Page(found, last if more else None)


def own(snapshot: Snapshot, kind: type[R], tenant_id: str, identifier: str) -> R | None:
    """The record with this identifier among those of a tenant; None where it has none.

    Looked for is only in the tenant's part of the index "tenant": another one's record is not
    even read, however long it is, so that it takes the time of one that is nowhere (invariant 9).
    """
    return next(iter(snapshot.range(kind, "tenant", (tenant_id, identifier), limit=1)), None)
