"""The audit of reference counts: do the blobs' counts equal the references there are?

One pass over all records adds up, for each of 65,536 groups of digests, the digests that
records name, and takes away each blob's digest as often as its count says: a group whose
sum is not zero holds a wrong count. Only such groups are then counted one by one, so the
memory is that of 65,536 numbers however much is stored, and of what is wrong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import final

import msgspec

from cas.catalog.snapshot import LmdbSnapshot
from cas.digest import Digest
from cas.records import Blob

_GROUP_BYTES = 2  # the first bytes of the digest


@final
class Miscount(msgspec.Struct, frozen=True):
    """A blob whose recorded count is not the number of references to it.

    `recorded` is None where records name a digest that has no blob record (invariant 3).
    """

    digest: Digest
    recorded: int | None
    counted: int


def miscounts(snapshot: LmdbSnapshot) -> list[Miscount]:
    """Every wrong count in a snapshot, in the order of digests."""
    sums = [0] * (1 << (8 * _GROUP_BYTES))
    for digest, count, _ in _counts(snapshot):
        sums[_group(digest)] += count * int.from_bytes(digest)
    wrong = {group for group, total in enumerate(sums) if total}
    if not wrong:
        return []
    recorded: dict[Digest, int] = {}
    counted: defaultdict[Digest, int] = defaultdict(int)
    for digest, count, is_blob in _counts(snapshot):
        if _group(digest) in wrong:
            if is_blob:
                recorded[digest] = -count
            else:
                counted[digest] += count
    return [
        Miscount(digest, recorded.get(digest), counted.get(digest, 0))
        for digest in sorted(recorded.keys() | counted.keys())
        if recorded.get(digest) != counted.get(digest, 0)
    ]


def _counts(snapshot: LmdbSnapshot) -> Iterator[tuple[Digest, int, bool]]:
    """(digest, -refcount, True) of each blob, (digest, 1, False) of each reference."""
    for layout, _, raw in snapshot.records():
        if layout.kind is Blob:
            blob = layout.decode(raw)
            assert isinstance(blob, Blob)
            yield blob.digest, -blob.refcount, True
        elif layout.digests is not None:
            for digest in layout.digests(layout.decode(raw)):
                if digest is not None:
                    yield digest, 1, False


def _group(digest: Digest) -> int:
    return int.from_bytes(digest[:_GROUP_BYTES])
