"""Totals: sums over all records of a kind, read in constant time.

The catalog keeps each `Total` in the transaction of every change, as it keeps reference
counts and usage: what a record adds is in its schema (`Adds`).

    blobs:here        blobs whose bytes are here
    blobs:elsewhere   blobs whose bytes are at targets only, or missing there too
    backlog:<target>  copies that are wanted there
    waits_for:<topic>, waits_of:<tenant>
                      waits for events (`cas.events`), without bytes
    values_of:<run>   what the steps of a run came to
    items_of:<run>    the items of its loops and, in place of bytes, the steps in them
    held_of:<tenant>  events that others told, kept for a wait that begins later
    kept_of:<tenant>  events that others told and are kept, whyever, the waits that the
                      tenant's clients have claimed and may ask for again, and the keys under
                      which others told something once
    runs:<status>, runs_of:<tenant>
                      runs that have not ended, without bytes
    approvals_of:<tenant>
                      approvals that are remembered, without bytes
    mails_of:<tenant> mails that are still to go out, without bytes
"""

from __future__ import annotations

from collections import defaultdict
from itertools import chain
from typing import Final

from cas.catalog import Catalog, Snapshot, pages
from cas.records import QUEUED, RECORDS, RUNNING, WAITING, Mark, Total
from cas.recounts import miscounted, recount

_PAGE: Final = 1_000


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


def steps_of(snapshot: Snapshot, run_id: str) -> int:
    """How many steps the loops of a run have together."""
    return _total(snapshot, f"items_of:{run_id}").size_bytes


def held_of(snapshot: Snapshot, tenant_id: str) -> int:
    """How many bytes the events of a tenant have that others told, and that are kept for a wait
    that begins later; those whose time is over included, until the sweep."""
    return _total(snapshot, f"held_of:{tenant_id}").size_bytes


def kept_of(snapshot: Snapshot, tenant_id: str) -> int:
    """How many bytes are kept of the events of a tenant that others told, of the keys under which
    they did, and of the waits of its clients that were claimed; until the sweep, those included
    whose time is over."""
    return _total(snapshot, f"kept_of:{tenant_id}").size_bytes


def held_bytes(snapshot: Snapshot) -> int:
    """The same of all tenants."""
    size_bytes = 0
    after = ("held_of:",)
    while page := snapshot.range(Total, "", after=after, before=("held_of;",), limit=_PAGE):
        size_bytes += sum(total.size_bytes for total in page)
        after = (page[-1].name,)
    return size_bytes


def open_runs(snapshot: Snapshot) -> dict[str, int]:
    """How many runs of all tenants have not ended, by status."""
    return {
        status: _total(snapshot, f"runs:{status}").count for status in (QUEUED, RUNNING, WAITING)
    }


def open_runs_of(snapshot: Snapshot, tenant_id: str) -> int:
    """How many runs of a tenant have not ended."""
    return _total(snapshot, f"runs_of:{tenant_id}").count


def approvals_of(snapshot: Snapshot, tenant_id: str) -> int:
    """How many approvals of a tenant are remembered, also such as have ended."""
    return _total(snapshot, f"approvals_of:{tenant_id}").count


def mails_of(snapshot: Snapshot, tenant_id: str) -> int:
    """How many mails of a tenant are still to go out."""
    return _total(snapshot, f"mails_of:{tenant_id}").count


def _total(snapshot: Snapshot, name: str) -> Total:
    return snapshot.get(Total, name) or Total(name, 0, 0)


def recount_totals(catalog: Catalog, done: Mark | None = None) -> int:
    """State all totals anew, in one transaction; returns how many were wrong.

    For a store from before there were any, and for the operator whose doctor found a
    miscount. Reads all blobs and rows under the writer lock: a few seconds a million.
    Harmless to stop and to repeat; sets the mark `done`.
    """
    return recount(catalog, Total, miscounted_totals, done)


def miscounted_totals(snapshot: Snapshot) -> list[tuple[Total, Total]]:
    """(recorded, counted) of every total that is wrong in this snapshot."""
    return miscounted(snapshot, Total, _counted(snapshot))


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
