"""Values: what the steps of a run came to and show, kept beside them.

The steps of a run are many, and a change of one of them must cost no more for what it came to,
since nobody else writes meanwhile: values are read by who needs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeVar

from cas.catalog import Snapshot, Transaction
from cas.records import Step, StepValue
from cas.totals import values_of

# Of all results of a run together, and what else is kept beside its steps. What is larger
# belongs into files: these are in the index and in the journal, and are read as a whole.
VALUES_BYTES_MAX: Final = 64 << 20
_PAGE: Final = 100  # values read at once

V = TypeVar("V", Step, StepValue)


class Full(Exception):
    """A value of a step has no room beside the others of its run."""

    def __init__(self, step_id: str, reason: str) -> None:
        super().__init__(step_id, reason)
        self.step_id = step_id
        self.reason = reason


def value(snapshot: Snapshot, run_id: str, kind: str, step_id: str, iteration: str) -> bytes | None:
    found = snapshot.get(StepValue, run_id, kind, step_id, iteration)
    return None if found is None else found.value


def put(txn: Transaction, value: StepValue) -> None:
    """Keep a value in the place of the one before. Raises Full where they become too large
    together."""
    found = txn.get(StepValue, *value.primary_key())
    before_bytes = 0 if found is None else found.size_bytes
    size_bytes = values_of(txn, value.run_id) - before_bytes + value.size_bytes
    if size_bytes > VALUES_BYTES_MAX:
        raise Full(
            value.step_id,
            f"with {value.size_bytes} bytes more the results of this run would have {size_bytes} "
            f"of {VALUES_BYTES_MAX}; store them as files",
        )
    if found is None:
        txn.insert(value)
    else:
        txn.replace(value)


def drop(txn: Transaction, run_id: str, kind: str, step_id: str, iteration: str) -> None:
    found = txn.get(StepValue, run_id, kind, step_id, iteration)
    if found is not None:
        txn.delete(found)


def within(
    snapshot: Snapshot, kind: type[V], prefix: tuple[str, ...], iteration: str
) -> Iterator[V]:
    """Those whose iteration is one of the items of a loop that has `iteration`."""
    after, before = bounds(iteration)
    depth = iteration.count(".") + 1 if iteration else 0
    while page := snapshot.range(kind, "", prefix, after=after, before=before, limit=_PAGE):
        for found in page:
            if found.iteration.count(".") == depth:
                yield found
        after = (page[-1].iteration,)


def bounds(iteration: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """After and before which, exclusively, the iterations inside of `iteration` are."""
    # "1.0" to "1.99" come before "1/": of all iterations only these are read.
    return ((f"{iteration}.",), (f"{iteration}/",)) if iteration else (("",), ())
