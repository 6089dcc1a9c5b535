"""Another process that shares ROOT: it emits and waits as it is told, one line at a time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

from tests.conftest import CHECKOUT

PATIENCE_S = 30.0


@final
class Neighbour:
    """A process with the store of `root` open. Killed at the end, if it is still there."""

    def __init__(self, root: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.workflows.neighbour", str(root)],
            cwd=CHECKOUT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def ask(self, verb: str, *words: Any) -> Any:
        """Have a method of `Events` called for tenant acme; the answer is what it returned."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([verb, *words]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.communicate()


def until(condition: Callable[[], bool]) -> None:
    """Look again and again until it is so, or fail."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never was so"
        time.sleep(0.002)


def main() -> None:
    import msgspec

    from cas.config import Settings, Size, StoreSettings
    from cas.store import Store
    from workflows.events import Events
    from workflows.watcher import Watcher

    def tell(answer: Any) -> None:
        sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
        sys.stdout.flush()

    settings = Settings(store=StoreSettings(min_free=Size(0)))
    with Store.open(Path(sys.argv[1]), settings) as store:
        watcher = Watcher(store.catalog)
        events = Events(store.catalog, watcher, settings.events, tenant_id="acme", actor="they")
        tell("ready")
        for line in sys.stdin:
            verb, *words = json.loads(line)
            answer = getattr(events, verb)(*words)
            if verb == "wait":
                answer = answer.payload
            elif verb == "claim":
                answer = answer is not None
            tell(answer)
        watcher.close()


if __name__ == "__main__":
    main()
