"""One rebuild in a process of its own: `python -m bench.rebuilding ROOT` prints what it took.

On stdout: {"seconds": …, "grown_bytes": …}, the memory being the most that was ever held
beyond what the process held before.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

from bench.measure import Memory
from cas.store import Store

_SAMPLE_S = 0.02


def main() -> None:
    root = Path(sys.argv[1])
    ended = threading.Event()
    before = most = Memory.of().own_bytes

    def watch() -> None:
        nonlocal most
        while not ended.wait(_SAMPLE_S):
            most = max(most, Memory.of().own_bytes)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    store = Store.open(root)
    seconds = time.perf_counter() - began
    ended.set()
    watcher.join()
    store.catalog.verify_state()
    store.close()
    json.dump({"seconds": seconds, "grown_bytes": most - before}, sys.stdout)


if __name__ == "__main__":
    main()
