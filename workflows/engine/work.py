"""Work: what a step does, by its operator."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
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
from workflows.engine.outcomes import ENDING, Again, Raised, Sleeps, check
from workflows.engine.plan import Plan, branch_tasks
from workflows.engine.scope import Scope, items_of
from workflows.engine.spots import TIMER, Execution, Spot, inside
from workflows.engine.stages import stages_of
from workflows.engine.verdicts import OVER, Judge
from workflows.notation import LEVELS_MAX, is_too_deep, least_bytes
from workflows.run_log import RunLog
from workflows.tools.calling import Calling, Waiting

# Of results that are put together to one, by a join or at the end of a parallel or a loop: each
# is kept once more in it, and again in what puts that together with others.
TOGETHER_BYTES_MAX: Final = 16 << 20
_ROUNDED_US: Final = 1000  # how near to its moment a wait ends, at least
_ERRORS_SHOWN: Final = 3
# Of the items of a loop, begun in one turn: a tenth of a second's work.
_STAGES_AT_ONCE: Final = 500


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

        Raises Sleeps while it waits, Again, LoopOver, RunEnded; Raised, which is what the tool
        raised; and what makes the step fail unless it is TROUBLE, such as ToolFailed.
        """
        return self._checked(self._value(begun))

    def _checked(self, value: Any) -> msgspec.Raw:
        """A result as JSON; raises ToolFailed."""
        if self._task.operator == TASK:  # the values of all others are ours
            self._check_tools(value, "its result")
        try:
            raw = msgspec.json.encode(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise ToolFailed(self._what, f"its result is no JSON value: {error}") from None
        if self._task.operator in (FOREACH, PARALLEL, JOIN):
            # Each of the results in one of these was checked, and all of a run are
            # (`RunLog.finish`); those of the others are judged before they are read.
            if self._task.operator == FOREACH and len(raw) > TOGETHER_BYTES_MAX:
                raise self._too_much_together()
        elif len(raw) > self._limit_bytes:
            raise self._too_long("its result", len(raw))
        return msgspec.Raw(raw)

    def _check_tools(self, value: Any, what: str) -> None:
        """Raise ToolFailed for what a tool made and would be written as JSON for ever: what
        holds itself, or 30 lists of which each holds the next one twice."""
        if is_too_deep(value):
            levels = f"more than {LEVELS_MAX} levels, as what holds itself has"
            raise ToolFailed(self._what, f"{what} has {levels}")
        size_bytes = least_bytes(value, self._limit_bytes)
        if size_bytes > self._limit_bytes:
            raise self._too_long(what, size_bytes, "at least ")

    def _too_long(self, what: str, size_bytes: int, about: str = "") -> ToolFailed:
        return ToolFailed(
            self._what,
            f"{what} has {about}{size_bytes} bytes, more than the {self._limit_bytes} of "
            "[workflows] result_max; store it as a file",
        )

    @property
    def _limit_bytes(self) -> int:
        return self._kit.settings.workflows.result_max

    def _too_much_together(self) -> ToolFailed:
        reason = f"the results that it puts together have more than {TOGETHER_BYTES_MAX} bytes"
        return ToolFailed(self._what, f"{reason}; store them as files")

    @property
    def _what(self) -> str:
        return self._task.function or self._task.operator

    def _value(self, begun: Step) -> Any:
        if self._task.operator in (TASK, EMIT_EVENT):
            self._log.check_room(self._what)  # before anything is done outside
        operators: dict[str, Callable[[Step], Any]] = {
            TASK: self._call,
            FOREACH: self._loop,
            CONDITION: self._holds,
            PARALLEL: self._close,
            JOIN: self._join,
            WAIT: self._wait,
            WAIT_FOR_EVENT: self._wait_for_event,
            EMIT_EVENT: self._emit,
        }
        return operators[self._task.operator](begun)

    def _known(self) -> Scope:
        return Scope(self._plan, self._log, self._spot)

    def _holds(self, begun: Step) -> bool:
        with self._known() as known:
            return templates.holds(self._task.condition, known)

    def _call(self, begun: Step) -> Any:
        task, kit, run = self._task, self._kit, self._run
        with _tools_own(task.function):  # it is loaded by now
            tool = kit.registry.tool(task.function)
            raw = tool.raw
        known = self._known()
        rendering = templates.Rendering(known)  # one for all: its limit is that of the step

        def render(text: str) -> Any:
            with known:
                return templates.spelt(rendering.text(text))

        if raw:  # copies: the plan's own are those of all attempts
            args, kwargs = deepcopy(task.args), deepcopy(task.kwargs)
        else:
            with known:
                args, kwargs = rendering.value(task.args), rendering.value(task.kwargs)
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
            render=render,
        )

        def call() -> Any:
            with _tools_own(task.function):
                return tool(calling, *args, **kwargs)

        result = kit.attempts.within(self._spot, run.tenant_id, task.timeout_s, task.function, call)
        kit.at("called")
        if not isinstance(result, Waiting):
            return result
        self._check_tools(result.shown, "what it shows")
        claimed = self._event(result)
        with _tools_own(task.function):
            return result.result(claimed)

    def _wait_for_event(self, begun: Step) -> Any:
        with self._known() as known:
            name = templates.spelt(templates.render(self._task.event_name, known))
            key = self._correlation_key(known)
        shown = {"event_name": name, "correlation_key": key}
        waiting = Waiting("wait_for_event", name, key, self._task.timeout_s, shown)
        return waiting.result(self._event(waiting))

    def _wait(self, begun: Step) -> Any:
        with self._known() as known:
            until = templates.render(self._task.wait_for, known)
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
        spot = self._spot
        with self._known() as known:
            name = templates.spelt(templates.render(self._task.event_name, known))
            payload = templates.render(self._task.payload, known)
            key = self._correlation_key(known)
        emitted = self._kit.events_of(self._run, self._log).emit(
            name,
            payload,
            key,
            # Another run may come to its wait later.
            hold_us=self._kit.settings.events.hold_max,
            key=step_key(spot.run, spot.step, "event"),
        )
        return {"event_id": emitted.event_id, "delivered_to": emitted.delivered_to}

    def _correlation_key(self, known: Scope) -> str | None:
        """Of which event of its name; None and "" are none, for that is what an empty template
        gives."""
        key = templates.render(self._task.correlation_key, known)
        return None if key is None or key == "" else templates.spelt(key)

    def _join(self, begun: Step) -> Any:
        found = self._results_of(self._task.dependencies)
        return {name: None if raw is None else msgspec.Raw(raw) for name, raw in found.items()}

    def _close(self, begun: Step) -> Any:
        """The end of a parallel: the results of its branches."""
        failed = Judge.at(self._plan, self._log, self._spot).unforgiven(branch_tasks(self._task))
        if failed:
            raise ToolFailed(self._what, f"{failed[0].step_id}: {failed[0].error}")
        ends = {name: self._ends(branch) for name, branch in self._task.branches.items()}
        found = self._results_of(end for branch in ends.values() for end in branch)
        return {name: _came_to({end: found[end] for end in ends[name]}) for name in ends}

    def _results_of(self, names: Iterable[str]) -> dict[str, bytes | None]:
        """What other tasks came to, as JSON; raises ToolFailed where that is too much together."""
        found: dict[str, bytes | None] = {}
        left_bytes = TOGETHER_BYTES_MAX
        for name in names:
            found[name] = raw = self._log.result(name, self._spot.iteration)
            left_bytes -= 0 if raw is None else len(raw)
            if left_bytes < 0:
                raise self._too_much_together()
        return found

    def _loop(self, begun: Step) -> Any:
        """Begin the items that have not begun, a portion of them at each turn; when all have
        ended, their results."""
        spot, kit, loop, log = self._spot, self._kit, self._task, self._log
        count = log.items(loop.task_id, spot.iteration)
        if count is None:
            count = self._begin_loop()
        numbers = set(range(count))
        unbegun = kit.items.unbegun(spot)
        if unbegun is None:
            # Counted from here on: an item that ends before it is looked at below is not missed.
            kit.items.count(spot, set(numbers))
            unbegun = kit.items.begin(spot, sorted(numbers - self._ended_items().keys()))
        if unbegun:
            self._limit()  # first: its time ends also where there is no room for its items
            self._begin_items(unbegun)
        if unbegun:
            check(log.wait(spot.task, spot.iteration))
            raise Again(0.0)
        kit.items.all_begun(spot)
        if not kit.items.all_ended(spot, self._ended_items().keys() & numbers):
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

    def _begin_items(self, unbegun: deque[int]) -> None:
        """Begin a portion of them, and take it out: between two portions others have their turn,
        and it is seen that the run has ended, or the loop is over.

        Raises RunEnded, StoreFull.
        """
        spot, loop, database, begun = self._spot, self._task.task_id, self._kit.database, 0
        while unbegun and begun < _STAGES_AT_ONCE:
            iteration = inside(spot.iteration, unbegun[0])
            execution = Execution(spot.run, loop, iteration)
            if not database.has(execution):
                if not begun:  # what begins is written to a file without a limit
                    self._kit.store.blobs.need_room(0)
                stages = stages_of(self._plan, self._run, loop, iteration)
                database.begin(execution, self._run.tenant_id, stages, self._log.check_open)
                begun += len(stages)
            unbegun.popleft()

    def _ends(self, tasks: list[Task]) -> list[str]:
        """Those of a body or a branch that nobody else in it waits for."""
        names = {task.task_id: None for task in tasks}
        return [name for name in names if names.keys().isdisjoint(self._plan.dependents[name])]

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
        tasks = sum(1 for _ in self._plan.everything(loop.task_id))
        self._log.record_items(loop.task_id, self._spot.iteration, items, tasks)
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
