"""What gunicorn tells of requests, and of what is none: counted, and logged."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Final, final

from gateway.board import Meter
from gateway.logs import Answered, RequestLog

# One line an address in this time: who sends only nonsense must not fill the log with it.
QUIET_S: Final = 60.0
ADDRESSES_MAX: Final = 1024

_refusals = logging.getLogger("blobcask.requests")


@final
class Observer:
    """gunicorn's two calls around each request: counts it, and has it logged."""

    def __init__(self, meter: Meter, log: RequestLog) -> None:
        self._meter = meter
        self._log = log
        self._refusals = Refusals()

    def before(self, request: Any) -> None:
        request.began_s = time.monotonic()
        self._meter.began()

    def after(self, request: Any, environ: dict[str, Any], resp: Any) -> None:
        answered = Answered(environ, resp, time.monotonic() - request.began_s)
        self._meter.ended(answered)
        self._log.write(answered)

    def refused(self, address: str, code: str, status: int) -> None:
        """What came from there was no request."""
        self._meter.refused(status)
        self._refusals.note(address, code)


@final
class Refusals:
    """Logs what never reached the app, one line a minute for each address. Safe for threads."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        # (when the last line was written, how many came since), the oldest line first
        self._noted: dict[str, tuple[float, int]] = {}

    def note(self, address: str, code: str) -> None:
        """One more; the line tells how many came since the last line, this one included."""
        now_s = self._monotonic()
        with self._lock:
            at_s, count = self._noted.get(address, (-QUIET_S, 0))
            if now_s - at_s < QUIET_S:
                self._noted[address] = (at_s, count + 1)
                return
            self._noted.pop(address, None)  # so that it becomes the last
            if len(self._noted) >= ADDRESSES_MAX:
                del self._noted[next(iter(self._noted))]
            self._noted[address] = (now_s, 0)
        facts = {"address": address, "code": code, "count": count + 1}
        _refusals.warning("no request", extra={"facts": facts})
