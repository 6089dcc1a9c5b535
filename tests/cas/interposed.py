"""Ways to let something happen exactly between two steps, without threads or sleeps.

An interposed action runs in the thread of the one that is interrupted, wholly, before the
step goes on: the interleaving is forced, and the same at every run.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast, final

from cas.catalog import Catalog, Snapshot, Transaction
from cas.store import Store
from tests.cas.disks import SteppedDisk

T = TypeVar("T")
Action = Callable[[], object]


@final
class InterposedCatalog:
    """A catalog that runs waiting actions, one before each read or write; else the real one."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self.before_write: deque[Action] = deque()
        self.before_read: deque[Action] = deque()

    def read(self) -> AbstractContextManager[Snapshot]:
        if self.before_read:
            self.before_read.popleft()()
        return self._catalog.read()

    def write(
        self, change: Callable[[Transaction], T], *, actor: str = "", request_id: str = ""
    ) -> T:
        if self.before_write:
            self.before_write.popleft()()
        return self._catalog.write(change, actor=actor, request_id=request_id)

    def alone(self, act: Callable[[Snapshot], T]) -> T:
        if self.before_write:
            self.before_write.popleft()()
        return self._catalog.alone(act)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._catalog, name)


def interposed(owner: object) -> InterposedCatalog:
    """Put an interposed catalog into `owner`, and return it."""
    between = InterposedCatalog(owner._catalog)  # type: ignore[attr-defined]
    owner._catalog = cast(Catalog, between)  # type: ignore[attr-defined]
    return between


def interpose(owner: object) -> deque[Action]:
    """Put an interposed catalog into `owner`; returns what happens before its writes."""
    return interposed(owner).before_write


class InterposedDisk(SteppedDisk):
    """A disk that runs actions before its steps, each once; what one raises fails the step."""

    def __init__(self) -> None:
        self.before: defaultdict[str, deque[Action]] = defaultdict(deque)

    def _step(self, name: str) -> None:
        waiting = self.before[name]
        if waiting:
            waiting.popleft()()


def collect(store: Store) -> int:
    """Collect all that is due; returns how many blobs went."""
    with store.catalog.read() as snapshot:
        plan = store.collector.plan(snapshot, store.now_us(snapshot))
    return store.collector.execute(plan).blobs
