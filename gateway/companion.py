"""A process that runs beside the server and ends with it: `blobcask replicate run`, or
`blobcask workflow serve`.

gunicorn's arbiter, which starts and reaps the workers, looks after these as well: at each
turn of its main loop, once a second or when a child ended. So there is no thread, which a
process that forks must not have, and no further process to look after. The arbiter reaps
every child by waitpid(-1), so a pidfd tells whether one still lives.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Final, final

RESTART_S: Final = 1.0  # after its end; doubled each time it ends soon again
RESTART_S_MAX: Final = 60.0
SOON_S: Final = 60.0
# From being asked on, to end its step; it may be killed anywhere, so this is courtesy.
STOP_S: Final = 15.0

_log = logging.getLogger("blobcask")


@final
class Companion:
    """Runs `python -m cas` with some words, again when it ends. For one thread."""

    def __init__(self, name: str, words: Sequence[str]) -> None:
        """`name` is what the log calls it. The words get `--with-parent` and this process's
        PID, so that it ends with us."""
        self.name = name
        self._words = words
        self._told: dict[str, str] = {}
        self._pidfd: int | None = None
        self._pid = 0
        self._started_s = 0.0
        self._due_s = 0.0
        self._wait_s = RESTART_S
        self._wanted = True
        self._asked_s = 0.0

    def tell(self, settings: Mapping[str, str]) -> None:
        """Names and values of its environment, from its next start on, besides ours."""
        self._told.update(settings)

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
        self._asked_s = time.monotonic()
        self._signal(signal.SIGTERM)

    def end(self) -> None:
        """Wait until it has ended, until STOP_S after it was asked to; then kill it."""
        left_s = max(0.0, self._asked_s + STOP_S - time.monotonic())
        if self._pidfd is not None and not self._ended(self._pidfd, left_s):
            _log.warning("the %s (PID %d) did not end and is killed", self.name, self._pid)
            self._signal(signal.SIGKILL)

    def _start(self) -> None:
        self._started_s = time.monotonic()
        command = [sys.executable, "-m", "cas", *self._words, "--with-parent", str(os.getpid())]
        try:
            # All descriptors but stderr stay here: it must not hold the listening sockets.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                close_fds=True,
                env={**os.environ, **self._told},
            )
        except OSError as error:
            # No memory or no process left: no reason to end the server.
            _log.warning("the %s does not start: %s", self.name, error)
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
                "the %s (PID %d) ended; another one starts in %g s",
                *(self.name, self._pid, self._wait_s),
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
