"""The background process's log: lines on stderr in the form that `[log] format` wants.

The same fields as the gateway's, so that both can share one stderr and one reader. A reader
that stands still is not waited for: lines that it does not take are dropped.
"""

from __future__ import annotations

import json
import logging
import os
import select
import traceback
from datetime import UTC, datetime
from typing import Any, Final, final

from cas.config import LogSettings

LINE_BYTES_MAX: Final = select.PIPE_BUF  # the longest write that no other process's line splits
_MESSAGE_CHARS_MAX: Final = 300
_TRACE_CHARS_MAX: Final = 300  # its end says what happened; a character may be six in JSON


@final
class Lines(logging.Handler):
    """Writes each record to a descriptor, where that takes it at once."""

    def __init__(self, form: str, fd: int = 2) -> None:
        """`form` is "json" or "text"."""
        super().__init__()
        self._form = form
        self._fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self._line(record).encode()[: LINE_BYTES_MAX - 1] + b"\n"
            if select.select((), (self._fd,), (), 0)[1]:
                os.write(self._fd, line)
        except OSError:
            pass  # nobody reads any more

    def _line(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        message = record.getMessage()[:_MESSAGE_CHARS_MAX]
        facts: dict[str, Any] = {
            "at": at,
            "level": record.levelname.lower(),
            "pid": record.process,
            "event": "message",
            "logger": record.name,
            "message": message,
        }
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            facts["error"] = type(error).__name__
            facts["trace"] = "".join(traceback.format_exception(error))[-_TRACE_CHARS_MAX:]
        if self._form == "json":
            return json.dumps(facts)
        told = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        line = f"{at} {record.levelname:7} [{record.process}] {told}"
        return line + "".join(f"\n    {part}" for part in facts.get("trace", "").splitlines())


def install(settings: LogSettings) -> None:
    """Send all that this process logs to stderr."""
    root = logging.getLogger()
    root.handlers[:] = [Lines(settings.format)]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
