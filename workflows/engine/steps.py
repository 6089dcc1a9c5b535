"""Steps: what a step does when its turn comes.

    begin      a step that has ended before is done with: its result counts
    call       the tool, with the templates of its arguments filled in
    wait       where the tool says so: a wait in the catalog, and the step sleeps; the ring of
               the doorbell begins the step again, which calls the tool again and claims
    finish     the result, durable before anything that depends on it begins

What is done twice, because the process was killed in between, is done under the same key, so
it happens once (`cas.once`, invariant 14). Only the call of a tool that changes something
outside, and is killed before `finish`, is made twice: tools that can pass a key on do.

Where stabilize is concerned a step always ends well: what a failure means for others is
judged by `verdicts`, from the catalog.

What a tool raises fails its step, or this attempt of it (`attempts`). What the runner's own part
meets with, such as a full disk, fails nobody: the step begins again.
"""

from __future__ import annotations

import logging
import math
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, final

import msgspec
from stabilize.models.stage import StageExecution
from stabilize.tasks.interface import RetryableTask
from stabilize.tasks.result import TaskResult

from cas.clock import SECOND_US
from cas.errors import (
    BlobcaskError,
    CatalogClosed,
    CatalogError,
    CatalogFailed,
    InvalidInput,
    InvalidWorkflow,
    KeyReused,
    NotFound,
    RunEnded,
    StoreFull,
    SubscriptionTaken,
    TooLarge,
    ToolFailed,
)
from cas.events import subscription_id
from cas.once import step_key
from cas.records import CANCELLED, COMPLETED, FAILED, RUNNING, SKIPPED, Run, Step
from cas.store import Store
from workflows import templates
from workflows.complaints import Complaints
from workflows.definitions import (
    CONDITION,
    EMIT_EVENT,
    FOREACH,
    JOIN,
    PARALLEL,
    TASK,
    WAIT,
    WAIT_FOR_EVENT,
    Definition,
    Retry,
    Task,
)
from workflows.embedded import EmbeddedPlace
from workflows.engine.attempts import LATE_MAX, Attempts
from workflows.engine.beating import AtWork
from workflows.engine.database import FILE, Database
from workflows.engine.plan import EARLY, Plan, branch_tasks
from workflows.engine.scope import Scope, items_of
from workflows.engine.spots import END, FORK, STEP, Execution, Spot, inside, outside
from workflows.engine.stages import stages_of
from workflows.engine.verdicts import Judge, Verdict
from workflows.notation import LEVELS_MAX, is_too_deep
from workflows.runs import ENDED, RunLog, RunView
from workflows.tools.calling import Calling, Waiting
from workflows.tools.registry import Registry
from workflows.views import Workflows

# Only opening the store anew heals these, so the process ends and is started again.
ENDING: Final = (CatalogFailed, CatalogClosed)
# What has nothing to do with the step that meets it, and passes.
TROUBLE: Final = (StoreFull, CatalogError, OSError, sqlite3.Error)
TIMER: Final = "!time"  # after a step's name: the wait for the end of its time

OVER: Final = (COMPLETED, FAILED, SKIPPED)
_EVER: Final = timedelta(days=36_500)
_TROUBLE_S: Final = 1.0  # before a step begins again that could not be written; doubled
_TROUBLE_S_MAX: Final = 60.0
_RETRY_S_MAX: Final = 24 * 3600.0
_WAIT_S_MAX: Final = 100 * 366 * 86400.0
_ROUNDED_US: Final = 1000  # how near to its moment a wait ends, at least
_ERRORS_SHOWN: Final = 3
_PLANS: Final = 256  # kept at hand
_CROWDED: Final = (
    "tenant %s begins no calls of tools that have a timeout: %s go on past theirs, and end with "
    "the runner at the latest"
)
# What another attempt would meet as well.
_HOPELESS: Final = (InvalidInput, KeyReused, NotFound, SubscriptionTaken, TooLarge)

_log = logging.getLogger(__name__)


class _Raised(Exception):
    """What a tool raised, whatever that is."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class _LoopOver(Exception):
    """The step is of no use any more: the loop that it is in has ended without it."""


class _Sleeps(Exception):
    """The step goes on when it is rung for."""


class _Again(Exception):
    """The step begins again, later."""

    def __init__(self, after_s: float) -> None:
        super().__init__(after_s)
        self.after_s = after_s


@final
@dataclass(frozen=True, slots=True)
class _Outcome:
    """What the work of a step came to, to be written."""

    result: msgspec.Raw | None = None  # JSON; None: it failed
    error: str = ""
    after_s: float | None = None  # another attempt follows, after so long


@final
class Steps(RetryableTask):
    """Does the steps of all runs; what stabilize calls. Safe for threads."""

    def __init__(
        self,
        store: Store,
        workflows: Workflows,
        registry: Registry,
        at: Callable[[str], None],
        on_end: Callable[[BaseException], None],
    ) -> None:
        """`at` is told of places where tests kill the process, `on_end` why it must end."""
        self._store = store
        self._workflows = workflows
        self._registry = registry
        self._settings = store.settings
        self._at = at
        self._on_end = on_end
        self._database: Database | None = None
        self._plans: dict[str, Plan] = {}
        # What could not be written yet: the tools are not called again for that.
        self._unwritten: dict[Spot, _Outcome] = {}
        self._attempts = Attempts()
        self._complaints = Complaints()
        # Of loops that sleep: the items that have not ended. A loop that is not here began in
        # another process, and counts them itself when it is rung.
        self._items_left: dict[Spot, set[int]] = {}
        self._counting = threading.Lock()
        self._asking: Counter[str] = Counter()  # of each run, the steps that would begin it anew
        self._renewing = threading.Lock()
        self.at_work = AtWork()

    def attach(self, database: Database) -> None:
        """Where loops begin their items; before anything else."""
        self._database = database

    @property
    def database(self) -> Database:
        assert self._database is not None
        return self._database

    def log_of(self, run: str) -> RunLog:
        return RunLog(
            self._store.catalog,
            run,
            self._settings.workflows.keep,
            self._settings.events.keep,
        )

    def plan_of(self, run: Run) -> Plan:
        """The plan of a run; its definition never changes."""
        plan = self._plans.get(run.run_id)
        if plan is None:
            plan = Plan(Definition.from_json(self.log_of(run.run_id).text().definition))
            while len(self._plans) >= _PLANS:
                self._plans.pop(next(iter(self._plans)), None)
            self._plans[run.run_id] = plan
        return plan

    def begin(self, run: Run) -> None:
        """Have a run begin, or go on: durable only as far as the catalog is."""
        plan = self.plan_of(run)
        self.database.begin(Execution(run.run_id), stages_of(plan, run, "", ""))

    def late(self) -> int:
        """How many calls of tools go on past their time."""
        return self._attempts.late()

    def forget(self, run: str) -> None:
        """Drop what is kept at hand of a run that has ended."""
        self._plans.pop(run, None)
        with self._counting:
            for spot in [spot for spot in self._items_left if spot.run == run]:
                del self._items_left[spot]
        for spot in [spot for spot in list(self._unwritten) if spot.run == run]:
            self._unwritten.pop(spot, None)
        self._attempts.forget(run)

    # --- what stabilize asks of a task

    def get_timeout(self) -> timedelta:
        return _EVER  # times are limited by the steps themselves, in catalog time

    def get_backoff_period(self, stage: StageExecution, duration: timedelta) -> timedelta:
        return timedelta(seconds=float(stage.context.get("after_s", _TROUBLE_S)))

    def execute(self, stage: StageExecution) -> TaskResult:
        with self.at_work.one(str(stage.context.get("run", ""))):
            return self._executed(stage)

    def _executed(self, stage: StageExecution) -> TaskResult:
        spot = Spot.of(stage.context)
        try:
            self._turn(spot)
        except _Sleeps:
            self._at("suspending")
            return TaskResult.suspend()
        except _Again as again:
            return TaskResult.running(context={"after_s": again.after_s, "trouble": 0})
        except _LoopOver:
            self._unwritten.pop(spot, None)
            self._attempts.over(spot)
            with self._counting:
                self._items_left.pop(spot, None)
            return TaskResult.canceled()
        except RunEnded:
            self.forget(spot.run)
            return TaskResult.canceled()
        except ENDING as error:
            self._on_end(error)
            return TaskResult.running(context={"after_s": _TROUBLE_S})
        except BaseException:  # noqa: BLE001  a full disk, for instance: no reason to fail the run
            # Whatever it is: stabilize loses what raises no Exception, with the place it has.
            trouble = int(stage.context.get("trouble", 0)) + 1
            after_s = min(_TROUBLE_S * 2.0 ** (trouble - 1), _TROUBLE_S_MAX)
            _log.exception("step %s of run %s begins again in %g s", spot.step, spot.run, after_s)
            return TaskResult.running(context={"after_s": after_s, "trouble": trouble})
        return TaskResult.success()

    # --- one turn

    def _turn(self, spot: Spot) -> None:
        """Do what there is to do for `spot`, which has ended when this returns."""
        log = self.log_of(spot.run)
        try:
            run = log.read().run
        except NotFound:
            raise RunEnded("forgotten") from None
        if run.status in ENDED:
            raise RunEnded(run.status)
        plan = self.plan_of(run)
        if self.is_loop_over(plan, log, spot):
            raise _LoopOver
        if spot.iteration and log.items(plan.level_of_spot(spot), outside(spot.iteration)) is None:
            self.anew(run)  # an item of a loop that has not begun
            raise _Sleeps
        if spot.role == END:
            self._end(plan, run, log, spot)
            return
        turn = _Turn(self, plan, run, log, spot)
        try:
            if spot.role == FORK:
                turn.open()
                return
            step = turn.step()
            if step is None or step.status not in OVER:
                turn.take(step)
        except _LoopOver:
            turn.drop()
            raise
        self._after(plan, log, spot)

    def _after(self, plan: Plan, log: RunLog, spot: Spot) -> None:
        """What follows from the end of a step; again after a crash, and with the same outcome."""
        step = log.step(spot.task, spot.iteration)
        fatal = not plan.level_of[spot.task] and not plan.tolerated(spot.task)
        if step is not None and step.status == FAILED and fatal:
            # Nothing can come of the run any more: what else it does or waits for ends.
            log.end(FAILED, f"{spot.task}: {step.error}")
            raise RunEnded(FAILED)
        if step is not None and step.status == FAILED and plan.tasks[spot.task].operator == FOREACH:
            with self._counting:
                self._items_left.pop(spot, None)  # its time was over before they had ended
            self.end_items(plan, log, spot)
        for name in plan.early(spot.task):
            self.ring(plan, Spot(spot.run, name, spot.iteration, _rung(plan.tasks[name])))

    def is_loop_over(self, plan: Plan, log: RunLog, spot: Spot) -> bool:
        """Whether a loop that a spot is in has ended: its time was over, for instance."""
        level, iteration = plan.level_of_spot(spot), spot.iteration
        while level:
            iteration = outside(iteration)
            loop = log.step(level, iteration)
            if loop is not None and loop.status in (*OVER, CANCELLED):
                return True
            level = plan.level_of[level]
        return False

    def end_items(self, plan: Plan, log: RunLog, loop: Spot) -> None:
        """What is still at work or waits inside of a loop that has ended is cancelled."""
        names = [
            name
            for name in plan.tasks
            if any(around.task_id == loop.task for around in plan.loops_around(name))
        ]
        log.cancel_within([*names, loop.task], loop.iteration, _waits_of)

    def ring(self, plan: Plan, spot: Spot) -> None:
        """Have a step look again."""
        level = plan.level_of[spot.task]
        self._at("signalling")
        self.database.ring(Execution(spot.run, level, spot.iteration), spot)

    def anew(self, run: Run) -> None:
        """Begin a run again in stabilize, which holds steps to have ended that have not: its
        file is of another time than the catalog, as after a restore.

        Raises _Again while a step of it is at work, which would begin beside itself; those that
        ask for this as well do not count.
        """
        with self._counting:
            self._asking[run.run_id] += 1
        try:
            with self._renewing:
                if self.at_work.of(run.run_id) > self._asking[run.run_id]:
                    raise _Again(_TROUBLE_S)
                _log.warning("run %s begins anew: %s does not fit the catalog", run.run_id, FILE)
                self.database.forget_run(run.run_id)
                self.begin(run)
        finally:
            with self._counting:
                self._asking -= Counter({run.run_id: 1})

    # --- the end of a run, or of a loop's item

    def _end(self, plan: Plan, run: Run, log: RunLog, spot: Spot) -> None:
        judge = judge_at(plan, log, spot)
        if any(judge.state(task) is None for task in plan.level(spot.task)):
            self.anew(run)
            raise _Sleeps
        failed = judge.unforgiven(plan.level(spot.task))
        error = f"{failed[0].step_id}: {failed[0].error}" if failed else ""
        if not spot.task:
            log.end(FAILED if failed else COMPLETED, error)
            return
        step = log.step(spot.task, spot.iteration)
        if step is None or step.status not in OVER:
            log.begin(spot.task, spot.iteration)
            if failed:
                log.fail(spot.task, spot.iteration, error)
            else:
                # The results are those of the item's steps: what they are is not kept twice.
                log.finish(spot.task, spot.iteration, None)
        loop = Spot(spot.run, spot.task, outside(spot.iteration))
        with self._counting:
            left = self._items_left.get(loop)
            if left is not None:
                left.discard(spot.item)
        if not left:
            self.ring(plan, loop)

    def items_left(self, loop: Spot, items: set[int]) -> None:
        """From now on, count the items of a loop that have not ended."""
        with self._counting:
            self._items_left[loop] = items

    def items_ended(self, loop: Spot, items: set[int]) -> bool:
        """Whether all items of a loop have ended, `items` being among them."""
        with self._counting:
            left = self._items_left.get(loop, set())
            left -= items
            if not left:
                self._items_left.pop(loop, None)
            return not left


@final
class _Turn:
    """One step that begins, or goes on."""

    def __init__(self, steps: Steps, plan: Plan, run: Run, log: RunLog, spot: Spot) -> None:
        self._steps = steps
        self._plan = plan
        self._run = run
        self._log = log
        self._spot = spot
        self._failures = 0  # of the attempts before this one
        self._task = plan.tasks[spot.task]
        self._judge = judge_at(plan, log, spot)

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
        """Bring the step to its end; raises _Sleeps, _Again, _LoopOver, RunEnded."""
        if step is None and not self._may_begin():
            return
        spot, steps = self._spot, self._steps
        self._rest(step)
        begun = self._begun()
        if begun.status in OVER:
            return
        self._failures = begun.failures
        steps._at("begun")
        outcome = steps._unwritten.get(spot) or self._outcome(begun)
        self._write(outcome)

    def drop(self) -> None:
        """End what the step has begun, for its loop is over."""
        spot, log = self._spot, self._log
        log.cancel_within([spot.task], outside(spot.iteration), _waits_of)
        events = self._steps._workflows.events(self._run.tenant_id, log.actor)
        for name in _waits_of(spot.task, spot.iteration):
            with suppress(NotFound):
                events.cancel(subscription_id(self._run.tenant_id, spot.run, name))

    def _begun(self) -> Step:
        """Record that it begins; raises _LoopOver, also where that was over just before."""
        begun = self._log.begin(self._spot.task, self._spot.iteration)
        self._check(begun)
        if self._steps.is_loop_over(self._plan, self._log, self._spot):
            raise _LoopOver
        return begun

    @staticmethod
    def _check(step: Step) -> None:
        if step.status == CANCELLED:
            raise _LoopOver

    def _rest(self, step: Step | None) -> None:
        """Raise _Again where it is too early to begin (again)."""
        attempts, spot = self._steps._attempts, self._spot
        if spot in self._steps._unwritten:
            return  # nothing is called
        left_s = 0.0
        if step is not None and step.retry_at is not None and self._task.retry is not None:
            with self._steps._store.catalog.read() as snapshot:
                now_us = self._steps._store.now_us(snapshot)
            delay_s = _delay_s(self._task.retry, step.failures - 1)
            left_s = attempts.left_s(spot, delay_s, (step.retry_at - now_us) / SECOND_US)
        if left_s <= 0 and self._task.operator == TASK and self._task.timeout_s is not None:
            left_s = attempts.crowded_s(self._run.tenant_id)
            if left_s > 0:
                self._steps._complaints.make(_CROWDED, self._run.tenant_id, str(LATE_MAX))
        if left_s > 0:
            raise _Again(left_s)
        attempts.over(spot)

    def _outcome(self, begun: Step) -> _Outcome:
        """Do what is to be done. Raises _Sleeps, _LoopOver, RunEnded, and what is TROUBLE."""
        try:
            return _Outcome(self._checked(self._value(begun)))
        except _Raised as raised:
            return self._failure(raised.error)
        except (_Sleeps, _LoopOver, RunEnded, *TROUBLE):
            raise
        except Exception as error:  # noqa: BLE001  its templates, for instance
            return self._failure(error)

    def _write(self, outcome: _Outcome) -> None:
        """Make it durable; raises _Again where another attempt follows, _LoopOver, RunEnded."""
        unwritten, spot = self._steps._unwritten, self._spot
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
            self._steps._attempts.failed(spot, outcome.after_s)
            raise _Again(outcome.after_s)
        self._steps._attempts.over(spot)

    def _record(self, outcome: _Outcome) -> _Outcome:
        """Returns what was written: a result that there is no room for is a failure."""
        log, spot, steps = self._log, self._spot, self._steps
        if outcome.result is not None:
            steps._at("finishing")
            try:
                self._check(log.finish(spot.task, spot.iteration, outcome.result))
            except ToolFailed as error:
                outcome = self._failure(error)
            else:
                steps._at("finished")
                return outcome
        if outcome.after_s is not None:
            delay_us = round(outcome.after_s * SECOND_US)
            self._check(log.retry(spot.task, spot.iteration, outcome.error, delay_us))
        else:
            self._check(log.fail(spot.task, spot.iteration, outcome.error))
        return outcome

    def _may_begin(self) -> bool:
        """Whether it begins; what is left out is recorded. Raises _Sleeps."""
        verdict = self._judge.verdict(self._task)
        if verdict is Verdict.BEGIN:
            return True
        if verdict is Verdict.NOT_YET:
            # Who is before it rings where it begins: of a parallel that is its FORK.
            if self._task.trigger_rule in EARLY and self._spot.role == _rung(self._task):
                raise _Sleeps
            self._steps.anew(self._run)
            raise _Sleeps
        blocked = verdict is Verdict.BLOCKED
        why = self._judge.why_blocked(self._task) if blocked else ""
        self._log.skip(self._spot.task, self._spot.iteration, why)
        return False

    def _failure(self, error: BaseException) -> _Outcome:
        """Whatever the error is, this raises nothing: the tool would be called again for it."""
        spot, retry = self._spot, self._task.retry
        told = _told(error)
        if not isinstance(error, BlobcaskError):
            _log.warning("step %s of run %s failed", spot.step, spot.run, exc_info=error)
            told = f"{type(error).__name__}: {told}"
        hopeless = isinstance(error, _HOPELESS) or (
            isinstance(error, ToolFailed) and not error.again
        )
        if retry is None or hopeless or self._failures >= retry.max_retries:
            return _Outcome(error=told)
        return _Outcome(error=told, after_s=_delay_s(retry, self._failures))

    def _checked(self, value: Any) -> msgspec.Raw:
        """A result as JSON; raises ToolFailed."""
        try:
            raw = msgspec.json.encode(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise ToolFailed(self._what, f"its result is no JSON value: {error}") from None
        limit: int = self._steps._settings.workflows.result_max
        # Each of the results in one of these was checked, and all of a run are (`RunLog.finish`).
        if self._task.operator not in (FOREACH, PARALLEL, JOIN) and len(raw) > limit:
            raise ToolFailed(
                self._what,
                f"its result has {len(raw)} bytes, more than the {limit} of "
                "[workflows] result_max; store it as a file",
            )
        return msgspec.Raw(raw)

    @property
    def _what(self) -> str:
        return self._task.function or self._task.operator

    # --- by operator

    def _value(self, begun: Step) -> Any:
        if self._task.operator in (TASK, EMIT_EVENT):
            self._log.check_room(self._what)  # before anything is done outside
        operators: dict[str, Callable[[Step], Any]] = {
            TASK: self._call,
            FOREACH: self._loop,
            CONDITION: lambda _: templates.holds(self._task.condition, self._known()),
            PARALLEL: self._close,
            JOIN: self._join,
            WAIT: self._wait,
            WAIT_FOR_EVENT: self._wait_for_event,
            EMIT_EVENT: self._emit,
        }
        return operators[self._task.operator](begun)

    def _known(self) -> Mapping[str, Any]:
        return Scope(self._plan, self._log, self._spot)

    def _call(self, begun: Step) -> Any:
        task, steps, run = self._task, self._steps, self._run
        with _tools_own(task.function):  # it is loaded by now
            tool = steps._registry.tool(task.function)
            raw = tool.raw
        known = self._known()
        rendering = templates.Rendering(known)  # one for all: its limit is that of the step
        args = task.args if raw else rendering.value(task.args)
        kwargs = task.kwargs if raw else rendering.value(task.kwargs)
        actor = self._log.actor
        calling = Calling(
            run.tenant_id,
            run.run_id,
            task.task_id,
            EmbeddedPlace(steps._store, steps._workflows, run.tenant_id, actor),
            steps._settings,
            iteration=self._spot.iteration,
            actor=actor,
            attempt=begun.attempts,
            timeout_s=task.timeout_s,
            render=lambda text: templates.spelt(rendering.text(text)),
        )

        def call() -> Any:
            with _tools_own(task.function):
                return tool(calling, *args, **kwargs)

        result = steps._attempts.within(
            self._spot, run.tenant_id, task.timeout_s, task.function, call
        )
        steps._at("called")
        if not isinstance(result, Waiting):
            if is_too_deep(result):
                raise ToolFailed(task.function, f"its result has more than {LEVELS_MAX} levels")
            return result
        claimed = self._event(result)
        with _tools_own(task.function):
            return result.result(claimed)

    def _wait_for_event(self, begun: Step) -> Any:
        name = templates.spelt(templates.render(self._task.event_name, self._known()))
        shown = {"event_name": name}
        waiting = Waiting("wait_for_event", name, None, self._task.timeout_s, shown)
        return waiting.result(self._event(waiting))

    def _wait(self, begun: Step) -> Any:
        until = templates.render(self._task.wait_for, self._known())
        limit_s = self._task.timeout_s
        moment_us = None
        seconds = _seconds(until)
        if seconds is None:
            moment_us = _moment_us(until)
            with self._steps._store.catalog.read() as snapshot:
                now_us = self._steps._store.now_us(snapshot)
            seconds = max(0.0, (moment_us - now_us) / SECOND_US)
        claimed = self._event(Waiting("wait", "", None, seconds))
        if limit_s is None:
            return None
        # Which of the two ended it: the wait began with the shorter one.
        ended_us = claimed.subscription.expires_at or 0
        early = seconds > limit_s if moment_us is None else ended_us < moment_us - _ROUNDED_US
        if early:
            raise ToolFailed(self._what, f"it would have taken longer than {limit_s:g} s")
        return None

    def _event(self, waiting: Waiting) -> Any:
        """What a wait came to; raises _Sleeps while it waits."""
        spot, log, steps = self._spot, self._log, self._steps
        events = steps._workflows.events(self._run.tenant_id, log.actor)
        limits = [
            limit_s for limit_s in (waiting.timeout_s, self._task.timeout_s) if limit_s is not None
        ]
        timeout_us = round(max(0.0, min(limits)) * SECOND_US) if limits else None
        wait = events.subscribe(
            spot.run, spot.step, waiting.event_name, waiting.correlation_key, timeout_us
        )
        steps._at("subscribed")
        claimed = events.claim(wait.subscription_id)
        if claimed is None:
            self._check(log.wait(spot.task, spot.iteration, waiting.shown))
            # What came before the step was shown to wait has rung nobody who sleeps; what comes
            # from now on is rung for, and kept until the step sleeps.
            claimed = events.claim(wait.subscription_id)
        if claimed is None:
            raise _Sleeps
        steps._at("claimed")
        return claimed

    def _emit(self, begun: Step) -> Any:
        spot, run = self._spot, self._run
        known = self._known()
        emitted = self._steps._workflows.events(run.tenant_id, self._log.actor).emit(
            templates.spelt(templates.render(self._task.event_name, known)),
            templates.render(self._task.payload, known),
            # Another run may come to its wait later.
            hold_us=self._steps._settings.events.hold_max,
            key=step_key(spot.run, spot.step, "event"),
        )
        return {"event_id": emitted.event_id, "delivered_to": emitted.delivered_to}

    def _join(self, begun: Step) -> Any:
        return {name: self._result_of(name) for name in self._task.dependencies}

    def _close(self, begun: Step) -> Any:
        """The end of a parallel: the results of its branches."""
        failed = self._judge.unforgiven(branch_tasks(self._task))
        if failed:
            raise ToolFailed(self._what, f"{failed[0].step_id}: {failed[0].error}")
        iteration = self._spot.iteration
        return {
            name: _came_to({end: self._log.result(end, iteration) for end in self._ends(branch)})
            for name, branch in self._task.branches.items()
        }

    def _loop(self, begun: Step) -> Any:
        """Begin the items that have not begun; when all have ended, their results."""
        spot, steps, loop, log = self._spot, self._steps, self._task, self._log
        count = log.items(loop.task_id, spot.iteration)
        if count is None:
            count = self._begin_loop()
        numbers = set(range(count))
        # Counted from here on: an item that ends before it is looked at below is not missed.
        steps.items_left(spot, set(numbers))
        before = self._ended_items()
        for number in sorted(numbers - before.keys()):
            iteration = inside(spot.iteration, number)
            steps.database.begin(
                Execution(spot.run, loop.task_id, iteration),
                stages_of(self._plan, self._run, loop.task_id, iteration),
            )
        ended = before if len(before) == count else self._ended_items()
        if not steps.items_ended(spot, ended.keys() & numbers):
            self._limit()
            self._check(log.wait(spot.task, spot.iteration))
            raise _Sleeps
        ended = self._ended_items()
        self._fail_with([step for _, step in sorted(ended.items()) if step.status == FAILED])
        results = {end: log.results_within(end, spot.iteration) for end in self._ends(loop.body)}
        values = []
        for number in range(count):
            item = inside(spot.iteration, number)
            values.append(_came_to({end: found.get(item) for end, found in results.items()}))
        return {"results": values, "count": count}

    def _ends(self, tasks: list[Task]) -> list[str]:
        """Those of a body or a branch that nobody else in it waits for."""
        names = [task.task_id for task in tasks]
        return [name for name in names if set(names).isdisjoint(self._plan.dependents[name])]

    def _begin_loop(self) -> int:
        """Record what the loop goes over; returns how many they are."""
        loop = self._task
        items = items_of(loop, self._known())
        items_max = self._steps._settings.workflows.items_max
        if len(items) > items_max:
            raise ToolFailed(
                self._what,
                f"{len(items)} items are more than the {items_max} of [workflows] items_max",
            )
        self._log.record_items(loop.task_id, self._spot.iteration, items)
        return len(items)

    def _ended_items(self) -> dict[int, Step]:
        """Those items of this loop that have ended, by their numbers."""
        return {
            int(step.iteration.rpartition(".")[2]): step
            for step in self._log.steps_within(self._task.task_id, self._spot.iteration)
            if step.status in OVER
        }

    def _fail_with(self, failed: list[Step]) -> None:
        if not failed:
            return
        told = "; ".join(f"item {step.iteration}: {step.error}" for step in failed[:_ERRORS_SHOWN])
        more = "; …" if len(failed) > _ERRORS_SHOWN else ""
        raise ToolFailed(self._what, f"{len(failed)} failed: {told}{more}")

    def _limit(self) -> None:
        """Raise ToolFailed when the time of a loop is over; it is rung for then."""
        if self._task.timeout_s is None:
            return
        events = self._steps._workflows.events(self._run.tenant_id, self._log.actor)
        timeout_us = round(self._task.timeout_s * SECOND_US)
        wait = events.subscribe(self._spot.run, self._spot.step + TIMER, "", None, timeout_us)
        if events.claim(wait.subscription_id) is not None:
            raise ToolFailed(self._what, f"it took longer than {self._task.timeout_s:g} s")

    def _result_of(self, name: str) -> msgspec.Raw | None:
        raw = self._log.result(name, self._spot.iteration)
        return None if raw is None else msgspec.Raw(raw)


def _came_to(results: Mapping[str, bytes | None]) -> msgspec.Raw | dict[str, msgspec.Raw] | None:
    """What a body or a branch came to, of the results of those that it ends with: that of the
    one that completed, as where a condition chose; of several, all by their names."""
    found = {name: msgspec.Raw(raw) for name, raw in results.items() if raw is not None}
    if len(found) > 1:
        return found
    return next(iter(found.values()), None)


def _rung(task: Task) -> str:
    """The role in which a task begins, and is rung for until then."""
    return FORK if task.operator == PARALLEL else STEP


def _waits_of(task: str, iteration: str) -> tuple[str, str]:
    """The names of the waits that a step may have."""
    step = Spot("", task, iteration).step
    return step, step + TIMER


@contextmanager
def _tools_own(tool: str) -> Iterator[None]:
    """What is raised in here is the tool's own: its failure, also where it is a full disk."""
    try:
        yield
    except (RunEnded, *ENDING):
        raise
    except SystemExit as error:
        raise _Raised(ToolFailed(tool, f"it exited with {error.code}")) from None
    except BaseException as error:  # such as a CancelledError: nobody else ends the runner so
        raise _Raised(error) from error


def judge_at(plan: Plan, log: RunLog, spot: Spot) -> Judge:
    """A judge of the level, and the iteration of it, that a spot is in."""
    return Judge(
        plan,
        lambda name: log.step(name, spot.iteration),
        lambda name: log.result(name, spot.iteration),
    )


def found_step(view: RunView, task: str, iteration: str) -> Step | None:
    """A step of a run, as it is now; None before it began."""
    return view.step(task, iteration)


def _told(error: BaseException) -> str:
    """What an error says, as it can be kept."""
    try:
        told = str(error)
    except Exception:  # noqa: BLE001  it is the tool's own class
        told = "it cannot be told"
    return told.encode(errors="replace").decode()


def _delay_s(retry: Retry, failures: int) -> float:
    """How long after so many failures, and one more, the next attempt begins."""
    try:
        delay_s = retry.delay_s * retry.backoff_factor**failures
    except OverflowError:
        delay_s = math.inf if retry.delay_s > 0 else 0.0
    return min(delay_s, _RETRY_S_MAX) if delay_s > 0 else 0.0


def _seconds(until: Any) -> float | None:
    """How long a wait is that says so; None where it says until when. Raises InvalidWorkflow."""
    if isinstance(until, bool):
        return None
    try:
        seconds = float(until)
    except (TypeError, ValueError):
        return None
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds) or seconds > _WAIT_S_MAX:
        raise InvalidWorkflow(str(until)[:100], "a wait takes up to a hundred years")
    return max(0.0, seconds)


def _moment_us(until: Any) -> int:
    """The time that a text tells; raises InvalidWorkflow."""
    try:
        moment = datetime.fromisoformat(until)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return round(moment.timestamp() * SECOND_US)
    except (TypeError, ValueError, OverflowError):
        raise InvalidWorkflow(
            str(until)[:100], "a wait takes seconds, or until a time as 2026-01-31T12:00:00Z"
        ) from None
