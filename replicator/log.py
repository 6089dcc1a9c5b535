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
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final, final

from cas.config import LogSettings

LINE_BYTES_MAX: Final = select.PIPE_BUF  # the longest write that no other process's line splits
_CHARS_MAX: Final = 300  # of the message, and of the trace, whose end says what happened


@final
class Lines(logging.Handler):
    """Writes each record to a descriptor, where that takes it at once."""

    def __init__(self, form: str, fd: int = 2) -> None:
        """`form` is "json" or "text"."""
        super().__init__()
        self._form = form
        self._fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        """Never raises: who logs has something else to do than to log."""
        with suppress(Exception):  # nobody reads any more, or a message that is none
            line = self._fitting(record)
            if select.select((), (self._fd,), (), 0)[1]:
                os.write(self._fd, line)

    def _fitting(self, record: logging.LogRecord) -> bytes:
        """The line, with as much of message and trace as fits: a character may be 12 bytes."""
        chars = _CHARS_MAX
        while True:
            line = self._line(record, chars).encode(errors="backslashreplace") + b"\n"
            if len(line) <= LINE_BYTES_MAX:
                return line
            chars //= 2

    def _line(self, record: logging.LogRecord, chars: int) -> str:
        at = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        message = _message(record)[:chars]
        facts: dict[str, Any] = {
            "at": at,
            "level": record.levelname.lower(),
            "pid": record.process,
            "event": "message",
            "logger": record.name[:chars],
            "message": message,
        }
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            facts["error"] = type(error).__name__[:chars]
            facts["trace"] = _trace(error, chars)
        if self._form == "json":
            return json.dumps(facts)
        told = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        line = f"{at} {record.levelname:7} [{record.process}] {told}"
        return line + "".join(f"\n    {part}" for part in facts.get("trace", "").splitlines())


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as error:  # noqa: BLE001  a bug of who logged; better half of it than none
        return f"{record.msg!r} does not fit its arguments: {type(error).__name__}"


def _trace(error: BaseException, chars: int) -> str:
    trace = "".join(traceback.format_exception(error))
    return trace[max(0, len(trace) - chars) :]


def install(settings: LogSettings) -> None:
    """Send all that this process logs to stderr."""
    root = logging.getLogger()
    root.handlers[:] = [Lines(settings.format)]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
