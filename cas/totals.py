"""Totals: sums over all records of a kind, read in constant time.

The catalog keeps each `Total` in the transaction of every change, as it keeps reference
counts and usage: what a record adds is in its schema (`Adds`).

    blobs:here        blobs whose bytes are here
    blobs:elsewhere   blobs whose bytes are at targets only, or missing there too
    backlog:<target>  copies that are wanted there
    waits_for:<topic>, waits_of:<tenant>
                      waits for events (`cas.events`), without bytes
    values_of:<run>   what the steps of a run came to
"""

from __future__ import annotations

from collections import defaultdict
from itertools import chain

from cas.catalog import Catalog, Snapshot, Transaction, pages
from cas.records import RECORDS, Mark, Total

_ACTOR = "recount"


def blobs_here(snapshot: Snapshot) -> Total:
    """How many blobs have their bytes here, and how many bytes those are."""
    return _total(snapshot, "blobs:here")


def blobs_elsewhere(snapshot: Snapshot) -> Total:
    """How many blobs are not here, and their bytes."""
    return _total(snapshot, "blobs:elsewhere")


def backlog_of(snapshot: Snapshot, target: str) -> Total:
    """How many copies are wanted at a target, and their bytes."""
    return _total(snapshot, f"backlog:{target}")


def waits_for(snapshot: Snapshot, about: str) -> int:
    """How many wait for a topic (`cas.events.topic`), those included whose time is over and
    who have not noticed."""
    return _total(snapshot, f"waits_for:{about}").count


def waits_of(snapshot: Snapshot, tenant_id: str) -> int:
    """How many waits of a tenant's clients there are that nobody has claimed."""
    return _total(snapshot, f"waits_of:{tenant_id}").count


def values_of(snapshot: Snapshot, run_id: str) -> int:
    """How many bytes the results of a run's steps have, and what else is kept beside them."""
    return _total(snapshot, f"values_of:{run_id}").size_bytes


def _total(snapshot: Snapshot, name: str) -> Total:
    return snapshot.get(Total, name) or Total(name, 0, 0)


def recount_totals(catalog: Catalog, done: Mark | None = None) -> int:
    """State all totals anew, in one transaction; returns how many were wrong.

    For a store from before there were any, and for the operator whose doctor found a
    miscount. Reads all blobs and rows under the writer lock: a few seconds a million.
    Harmless to stop and to repeat; sets the mark `done`.
    """

    def recount(txn: Transaction) -> int:
        if done is not None:
            if txn.get(Mark, done.name) is not None:
                return 0  # another process that opened the store was faster
            txn.insert(done)
        wrong = miscounted_totals(txn)
        for recorded, counted in wrong:
            if not (counted.count or counted.size_bytes):
                txn.delete(recorded)
            elif txn.get(Total, counted.name) is None:
                txn.insert(counted)
            else:
                txn.replace(counted)
        return len(wrong)

    return catalog.write(recount, actor=_ACTOR)


def miscounted_totals(snapshot: Snapshot) -> list[tuple[Total, Total]]:
    """(recorded, counted) of every total that is wrong in this snapshot."""
    counted = _counted(snapshot)
    recorded = {total.name: total for page in pages(snapshot, Total) for total in page}
    return [
        (recorded.get(name, Total(name, 0, 0)), counted.get(name, Total(name, 0, 0)))
        for name in sorted(counted.keys() | recorded.keys())
        if recorded.get(name) != counted.get(name)
    ]


def _counted(snapshot: Snapshot) -> dict[str, Total]:
    """Every total, added up from all records."""
    sums: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for kind in RECORDS:
        if not kind.schema.adds:
            continue
        for record in chain.from_iterable(pages(snapshot, kind)):
            for part in filter(None, (adds.part(record) for adds in kind.schema.adds)):
                total = sums[part[0]]
                total[0] += 1
                total[1] += part[1]
    return {name: Total(name, count, size_bytes) for name, (count, size_bytes) in sums.items()}
