"""Child processes that may be killed, and what they acknowledged before.

A child says what was acknowledged to it over a pipe, and the parent keeps the list: a
killed process remembers nothing. Children are forked, so that the hundreds of them cost
milliseconds each; the test must have no catalog open when it forks one.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import traceback
from collections.abc import Callable
from typing import final

_parents_ends: set[int] = set()


@final
class Report:
    """The child's side: tells the parent, and waits for its word."""

    def __init__(self, told: int, asked: int) -> None:
        self._told = told
        self._asked = asked

    def acknowledge(self, label: str) -> None:
        """Tell the parent, who counts on it from now on, that `label` is durable."""
        # One write of under 4 KiB into a pipe is whole or not there.
        os.write(self._told, f"{label}\n".encode())

    def wait_for_word(self) -> None:
        """Wait until the parent says `go` or is gone."""
        os.read(self._asked, 1)


@final
class Victim:
    """A forked child that runs `body(report)`; it may die of SIGKILL on the way."""

    def __init__(self, body: Callable[[Report], None]) -> None:
        told_read, told_write = os.pipe()
        asked_read, asked_write = os.pipe()
        self.acknowledged: list[str] = []
        self._rest = b""
        self.pid = os.fork()
        if self.pid == 0:
            for end in (*_parents_ends, told_read, asked_write):
                os.close(end)
            _live_and_die(body, Report(told_write, asked_read))
        os.close(told_write)
        os.close(asked_read)
        self._told, self._asked = told_read, asked_write
        _parents_ends.update((told_read, asked_write))

    def hear(self) -> str | None:
        """The next label; None when the child has ended."""
        while b"\n" not in self._rest:
            more = os.read(self._told, 65536)
            if not more:
                return None
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        self.acknowledged.append(line.decode())
        return self.acknowledged[-1]

    def go(self) -> None:
        """The word that `Report.wait_for_word` waits for."""
        os.write(self._asked, b"g")

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def end(self) -> bool:
        """Wait for the end; True when it was killed. Raises what the child raised."""
        while self.hear() is not None:
            pass
        _, status = os.waitpid(self.pid, 0)
        for end in (self._told, self._asked):
            _parents_ends.discard(end)
            os.close(end)
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGKILL:
            return True
        if code != 0:
            raise AssertionError(f"the child ended with {code}")
        return False


def _live_and_die(body: Callable[[Report], None], report: Report) -> None:
    # A child that dies is what the test is about, and not worth a dump of its stack.
    faulthandler.disable()
    try:
        body(report)
    except BaseException:  # noqa: BLE001
        # The only way a forked child can tell: its parent's pytest must not see it raised.
        os.write(2, traceback.format_exc().encode())
        os._exit(1)
    os._exit(0)
