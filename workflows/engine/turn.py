"""Turn: one step that begins, or goes on, until it ends, sleeps, or has to be begun again.

    begin      a step that has ended before is done with: its result counts
    work       by its operator (`work`): for a task, the call of its tool
    wait       where the work says so: a wait in the catalog, and the step sleeps; the ring of
               the doorbell begins the step again, which does the same work and claims
    finish     the result, durable before anything that depends on it begins

What is done twice, because the process was killed in between, is done under the same key, so
it happens once (`cas.once`, invariant 14). Only the call of a tool that changes something
outside, and is killed before `finish`, is made twice: tools that can pass a key on do.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Final, final

from cas.clock import SECOND_US
from cas.errors import (
    BlobcaskError,
    InvalidInput,
    KeyReused,
    NotFound,
    RunEnded,
    SubscriptionTaken,
    TooLarge,
    ToolFailed,
)
from cas.events import subscription_id
from cas.records import RUNNING, Run, Step
from workflows.definitions import EARLY, TASK
from workflows.engine.attempts import LATE_MAX
from workflows.engine.kit import Kit
from workflows.engine.outcomes import (
    TROUBLE,
    Again,
    LoopOver,
    Misfit,
    Outcome,
    Raised,
    Sleeps,
    check,
    delay_s,
    told,
)
from workflows.engine.plan import Plan
from workflows.engine.spots import Spot, outside, waits_of
from workflows.engine.stages import begins_as
from workflows.engine.verdicts import OVER, Judge, Verdict, is_loop_over
from workflows.engine.work import Work
from workflows.run_log import RunLog

_CROWDED: Final = (
    "tenant %s begins no calls of tools that have a timeout: %s go on past theirs, and end with "
    "the runner at the latest"
)
# What another attempt would meet as well.
_HOPELESS: Final = (InvalidInput, KeyReused, NotFound, SubscriptionTaken, TooLarge)

_log = logging.getLogger(__name__)


@final
class Turn:
    """One step that begins, or goes on."""

    def __init__(self, kit: Kit, plan: Plan, run: Run, log: RunLog, spot: Spot) -> None:
        self._kit = kit
        self._plan = plan
        self._run = run
        self._log = log
        self._spot = spot
        self._failures = 0  # of the attempts before this one
        self._task = plan.tasks[spot.task]
        self._judge = Judge.at(plan, log, spot)
        self._work = Work(kit, plan, run, log, spot)

    def step(self) -> Step | None:
        return self._log.step(self._spot.task, self._spot.iteration)

    def open(self) -> None:
        """A parallel begins: what its branches wait for."""
        spot, step = self._spot, self.step()
        if step is None:
            if not self._may_begin():
                return
            step = self._begun()
        if step.status == RUNNING:
            self._log.wait(spot.task, spot.iteration)

    def take(self, step: Step | None) -> None:
        """Bring the step to its end; raises Sleeps, Again, LoopOver, RunEnded."""
        if step is None and not self._may_begin():
            return
        spot, kit = self._spot, self._kit
        self._rest(step)
        begun = self._begun()
        if begun.status in OVER:
            return
        self._failures = begun.failures
        kit.at("begun")
        outcome = kit.unwritten.get(spot) or self._outcome(begun)
        self._write(outcome)

    def drop(self) -> None:
        """End what the step has begun, for its loop is over."""
        spot, log = self._spot, self._log
        log.cancel_within([spot.task], outside(spot.iteration), waits_of)
        events = self._kit.events_of(self._run, log)
        for name in spot.waits:
            with suppress(NotFound):
                events.cancel(subscription_id(self._run.tenant_id, spot.run, name))

    def _begun(self) -> Step:
        """Record that it begins; raises LoopOver, also where that was over just before."""
        begun = self._log.begin(self._spot.task, self._spot.iteration)
        check(begun)
        if is_loop_over(self._plan, self._log, self._spot):
            raise LoopOver
        return begun

    def _rest(self, step: Step | None) -> None:
        """Raise Again where it is too early to begin (again)."""
        attempts, spot = self._kit.attempts, self._spot
        if spot in self._kit.unwritten:
            return  # nothing is called
        left_s = 0.0
        if step is not None and step.retry_at is not None and self._task.retry is not None:
            given_s = delay_s(self._task.retry, step.failures - 1)
            left_us = step.retry_at - self._kit.now_us()
            left_s = attempts.left_s(spot, given_s, left_us / SECOND_US)
        if left_s <= 0 and self._task.operator == TASK and self._task.timeout_s is not None:
            left_s = attempts.crowded_s(self._run.tenant_id)
            if left_s > 0:
                self._kit.complaints.make(_CROWDED, self._run.tenant_id, str(LATE_MAX))
        if left_s > 0:
            raise Again(left_s)
        attempts.over(spot)

    def _outcome(self, begun: Step) -> Outcome:
        """Do what is to be done. Raises Sleeps, Again, LoopOver, RunEnded, and what is TROUBLE."""
        try:
            return Outcome(self._work.result(begun))
        except Raised as raised:
            return self._failure(raised.error)
        except (Sleeps, Again, LoopOver, RunEnded, *TROUBLE):
            raise
        except Exception as error:  # noqa: BLE001  its templates, for instance
            return self._failure(error)

    def _write(self, outcome: Outcome) -> None:
        """Make it durable; raises Again where another attempt follows, LoopOver, RunEnded."""
        unwritten, spot = self._kit.unwritten, self._spot
        unwritten[spot] = outcome
        try:
            outcome = self._record(outcome)
        except (RunEnded, NotFound) as error:
            unwritten.pop(spot, None)
            if isinstance(error, NotFound):
                raise RunEnded("forgotten") from None
            raise
        unwritten.pop(spot, None)
        if outcome.after_s is not None:
            self._kit.attempts.failed(spot, outcome.after_s)
            raise Again(outcome.after_s)
        self._kit.attempts.over(spot)

    def _record(self, outcome: Outcome) -> Outcome:
        """Returns what was written: a result that there is no room for is a failure."""
        log, spot, kit = self._log, self._spot, self._kit
        if outcome.result is not None:
            kit.at("finishing")
            try:
                check(log.finish(spot.task, spot.iteration, outcome.result))
            except ToolFailed as error:
                outcome = self._failure(error)
            else:
                kit.at("finished")
                return outcome
        if outcome.after_s is not None:
            delay_us = round(outcome.after_s * SECOND_US)
            check(log.retry(spot.task, spot.iteration, outcome.error, delay_us))
        else:
            check(log.fail(spot.task, spot.iteration, outcome.error))
        return outcome

    def _may_begin(self) -> bool:
        """Whether it begins; what is left out is recorded. Raises Sleeps."""
        verdict = self._judge.verdict(self._task)
        if verdict is Verdict.BEGIN:
            return True
        if verdict is Verdict.NOT_YET:
            # Who is before it rings where it begins: of a parallel that is its FORK.
            if self._task.trigger_rule in EARLY and self._spot.role == begins_as(self._task):
                raise Sleeps
            raise Misfit
        blocked = verdict is Verdict.BLOCKED
        why = self._judge.why_blocked(self._task) if blocked else ""
        self._log.skip(self._spot.task, self._spot.iteration, why)
        return False

    def _failure(self, error: BaseException) -> Outcome:
        """Whatever the error is, this raises nothing: the tool would be called again for it."""
        spot, retry = self._spot, self._task.retry
        reason = told(error)
        if not isinstance(error, BlobcaskError):
            _log.warning("step %s of run %s failed", spot.step, spot.run, exc_info=error)
            reason = f"{type(error).__name__}: {reason}"
        hopeless = isinstance(error, _HOPELESS) or (
            isinstance(error, ToolFailed) and not error.again
        )
        if retry is None or hopeless or self._failures >= retry.max_retries:
            return Outcome(error=reason)
        return Outcome(error=reason, after_s=delay_s(retry, self._failures))
