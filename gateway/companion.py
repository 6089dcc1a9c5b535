"""A process that runs beside the server and ends with it: `blobcask replicate run`.

gunicorn's arbiter, which starts and reaps the workers, looks after this one as well: at each
turn of its main loop, once a second or when a child ended. So there is no thread, which a
process that forks must not have, and no further process to look after. The arbiter reaps
every child by waitpid(-1), so a pidfd tells whether this one still lives.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Final, final

RESTART_S: Final = 1.0  # after its end; doubled each time it ends soon again
RESTART_S_MAX: Final = 60.0
SOON_S: Final = 60.0
STOP_S: Final = 15.0  # to end its step; it may be killed anywhere, so this is courtesy

_log = logging.getLogger("blobcask")


@final
class Companion:
    """Runs `python -m cas` with some words, again when it ends. For one thread."""

    def __init__(self, words: Sequence[str]) -> None:
        """The words get `--with-parent` and this process's PID, so that it ends with us."""
        self._words = words
        self._pidfd: int | None = None
        self._pid = 0
        self._started_s = 0.0
        self._due_s = 0.0
        self._wait_s = RESTART_S
        self._wanted = True

    def tend(self) -> None:
        """Start it when it is time to; note its end. Never waits."""
        if self._pidfd is not None and self._ended(self._pidfd, 0):
            self._note_end(self._pidfd)
        if self._wanted and self._pidfd is None and time.monotonic() >= self._due_s:
            self._start()

    def restart(self) -> None:
        """Have it end, to be started again at once: it must open the store anew."""
        self._signal(signal.SIGTERM)
        self._wait_s = 0.0

    def ask_to_end(self) -> None:
        """Tell it to end, and start it no more."""
        self._wanted = False
        self._signal(signal.SIGTERM)

    def end(self) -> None:
        """Wait until it has ended, STOP_S at most; then kill it."""
        if self._pidfd is not None and not self._ended(self._pidfd, STOP_S):
            _log.warning("the replicator (PID %d) did not end and is killed", self._pid)
            self._signal(signal.SIGKILL)

    def _start(self) -> None:
        self._started_s = time.monotonic()
        command = [sys.executable, "-m", "cas", *self._words, "--with-parent", str(os.getpid())]
        try:
            # All descriptors but stderr stay here: it must not hold the listening sockets.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, close_fds=True
            )
        except OSError as error:
            # No memory or no process left: no reason to end the server.
            _log.warning("the replicator does not start: %s", error)
            self._due_s = time.monotonic() + RESTART_S_MAX
            return
        self._pid = process.pid
        # Nobody has reaped it yet: that happens in this thread only.
        self._pidfd = os.pidfd_open(process.pid)
        process.returncode = 0  # the arbiter reaps it: nothing for this object to wait for

    def _note_end(self, pidfd: int) -> None:
        os.close(pidfd)
        self._pidfd = None
        lived_s = time.monotonic() - self._started_s
        if lived_s >= SOON_S:
            self._wait_s = min(self._wait_s, RESTART_S)
        if self._wanted:
            _log.warning(
                "the replicator (PID %d) ended; another one starts in %g s", self._pid, self._wait_s
            )
        self._due_s = time.monotonic() + self._wait_s
        self._wait_s = min(max(self._wait_s * 2, RESTART_S), RESTART_S_MAX)

    def _signal(self, number: signal.Signals) -> None:
        if self._pidfd is not None:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                pass  # it has ended, and will be noted

    @staticmethod
    def _ended(pidfd: int, wait_s: float) -> bool:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(wait_s * 1000))
