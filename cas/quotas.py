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
from collections.abc import Callable, Iterator
from typing import TypeVar, final

import msgspec

from cas.catalog import Catalog, Key, Snapshot, Transaction
from cas.errors import LinkQuotaExceeded, QuotaExceeded
from cas.records import RECORDS, PendingUpload, Record, UploadFile, Usage

R = TypeVar("R", bound=Record)
T = TypeVar("T")

_PAGE = 1000  # records read at once by a recount


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


def recount_usage(catalog: Catalog) -> int:
    """State the usage of every tenant anew, in one transaction; returns how many were wrong.

    For a store from before there was any, and for the operator whose doctor found a
    miscount. Slots from before they knew their tenant learn it. Reads all files under the
    writer lock: a few seconds a million. Harmless to repeat.
    """

    def recount(txn: Transaction) -> int:
        for slot in _all(txn, UploadFile):
            upload = None if slot.tenant_id else txn.get(PendingUpload, slot.upload_id)
            if upload is not None:
                txn.replace(msgspec.structs.replace(slot, tenant_id=upload.tenant_id))
        counted = _counted(txn)
        recorded = {usage.tenant_id: usage for usage in _all(txn, Usage)}
        wrong = 0
        for tenant_id in counted.keys() | recorded.keys():
            right, found = counted.get(tenant_id), recorded.get(tenant_id)
            if right == found:
                continue
            wrong += 1
            if right is None and found is not None:
                txn.delete(found)
            elif right is not None:
                (txn.replace if found else txn.insert)(right)
        return wrong

    return catalog.write(recount, actor="recount")


def miscounted_usage(snapshot: Snapshot) -> list[tuple[Usage, Usage]]:
    """(recorded, counted) of every tenant whose usage is wrong in this snapshot."""
    counted = _counted(snapshot)
    recorded = {usage.tenant_id: usage for usage in _all(snapshot, Usage)}
    return [
        (
            recorded.get(tenant_id, Usage(tenant_id, 0, 0)),
            counted.get(tenant_id, Usage(tenant_id, 0, 0)),
        )
        for tenant_id in sorted(counted.keys() | recorded.keys())
        if recorded.get(tenant_id) != counted.get(tenant_id)
    ]


def _counted(snapshot: Snapshot) -> dict[str, Usage]:
    """The usage of every tenant that stores anything, added up from all records."""
    totals: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for kind in RECORDS:
        counts = kind.schema.counts
        if counts is None:
            continue
        for record in _all(snapshot, kind):
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


def _all(snapshot: Snapshot, kind: type[R]) -> Iterator[R]:
    after: Key = ()
    while page := snapshot.range(kind, "", after=after, limit=_PAGE):
        yield from page
        after = page[-1].primary_key()
