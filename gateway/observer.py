"""What gunicorn tells of requests, and of what is none: counted, and logged."""

from __future__ import annotations

import logging
import time
from typing import Any, final

from cas.repeats import Repeats
from gateway.board import Meter
from gateway.logs import Answered, RequestLog

_refusals = logging.getLogger("blobcask.requests")


@final
class Observer:
    """gunicorn's two calls around each request: counts it, and has it logged."""

    def __init__(self, meter: Meter, log: RequestLog) -> None:
        self._meter = meter
        self._log = log
        self._refusals = Repeats()  # by address

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
        # Who sends only nonsense must not fill the log with it: a line a minute for an address,
        # with how many came since its last one.
        if count := self._refusals.note(address):
            facts = {"address": address, "code": code, "count": count}
            _refusals.warning("no request", extra={"facts": facts})
