"""Whether a store can serve now: the questions that a load balancer asks every few seconds.

A disk that hangs must not hang whoever asks: what may wait for it runs in a thread of its
own, one at a time, and the answer is that of the last time, or that it does not come back.
"""

from __future__ import annotations

import threading
import time
from typing import Final, final

from cas.durable import Temporary
from cas.errors import IndexDamaged, StoreUnready
from cas.store import Store

EVERY_S: Final = 5.0  # how old an answer of the disk may be
PATIENCE_S: Final = 2.0  # what a question waits for a fresh one


@final
class Probe:
    """Asks one store whether it can commit. Safe for threads.

    Commits without growing the journal: an empty write goes the whole way of a write, through
    the committer, the writer lock and the head's mark of a failed sync, but has nothing to
    append; and a block of a file without a name is written and synced beside the journal's
    filesystem, so that a disk that takes no more bytes is found out.
    """

    def __init__(
        self, store: Store, *, every_s: float = EVERY_S, patience_s: float = PATIENCE_S
    ) -> None:
        self._store = store
        self._every_s = every_s
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._asked_at = 0.0  # of time.monotonic
        self._answered = threading.Event()
        self._trouble: Exception | None = None
        self._scratch: Temporary | None = None

    def check(self) -> None:
        """Return when the store can commit.

        Raises what a commit raises (CatalogFailed, IndexDamaged, StoreFull …), and
        StoreUnready for a disk that takes no bytes or does not come back.
        """
        now = time.monotonic()
        with self._lock:
            asking = not self._answered.is_set() and self._asked_at > 0
            if not asking and (self._asked_at == 0 or now - self._asked_at >= self._every_s):
                self._asked_at = now
                self._answered.clear()
                self._start()
            asked_at = self._asked_at
        if not self._answered.wait(self._patience_s):
            waited_s = time.monotonic() - asked_at
            raise StoreUnready(f"a commit has not come back for {waited_s:.0f} s")
        if self._trouble is not None:
            raise self._trouble.with_traceback(None)

    def _start(self) -> None:
        try:
            threading.Thread(target=self._ask, name="probe", daemon=True).start()
        except RuntimeError:  # no more threads now; asked again after `every_s`, as ever
            self._trouble = StoreUnready("no thread can be made to ask the disk")
            self._answered.set()

    def _ask(self) -> None:
        trouble: Exception | None = None
        try:
            self._commit()
        except OSError as error:
            trouble = StoreUnready(f"the disk takes no write: {error.strerror}")
        except Exception as error:  # noqa: BLE001  it is raised where it belongs
            trouble = error
        self._trouble = trouble
        self._answered.set()

    def _commit(self) -> None:
        self._store.catalog.write(lambda _txn: None, actor="probe")
        disk = self._store.disk
        if self._scratch is None:
            self._scratch = disk.temporary(self._store.root / "catalog")
        disk.write_at(self._scratch.fd, b"probe", 0)
        disk.sync_data(self._scratch.fd)
        if not (self._store.root / "catalog" / "index" / "BOOT").exists():
            raise IndexDamaged("it waits to be made anew")
