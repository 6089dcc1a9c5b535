"""Work: what a step does, by its operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final, final

import msgspec

from cas.clock import SECOND_US
from cas.errors import InvalidWorkflow, RunEnded, ToolFailed
from cas.once import step_key
from cas.records import FAILED, Run, Step
from workflows import templates
from workflows.definitions import (
    CONDITION,
    EMIT_EVENT,
    FOREACH,
    JOIN,
    PARALLEL,
    TASK,
    TIME_S_MAX,
    WAIT,
    WAIT_FOR_EVENT,
    Task,
)
from workflows.embedded import EmbeddedPlace
from workflows.engine.kit import Kit
from workflows.engine.outcomes import ENDING, Raised, Sleeps, check
from workflows.engine.plan import Plan, branch_tasks
from workflows.engine.scope import Scope, items_of
from workflows.engine.spots import TIMER, Execution, Spot, inside
from workflows.engine.stages import stages_of
from workflows.engine.verdicts import OVER, Judge
from workflows.notation import LEVELS_MAX, is_too_deep
from workflows.run_log import RunLog
from workflows.tools.calling import Calling, Waiting

_ROUNDED_US: Final = 1000  # how near to its moment a wait ends, at least
_ERRORS_SHOWN: Final = 3


@final
class Work:
    """The work of one step, which has begun."""

    def __init__(self, kit: Kit, plan: Plan, run: Run, log: RunLog, spot: Spot) -> None:
        self._kit = kit
        self._plan = plan
        self._run = run
        self._log = log
        self._spot = spot
        self._task = plan.tasks[spot.task]

    def result(self, begun: Step) -> msgspec.Raw:
        """Do it; returns what it came to, as JSON.

        Raises Sleeps while it waits, LoopOver, RunEnded; Raised, which is what the tool raised;
        and what makes the step fail unless it is TROUBLE, such as ToolFailed.
        """
        return self._checked(self._value(begun))

    def _checked(self, value: Any) -> msgspec.Raw:
        """A result as JSON; raises ToolFailed."""
        try:
            raw = msgspec.json.encode(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise ToolFailed(self._what, f"its result is no JSON value: {error}") from None
        limit: int = self._kit.settings.workflows.result_max
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
        task, kit, run = self._task, self._kit, self._run
        with _tools_own(task.function):  # it is loaded by now
            tool = kit.registry.tool(task.function)
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
            EmbeddedPlace(kit.store, kit.workflows, run.tenant_id, actor),
            kit.settings,
            iteration=self._spot.iteration,
            actor=actor,
            attempt=begun.attempts,
            timeout_s=task.timeout_s,
            render=lambda text: templates.spelt(rendering.text(text)),
        )

        def call() -> Any:
            with _tools_own(task.function):
                return tool(calling, *args, **kwargs)

        result = kit.attempts.within(self._spot, run.tenant_id, task.timeout_s, task.function, call)
        kit.at("called")
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
            seconds = max(0.0, (moment_us - self._kit.now_us()) / SECOND_US)
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
        """What a wait came to; raises Sleeps while it waits."""
        spot, log, kit = self._spot, self._log, self._kit
        events = kit.events_of(self._run, log)
        limits = [
            limit_s for limit_s in (waiting.timeout_s, self._task.timeout_s) if limit_s is not None
        ]
        timeout_us = round(max(0.0, min(limits)) * SECOND_US) if limits else None
        wait = events.subscribe(
            spot.run, spot.step, waiting.event_name, waiting.correlation_key, timeout_us
        )
        kit.at("subscribed")
        claimed = events.claim(wait.subscription_id)
        if claimed is None:
            check(log.wait(spot.task, spot.iteration, waiting.shown))
            # What came before the step was shown to wait has rung nobody who sleeps; what comes
            # from now on is rung for, and kept until the step sleeps.
            claimed = events.claim(wait.subscription_id)
        if claimed is None:
            raise Sleeps
        kit.at("claimed")
        return claimed

    def _emit(self, begun: Step) -> Any:
        spot, known = self._spot, self._known()
        emitted = self._kit.events_of(self._run, self._log).emit(
            templates.spelt(templates.render(self._task.event_name, known)),
            templates.render(self._task.payload, known),
            # Another run may come to its wait later.
            hold_us=self._kit.settings.events.hold_max,
            key=step_key(spot.run, spot.step, "event"),
        )
        return {"event_id": emitted.event_id, "delivered_to": emitted.delivered_to}

    def _join(self, begun: Step) -> Any:
        return {name: self._result_of(name) for name in self._task.dependencies}

    def _close(self, begun: Step) -> Any:
        """The end of a parallel: the results of its branches."""
        failed = Judge.at(self._plan, self._log, self._spot).unforgiven(branch_tasks(self._task))
        if failed:
            raise ToolFailed(self._what, f"{failed[0].step_id}: {failed[0].error}")
        iteration = self._spot.iteration
        return {
            name: _came_to({end: self._log.result(end, iteration) for end in self._ends(branch)})
            for name, branch in self._task.branches.items()
        }

    def _loop(self, begun: Step) -> Any:
        """Begin the items that have not begun; when all have ended, their results."""
        spot, kit, loop, log = self._spot, self._kit, self._task, self._log
        count = log.items(loop.task_id, spot.iteration)
        if count is None:
            count = self._begin_loop()
        numbers = set(range(count))
        # Counted from here on: an item that ends before it is looked at below is not missed.
        kit.items.count(spot, set(numbers))
        before = self._ended_items()
        for number in sorted(numbers - before.keys()):
            iteration = inside(spot.iteration, number)
            kit.database.begin(
                Execution(spot.run, loop.task_id, iteration),
                stages_of(self._plan, self._run, loop.task_id, iteration),
            )
        ended = before if len(before) == count else self._ended_items()
        if not kit.items.all_ended(spot, ended.keys() & numbers):
            self._limit()
            check(log.wait(spot.task, spot.iteration))
            raise Sleeps
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
        items_max = self._kit.settings.workflows.items_max
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
        events = self._kit.events_of(self._run, self._log)
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


@contextmanager
def _tools_own(tool: str) -> Iterator[None]:
    """What is raised in here is the tool's own: its failure, also where it is a full disk."""
    try:
        yield
    except (RunEnded, *ENDING):
        raise
    except SystemExit as error:
        raise Raised(ToolFailed(tool, f"it exited with {error.code}")) from None
    except BaseException as error:  # such as a CancelledError: nobody else ends the runner so
        raise Raised(error) from error


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
    if not math.isfinite(seconds) or seconds > TIME_S_MAX:
        raise InvalidWorkflow(str(until)[:100], "a wait takes up to ten years")
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
