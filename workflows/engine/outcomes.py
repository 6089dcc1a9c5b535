"""Outcomes: what a step came to, and what is raised where its turn does not end it."""

from __future__ import annotations

import math
import sqlite3
from dataclasses import dataclass
from typing import Final, final

import msgspec

from cas.errors import CatalogClosed, CatalogError, CatalogFailed, StoreFull
from cas.records import CANCELLED, Step
from workflows.definitions import Retry

# Only opening the store anew heals these, so the process ends and is started again.
ENDING: Final = (CatalogFailed, CatalogClosed)
# What has nothing to do with the step that meets it, and passes.
TROUBLE: Final = (StoreFull, CatalogError, OSError, sqlite3.Error)

_RETRY_S_MAX: Final = 24 * 3600.0


class Raised(Exception):
    """What a tool raised, whatever that is."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class LoopOver(Exception):
    """The step is of no use any more: the loop that it is in has ended without it."""


class Sleeps(Exception):
    """The step goes on when it is rung for."""


class Misfit(Exception):
    """stabilize holds steps to have ended that have not: its file is of another time than the
    catalog, as after a restore."""


class Again(Exception):
    """The step begins again, later."""

    def __init__(self, after_s: float) -> None:
        super().__init__(after_s)
        self.after_s = after_s


@final
@dataclass(frozen=True, slots=True)
class Outcome:
    """What the work of a step came to, to be written."""

    result: msgspec.Raw | None = None  # JSON; None: it failed
    error: str = ""
    after_s: float | None = None  # another attempt follows, after so long


def check(step: Step) -> None:
    """Raises LoopOver for a step that was cancelled."""
    if step.status == CANCELLED:
        raise LoopOver


def told(error: BaseException) -> str:
    """What an error says, as it can be kept, whoever wrote its class."""
    try:
        said = str(error)
    except Exception:  # noqa: BLE001  that class has a mistake itself
        said = "it cannot be told"
    return said.encode(errors="replace").decode()


def delay_s(retry: Retry, failures: int) -> float:
    """How long after so many failures, and one more, the next attempt begins."""
    try:
        delay_s = retry.delay_s * retry.backoff_factor**failures
    except OverflowError:
        delay_s = math.inf if retry.delay_s > 0 else 0.0
    return min(delay_s, _RETRY_S_MAX) if delay_s > 0 else 0.0
