"""How the runner of workflows is, for whoever shares ROOT with it.

ROOT/RUNNER           a lock (`cas.alone`): held while it runs
ROOT/RUNNER.all       a lock: held by one that is for all runs, while it waits for RUNNER, too
ROOT/runner.status    JSON, replaced every few seconds: when, and how far it is

Who carries out some runs alone, from a command line, holds RUNNER only, and makes way as soon as
RUNNER.all is held.
"""

from __future__ import annotations

from typing import Final, final

import msgspec

from cas.alone import is_held
from cas.background import FAILURES_MAX
from cas.beats import SILENT_US_MAX, last_beat
from cas.clock import SECOND_US
from cas.store import Store
from cas.totals import open_runs

PLACE: Final = "RUNNER"
FOR_ALL: Final = "RUNNER.all"
STATUS: Final = "runner.status"


@final
class RunnerBeat(msgspec.Struct, frozen=True):
    """The content of the status file; times are µs since 1970 UTC."""

    pid: int
    started_at: int
    at: int
    runs: int = 0  # that it has taken up, and that have not ended as far as it knows
    steps: int = 0  # at work
    # How long the one that began first has been at work, by a clock that nobody sets.
    oldest_step_us: int = 0
    failures: int = 0  # of its looks at what there is to do, in a row
    waits: bool = False  # for somebody to accept a restored store: nothing runs before
    late: int = 0  # calls of tools that go on past their time
    only: int | None = None  # of one that is for some runs: how many of these have not ended
    barred: dict[str, str] = {}  # the tools that it may not call, each with the reason


@final
class RunnerState(msgspec.Struct, frozen=True):
    """The runner at one moment, and what there is for it to do."""

    held: bool  # a process has the place
    silent_us: int | None  # since its last sign of life; None: there was none
    beat: RunnerBeat | None  # the last one, perhaps of a process that has ended
    open: dict[str, int]  # by status, how many runs have not ended

    @property
    def work(self) -> bool:
        """Whether any run is open."""
        return any(self.open.values())

    @property
    def for_all(self) -> RunnerBeat | None:
        """What the runner of all runs has told; None where none is there that has."""
        return self.beat if self.held and self.beat is not None and self.beat.only is None else None

    def trouble(self) -> list[str]:
        """Why workflows stand still, in words for anybody. Where no run is open, none is missed:
        a store may be served without them."""
        if not self.held:
            return ["no runner runs: workflows wait"] if self.work else []
        if self.beat is None or self.silent_us is None:
            return []  # it starts
        if self.silent_us > SILENT_US_MAX:
            return [f"the runner is silent for {self.silent_us // SECOND_US} s"]
        if self.beat.waits and self.work:
            return ["workflows wait until the restored store is accepted"]
        if self.beat.failures >= FAILURES_MAX:
            return [f"the runner failed {self.beat.failures} times in a row to look for work"]
        if self.beat.only is not None and sum(self.open.values()) > self.beat.only:
            # As old as the beat: too many rather than too few, and then nobody is alarmed.
            return ["only runs that a command line carries out go on: other workflows wait"]
        return []


def runner_of(store: Store) -> RunnerState:
    """Look at the process that runs the workflows of `store`, if any does; takes nothing,
    holds nobody up, and costs the same however many runs there are."""
    with store.catalog.read() as snapshot:
        runs = open_runs(snapshot)
    # Before the beat: the first thing that a holder does is to beat.
    held = is_held(store.root / PLACE)
    beat = last_beat(store.root / STATUS, RunnerBeat)
    silent_us = None if beat is None else max(0, store.clock.now_us() - beat.at)
    return RunnerState(held, silent_us, beat, runs)
