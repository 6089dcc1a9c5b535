"""Recounts: sums over records, compared with what the catalog keeps and stated anew.

The catalog keeps them in the transaction of every change (`cas.quotas`, `cas.totals`); each
of those counts its own from all records. A sum of nothing has no record, and is zeros here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import TypeVar

from cas.catalog import Catalog, Snapshot, Transaction, pages
from cas.records import Mark, Total, Usage

Sum = TypeVar("Sum", Total, Usage)

ACTOR = "recount"


def miscounted(
    snapshot: Snapshot, kind: type[Sum], counted: Mapping[str, Sum]
) -> list[tuple[Sum, Sum]]:
    """(recorded, counted) of every sum of `kind` that is wrong, in the order of their names."""
    records = chain.from_iterable(pages(snapshot, kind))
    recorded = {_name(record): record for record in records}
    return [
        (recorded.get(name, kind(name, 0, 0)), counted.get(name, kind(name, 0, 0)))
        for name in sorted(counted.keys() | recorded.keys())
        if recorded.get(name) != counted.get(name)
    ]


def recount(
    catalog: Catalog,
    kind: type[Sum],
    find_wrong: Callable[[Snapshot], list[tuple[Sum, Sum]]],
    done: Mark | None,
) -> int:
    """State anew what `find_wrong` finds, in one transaction; returns how many that were.

    Sets the mark `done`, if one is given, in the same transaction; does nothing where it is set.
    """

    def restate(txn: Transaction) -> int:
        if done is not None:
            if txn.get(Mark, done.name) is not None:
                return 0  # another process that opened the store was faster
            txn.insert(done)
        wrong = find_wrong(txn)
        for recorded, counted in wrong:
            name = _name(counted)
            if counted == kind(name, 0, 0):
                txn.delete(recorded)
            elif txn.get(kind, name) is None:
                txn.insert(counted)
            else:
                txn.replace(counted)
        return len(wrong)

    return catalog.write(restate, actor=ACTOR)


def _name(record: Total | Usage) -> str:
    (name,) = record.primary_key()
    return str(name)
