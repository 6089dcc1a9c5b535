"""Complaints: what the log tells an operator of something that is wrong, and stays so.

Each is a line once a minute at most (`cas.repeats`), however often it is noticed.
"""

from __future__ import annotations

import logging
from typing import final

from cas.repeats import Repeats

log = logging.getLogger("blobcask.workflows")


@final
class Complaints:
    """The complaints of one process. Safe for threads."""

    def __init__(self, repeats: Repeats | None = None) -> None:
        self._repeats = repeats or Repeats()

    def make(self, text: str, *facts: str) -> None:
        """Tell it as an error, with its facts in it, unless it was told in the last minute."""
        complaint = text % facts
        if self._repeats.note(complaint):
            log.error("%s", complaint)
