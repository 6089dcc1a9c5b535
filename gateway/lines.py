"""Lines of the log on their way out, for which nobody waits.

A request never waits for whoever reads the log: lines go through a bounded queue and a
thread of their own, and those that find it full are counted and dropped. A line is at most
LINE_BYTES_MAX long, so that lines of several processes never mix in one pipe.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import threading
import time
from typing import Final, final

from cas.log_forms import LINE_BYTES_MAX, TextForm, line_of

LINES_WAITING_MAX: Final = 10_000
CLOSE_S: Final = 2.0  # what a stopping process waits for its last lines to be taken


@final
class Lines(logging.Handler):
    """Takes records to a descriptor without ever making their thread wait.

    Until `start` it writes at once, where the descriptor takes it: for the arbiter, which
    must have no threads when it forks.
    """

    def __init__(self, fd: int = 2) -> None:
        super().__init__()
        self._fd = fd
        self._waiting: queue.Queue[bytes | None] = queue.Queue(LINES_WAITING_MAX)
        self._thread: threading.Thread | None = None
        self.dropped = 0  # lines that nobody will read

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = line_of(self.formatter or TextForm(), record)
            if self._thread is not None:
                self._waiting.put_nowait(line)
            elif self._takes_more():
                os.write(self._fd, line)
            else:
                self.dropped += 1
        except (OSError, queue.Full):
            self.dropped += 1
        except Exception:  # noqa: BLE001  no log line is worth a request
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        self.dropped += 1

    def start(self) -> None:
        """Write from a thread of its own from now on. To be called after the fork."""
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Let what waits be written, for as long as CLOSE_S; later lines are written at once."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        deadline = time.monotonic() + CLOSE_S
        try:
            self._waiting.put(None, timeout=CLOSE_S)
        except queue.Full:
            return
        thread.join(max(0.0, deadline - time.monotonic()))

    def _takes_more(self) -> bool:
        return bool(select.select((), (self._fd,), (), 0)[1])

    def _write_all(self) -> None:
        held: bytes | None = b""
        while held is not None:
            data, held = self._gathered(held or self._waiting.get())
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
            except OSError:
                self.dropped += data.count(b"\n")

    def _gathered(self, first: bytes | None) -> tuple[bytes, bytes | None]:
        """Lines for one write, which is never split, and the line that comes after them."""
        data = b""
        following = first
        while following is not None and len(data) + len(following) <= LINE_BYTES_MAX:
            data += following
            try:
                following = self._waiting.get_nowait()
            except queue.Empty:
                return data, b""
        return data, following
