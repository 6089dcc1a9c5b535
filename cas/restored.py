"""What a restore leaves to be decided or done: marks in the catalog.

After a restore to an earlier time the store remembers deliveries that were made since, and
lacks removals that were asked for since. Nothing is swept, sent or deleted at targets before
the operator has looked and accepted it.
"""

from __future__ import annotations

from typing import Final

from cas.catalog import Catalog, Snapshot, Transaction
from cas.records import Mark

RESTORED_TIME: Final = "restored_at_time"  # the mark; its value is that time
FETCHING: Final = "restore_fetching"  # the mark of an eager restore under way: from where
DRILLED: Final = "last_successful_drill:"  # and the target's name: the mark; its value is when


def waits_for_acceptance(snapshot: Snapshot) -> str:
    """Why nothing may be swept, sent or deleted at targets now, in words; "" when it may."""
    mark = snapshot.get(Mark, RESTORED_TIME)
    if mark is None:
        return ""
    return (
        f"the store was restored as of {mark.value}; look at it, then run blobcask restore --accept"
    )


def accept(catalog: Catalog, *, actor: str) -> str:
    """Let all go on after a restore to an earlier time; returns that time, "" without one."""
    return _drop(catalog, RESTORED_TIME, actor)


def fetched(catalog: Catalog, *, actor: str) -> None:
    """Say that an eager restore has fetched all it could."""
    _drop(catalog, FETCHING, actor)


def drilled(catalog: Catalog, target: str, at: str, *, actor: str) -> None:
    """Write down when a drill with a target last succeeded."""
    mark = Mark(DRILLED + target, at)

    def put(txn: Transaction) -> None:
        if txn.get(Mark, mark.name) is None:
            txn.insert(mark)
        else:
            txn.replace(mark)

    catalog.write(put, actor=actor)


def last_drill(snapshot: Snapshot, target: str) -> str | None:
    """When a drill with a target last succeeded; None: none ever did."""
    mark = snapshot.get(Mark, DRILLED + target)
    return mark.value if mark else None


def _drop(catalog: Catalog, name: str, actor: str) -> str:
    def drop(txn: Transaction) -> str:
        mark = txn.get(Mark, name)
        if mark is None:
            return ""
        txn.delete(mark)
        return mark.value

    return catalog.write(drop, actor=actor)
