"""Quotas: how much one tenant may store, and what it stores.

The catalog keeps `Usage` in the transaction of every change, so a quota is judged where the
change is made: two writers at the boundary are two transactions, and the later one sees
what the earlier one took. What a change takes is what the usage grew by, so that naming
bytes that are a file already, or turning a slot into a file, takes nothing.

    admit     before a body is read, for a promised size: a refusal that costs nothing
    keeping   around a change: the judgement that counts
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import TypeVar, final

import msgspec

from cas.catalog import Catalog, Snapshot, Transaction, pages
from cas.errors import LinkQuotaExceeded, QuotaExceeded
from cas.records import RECORDS, Mark, PendingUpload, UploadFile, Usage
from cas.recounts import ACTOR, miscounted, recount

T = TypeVar("T")

_SLOTS_A_WRITE = 1000  # a frame of 200 KB


@final
class Quota(msgspec.Struct, frozen=True):
    """What each tenant may store; 0 is no limit.

    `told` is whether the one who is refused may know the tenant's numbers: the holder of an
    upload token may not (invariant 9).
    """

    files: int = 0
    size_bytes: int = 0
    told: bool = True

    def __bool__(self) -> bool:
        return bool(self.files or self.size_bytes)

    def untold(self) -> Quota:
        """The same for strangers."""
        return Quota(self.files, self.size_bytes, told=False)

    def admit(self, snapshot: Snapshot, tenant_id: str, *, files: int, size_bytes: int) -> None:
        """Raise QuotaExceeded when the tenant has no room for so much more."""
        if self:
            used = usage_of(snapshot, tenant_id)
            self._judge(used, Usage(tenant_id, used.files + files, used.size_bytes + size_bytes))

    def keeping(
        self, tenant_id: str, change: Callable[[Transaction], T]
    ) -> Callable[[Transaction], T]:
        """`change`, raising QuotaExceeded (which undoes it) when it takes the tenant over.

        One that takes nothing passes also where the quota was lowered below what is used.
        """
        if not self:
            return change

        def kept(txn: Transaction) -> T:
            before = usage_of(txn, tenant_id)
            result = change(txn)
            self._judge(before, usage_of(txn, tenant_id))
            return result

        return kept

    def _judge(self, before: Usage, after: Usage) -> None:
        for what, limit, used, wanted in (
            ("files", self.files, before.files, after.files),
            ("size_bytes", self.size_bytes, before.size_bytes, after.size_bytes),
        ):
            if limit and wanted > limit and wanted > used:
                if self.told:
                    raise QuotaExceeded(what, limit, used, wanted - used)
                raise LinkQuotaExceeded(what, limit, used, wanted - used)


NO_QUOTA = Quota()


def usage_of(snapshot: Snapshot, tenant_id: str) -> Usage:
    """What a tenant stores."""
    return snapshot.get(Usage, tenant_id) or Usage(tenant_id, 0, 0)


def recount_usage(catalog: Catalog, done: Mark | None = None) -> int:
    """State the usage of every tenant anew, in one transaction; returns how many were wrong.

    For a store from before there was any, whose slots learn their tenant first, and for the
    operator whose doctor found a miscount. Reads all files under the writer lock: a few
    seconds a million. Harmless to stop anywhere and to repeat; the transaction that ends it
    sets the mark `done`.
    """
    found = _nobodys_slots(catalog)
    for first in range(0, len(found), _SLOTS_A_WRITE):
        slots = found[first : first + _SLOTS_A_WRITE]
        catalog.write(partial(_give_tenants, slots=slots), actor=ACTOR)
    return recount(catalog, Usage, miscounted_usage, done)


def _nobodys_slots(catalog: Catalog) -> list[UploadFile]:
    """The slots that count for nobody, though their upload has a tenant."""
    with catalog.read() as snapshot:
        return [
            slot
            for page in pages(snapshot, UploadFile)
            for slot in page
            if not slot.tenant_id and snapshot.get(PendingUpload, slot.upload_id)
        ]


def _give_tenants(txn: Transaction, slots: Iterable[UploadFile]) -> None:
    for found in slots:
        slot = txn.get(UploadFile, found.upload_id, found.file_index)
        upload = txn.get(PendingUpload, found.upload_id)
        if slot is not None and not slot.tenant_id and upload is not None:
            txn.replace(msgspec.structs.replace(slot, tenant_id=upload.tenant_id))


def miscounted_usage(snapshot: Snapshot) -> list[tuple[Usage, Usage]]:
    """(recorded, counted) of every tenant whose usage is wrong in this snapshot."""
    return miscounted(snapshot, Usage, _counted(snapshot))


def _counted(snapshot: Snapshot) -> dict[str, Usage]:
    """The usage of every tenant that stores anything, added up from all records."""
    totals: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for kind in RECORDS:
        counts = kind.schema.counts
        if counts is None:
            continue
        for record in chain.from_iterable(pages(snapshot, kind)):
            if counts.unless_none and getattr(record, counts.unless_none) is None:
                continue
            total = totals[getattr(record, "tenant_id")]  # noqa: B009  # not of every Record
            total[0] += counts.files
            total[1] += getattr(record, counts.size_bytes)
    return {
        tenant_id: Usage(tenant_id, files, size_bytes)
        for tenant_id, (files, size_bytes) in totals.items()
        if tenant_id and (files or size_bytes)
    }
