"""The background process's log: lines on stderr in the form that `[log] format` wants.

The same lines as the gateway's, so that both can share one stderr and one reader. A reader
that stands still is not waited for: lines that it does not take are dropped.
"""

from __future__ import annotations

import logging
import os
import select
from contextlib import suppress
from typing import Literal, final

from cas.config import LogSettings
from cas.log_forms import form_of, line_of


@final
class Lines(logging.Handler):
    """Writes each record to a descriptor, where that takes it at once."""

    def __init__(self, form: Literal["json", "text"], fd: int = 2) -> None:
        super().__init__()
        self._form = form_of(form)
        self._fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        """Never raises: who logs has something else to do than to log."""
        with suppress(Exception):  # nobody reads any more, or a message that is none
            line = line_of(self._form, record)
            if select.select((), (self._fd,), (), 0)[1]:
                os.write(self._fd, line)


def install(settings: LogSettings) -> None:
    """Send all that this process logs to stderr."""
    root = logging.getLogger()
    root.handlers[:] = [Lines(settings.format)]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
