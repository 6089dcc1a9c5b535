"""A runner in a process of its own, that may be killed: `python -m tests.workflows.victim`.

    victim ROOT LEDGER [PLACE NUMBER]   dies of SIGKILL when it comes to PLACE that often

Its tool `t.note` writes each call into the file LEDGER, which outlives it, `t.ask` waits for an
event, and `t.hold` writes there by which key it would do something, and works until there is a
file LEDGER.go. Counting by a file that the runner does not read is what proves anything.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cas.config import Settings, Size, StoreSettings
from cas.keys import load_keys
from cas.store import Store
from workflows.engine.runner import Runner
from workflows.tools import Calling, Registry, Waiting, built_in
from workflows.views import Workflows


def registry(ledger: Path) -> Registry:
    tools = built_in()

    def write(line: str) -> None:
        fd = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(fd, f"{line}\n".encode())
        finally:
            os.close(fd)

    def note(calling: Calling, what: Any) -> Any:
        write(f"{calling.run} {calling.step_name}")
        return what

    def hold(calling: Calling, what: Any) -> Any:
        write(f"{calling.run} {calling.key('hold').name}")
        while not ledger.with_suffix(".go").exists():
            time.sleep(0.01)
        return what

    def ask(calling: Calling, name: str) -> Waiting:
        return Waiting("t.ask", name, None, None, {"name": name})

    tools.add("t.note", note)
    tools.add("t.ask", ask)
    tools.add("t.hold", hold)
    return tools


def dies_at(place: str, number: int) -> Callable[[str], None]:
    counting = threading.Lock()
    left = [number]

    def at(here: str) -> None:
        if here == place:
            with counting:
                left[0] -= 1
                if left[0] <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)

    return at


def main(root: str, ledger: str, place: str = "", number: str = "0") -> None:
    settings = Settings(store=StoreSettings(root=Path(root), min_free=Size(0)))
    with Store.open(Path(root), settings) as store:
        workflows = Workflows(store, load_keys(settings))
        runner = Runner(
            store,
            workflows,
            registry=registry(Path(ledger)),
            say=lambda told: print(told, flush=True),  # noqa: T201
            at=dies_at(place, int(number)),
        )
        signal.signal(signal.SIGTERM, lambda *_: runner.stop())
        runner.run()
        workflows.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
