"""Definitions: a workflow of highway_dsl, checked once at the door and plain values after it.

`Definition.parse` takes what people send (highway_dsl's JSON or YAML), has highway_dsl itself
validate it, and refuses what the engine does not carry, by name: a definition that would run
otherwise than it says is worse than none. `Definition.from_json` reads what `parse` has
accepted before, without highway_dsl.

highway_dsl sees one operator at a time, by the class that its `operator_type` names; bodies and
branches are walked here. Left to itself it tries fifteen classes for each task of a body, one
after the other, and again for each loop around it: a kilobyte would take for ever.

Of a foreach highway_dsl repeats the tasks of its body among those of the workflow
(`is_internal_loop_task`); here they are in the body alone. The tasks of a parallel's branches
are in its branches alone, in highway_dsl as here; a parallel is done when its branches are, so
the task that highway_dsl adds to wait for them (`tools.workflow.wait_for_parallel_branches`)
is a join here.

The tasks of a condition's ways are among those of the workflow, and nothing says which of them
are whose: highway_dsl has all of them depend on the condition too. So one that depends on it and
comes after what it leads to is of that way (`engine.plan`). One that depends on the condition
alone runs once that is decided, whichever way: `.condition(…).task(…)` writes this. So does what
a join names in `join_tasks`, and a task after a condition that is in a way of another one on which
that task does not depend: of its way it would depend on both. What else depends on a condition and
on something before its ways could be meant either way, and is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import reduce
from graphlib import CycleError, TopologicalSorter
from operator import or_
from typing import Any, Final, NamedTuple, final

import msgspec

from cas.clock import SECOND_US
from cas.errors import InvalidRequest, InvalidWorkflow, OperatorUnsupported, TooLarge
from cas.events import check_correlation_key, check_event_name
from workflows import templates
from workflows.notation import read_notation

DEFINITION_BYTES_MAX: Final = 1 << 20
TASKS_MAX: Final = 1000
# Of those that do not follow from others (`awaited_of`): with so many each step costs ten times
# what it costs in a chain, a sixth of a second of processor time.
DEPENDENCIES_MAX: Final = 3000
# Loops and parallels in each other. With as many items as a loop may have, the name of a step,
# which has a number of each loop, is then no longer than that of a wait may be.
NESTING_MAX: Final = 20
# Of all templates of a definition, without the texts around them: Jinja reads a MiB of them in
# five seconds, in a process that others need.
TEMPLATE_BYTES_MAX: Final = 256 << 10
RETRIES_MAX: Final = 1000
RETRY_DELAY_S_MAX: Final = 24 * 3600.0  # the runner waits no longer between two tries
BACKOFF_MAX: Final = 100.0
TIME_S_MAX: Final = 10 * 366 * 24 * 3600.0  # of a timeout and of a wait, as those of events
# With which highway_dsl writes down the join of a parallel where its author said nothing.
BRANCHES_TIMEOUT_S: Final = 300

TASK: Final = "task"
FOREACH: Final = "foreach"
CONDITION: Final = "condition"
PARALLEL: Final = "parallel"
JOIN: Final = "join"
WAIT: Final = "wait"
WAIT_FOR_EVENT: Final = "wait_for_event"
EMIT_EVENT: Final = "emit_event"
OPERATORS: Final = (
    TASK, FOREACH, CONDITION, PARALLEL, JOIN, WAIT, WAIT_FOR_EVENT, EMIT_EVENT,
)  # fmt: skip

# When a task may begin, by what became of those that it depends on.
ALL_SUCCESS: Final = "all_success"
ALL_DONE: Final = "all_done"
ONE_SUCCESS: Final = "one_success"
ONE_DONE: Final = "one_done"
NONE_FAILED: Final = "none_failed"
# Rules by which a task may begin before all that it depends on has ended.
EARLY: Final = (ONE_SUCCESS, ONE_DONE)

_WAIT_FOR_BRANCHES: Final = "tools.workflow.wait_for_parallel_branches"
_JOIN_RULES: Final = {
    "all_of": ALL_DONE,
    "any_of": ONE_DONE,
    "all_success": ALL_SUCCESS,
    "one_success": ONE_SUCCESS,
}
# What changes how a task runs, and is not carried.
_UNSUPPORTED_OF_TASKS: Final = (
    "circuit_breaker_policy",
    "idempotency_key",
    "on_success_task_id",
    "on_failure_task_id",
    "preconditions",
    "postconditions",
)
_NONE: Final[Mapping[str, str]] = {}
_ODD: Final = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)
_LIMITED: Final = (TASK, WAIT, WAIT_FOR_EVENT, FOREACH)  # those whose time can be limited
_TRIED_AGAIN: Final = (TASK, EMIT_EVENT)  # those whose failure another attempt may mend
_INSIDE: Final = ("loop_body", "branch_workflows")  # what an operator has in it
_UNSUPPORTED_OF_WORKFLOWS: Final = ("schedule", "start_date", "is_paused", "deadline_seconds")
# What an operator may have that highway_dsl does not know.
_OURS: Final[Mapping[str, tuple[str, ...]]] = {
    WAIT_FOR_EVENT: ("correlation_key",),
    EMIT_EVENT: ("correlation_key",),
}
# How much alike names are that were confused, of 1: names of tools have most in common anyway, and
# `retry` little with `retry_policy`.
NEAR_TOOLS: Final = 0.85
NEAR_NAMES: Final = 0.7
NEAR_FIELDS: Final = 0.58
_NEAR_CHARS_MAX: Final = 60  # what is longer is compared with nothing: that takes its time
_NAMES_SHOWN: Final = 20


# Of each task, the names that its templates cannot do without: see `templates.Checked`.
Reads = dict[str, Mapping[str, str]]


@final
class Retry(msgspec.Struct, frozen=True):
    """How often a task is tried again, and after how long."""

    max_retries: int
    delay_s: float
    backoff_factor: float  # each delay is so many times the one before


@final
class Task(msgspec.Struct, frozen=True, omit_defaults=True):
    """One task, as the engine needs it; which fields count depends on the operator."""

    task_id: str
    operator: str
    dependencies: list[str]  # of the same level: the workflow's, a body's or a branch's
    trigger_rule: str = ALL_SUCCESS
    result_key: str | None = None
    retry: Retry | None = None
    timeout_s: float | None = None
    # Of a join, its dependencies that only `join_tasks` names: they say nothing of ways.
    joined: list[str] = []
    # task
    function: str = ""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    # foreach
    items: Any = None  # a template that gives a list
    body: list[Task] = []
    # condition: the tasks that each outcome leads to
    condition: str = ""
    if_true: str | None = None
    if_false: str | None = None
    # parallel: branch -> its tasks
    branches: dict[str, list[Task]] = {}
    # wait: seconds, or a text: an RFC 3339 time or a template that gives one of them
    wait_for: float | str = 0
    # wait_for_event, emit_event
    event_name: str = ""
    correlation_key: str | None = None
    payload: Any = None


@final
class Definition(msgspec.Struct, frozen=True, omit_defaults=True):
    """A workflow that the engine carries. `tasks` are those outside of loops and branches."""

    name: str
    tasks: dict[str, Task]
    variables: dict[str, Any] = {}

    @classmethod
    def parse(cls, text: str) -> Definition:
        """What `text` (highway_dsl's JSON or YAML) describes.

        Raises InvalidWorkflow with the task and the reason, OperatorUnsupported, TooLarge.
        """
        return cls.parse_reading(text)[0]

    @classmethod
    def parse_reading(cls, text: str) -> tuple[Definition, Reads]:
        """The same, and what its templates read, which is looked at on the way: it takes more
        time to read templates than all else. Raises as `parse`."""
        if len(text.encode(errors="surrogatepass")) > DEFINITION_BYTES_MAX:
            raise TooLarge(DEFINITION_BYTES_MAX)
        workflow, operators = _workflow(read_notation(text), "definition")
        tasks = _tasks(operators, workflow.default_retry_policy, 0)
        if not tasks:
            raise InvalidWorkflow(workflow.name, "it has no tasks")
        definition = cls(workflow.name, {task.task_id: task for task in tasks}, workflow.variables)
        return definition, definition._check()

    @classmethod
    def from_json(cls, raw: bytes) -> Definition:
        """The definition that `to_json` wrote."""
        return msgspec.json.decode(raw, type=cls)

    def to_json(self) -> bytes:
        """As it is kept."""
        return msgspec.json.encode(self)

    def result_key(self, task_id: str) -> str | None:
        """Under which name others know what a task outside of loops came to."""
        found = (task for task in self.everything(loops=False) if task.task_id == task_id)
        return next((task.result_key for task in found), None)

    def everything(self, *, loops: bool = True) -> Iterator[Task]:
        """All tasks, with those of branches and, with `loops`, of bodies."""
        rest = list(self.tasks.values())
        while rest:
            task = rest.pop()
            yield task
            for branch in task.branches.values():
                rest += branch
            if loops:
                rest += task.body

    def check_tools(self, known: Iterable[str], barred: Mapping[str, str] = _NONE) -> None:
        """Raises InvalidWorkflow where a task calls a tool that is not `known`, or one that is
        `barred`, with the reason that stands there."""
        names = set(known)
        for task in self.everything():
            if task.operator == TASK and task.function not in names:
                others = near(task.function, names, NEAR_TOOLS)
                reason = f"there is no tool {task.function[:200]!r}; {others}"
                raise InvalidWorkflow(task.task_id, reason)
            if task.operator == TASK and task.function in barred:
                raise InvalidWorkflow(task.task_id, f"{task.function}: {barred[task.function]}")

    def check_times(self, now_us: int) -> None:
        """Raises InvalidWorkflow for a wait until a time that is written down, and further off
        than a wait can be. `now_us`: the catalog's time."""
        for task in self.everything():
            until = task.wait_for
            if task.operator != WAIT or not isinstance(until, str) or "{{" in until:
                continue
            moment = datetime.fromisoformat(until)
            moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            if moment.timestamp() - now_us / SECOND_US > TIME_S_MAX:
                raise InvalidWorkflow(task.task_id, "a wait until a time takes up to ten years")

    def _check(self) -> Reads:
        identifiers: set[str] = set()
        reads: Reads = {}
        template_bytes = 0
        for number, task in enumerate(self.everything()):
            if number >= TASKS_MAX:
                raise InvalidWorkflow(self.name, f"more than {TASKS_MAX} tasks")
            # Steps are kept by these names, and the templates see them all together.
            if task.task_id in identifiers:
                raise InvalidWorkflow(task.task_id, "two tasks have this name")
            if task.task_id in (".", ".."):
                # Of an address clients take these away, percent-encoded or not.
                raise InvalidWorkflow(task.task_id, "a name that is not only dots")
            if not task.task_id or len(task.task_id) > 200 or set("#:/!") & set(task.task_id):
                # Waits and keys of steps are named by it: a client's own have a ":", those for
                # the end of a loop's time a "!".
                reason = "a name of 1 to 200 characters, no # : / !"
                raise InvalidWorkflow(task.task_id[:200], reason)
            identifiers.add(task.task_id)
            size_bytes, reads[task.task_id] = _check_templates(task)
            template_bytes += size_bytes
            if template_bytes > TEMPLATE_BYTES_MAX:
                reason = f"more than {TEMPLATE_BYTES_MAX} bytes of templates"
                raise InvalidWorkflow(self.name, reason)
            if task.timeout_s is not None and task.operator not in _LIMITED:
                reason = f"a timeout of {task.operator} is not supported"
                raise InvalidWorkflow(task.task_id, reason)
        dependencies = _check_level(list(self.tasks.values()))
        for task in self.everything():
            for tasks in (task.body, *task.branches.values()):
                dependencies += _check_level(tasks)
        if dependencies > DEPENDENCIES_MAX:
            reason = (
                f"{dependencies} dependencies, not counting those that follow from others, are "
                f"more than {DEPENDENCIES_MAX}; where many depend on the same many, have them "
                "depend on one join of these"
            )
            raise InvalidWorkflow(self.name, reason)
        return reads


def near(name: str, there: Iterable[str], alike: float) -> str:
    """What is called nearly as a name that is not there, in words; else what there is. `alike`:
    how nearly, from 0 to 1."""
    names = sorted(there)
    meant: list[str] = []
    if len(name) <= _NEAR_CHARS_MAX:
        short = [one for one in names if len(one) <= _NEAR_CHARS_MAX]
        meant = difflib.get_close_matches(name, short, 1, alike)
    if meant:
        return f"did you mean {meant[0]!r}"
    more = ", …" if len(names) > _NAMES_SHOWN else ""
    return f"there are {', '.join(names[:_NAMES_SHOWN])}{more}"


def _check_templates(task: Task) -> templates.Checked:
    """Its templates; raises InvalidWorkflow, which names the task, where one cannot be read."""
    try:
        if task.operator == CONDITION:
            return templates.check_condition(task.condition)
        return templates.check(
            [
                task.args,
                task.kwargs,
                task.items,
                task.wait_for,
                task.event_name,
                task.correlation_key,
                task.payload,
            ]
        )
    except InvalidWorkflow as error:
        raise InvalidWorkflow(task.task_id, f"{error.value}: {error.reason}") from None


def _check_level(tasks: list[Task]) -> int:
    """How many dependencies there are that do not follow from others; raises InvalidWorkflow
    where tasks depend on others that are not there, or in a circle."""
    here = {task.task_id: task for task in tasks}
    for task in tasks:
        for name in task.dependencies:
            if name not in here:
                raise InvalidWorkflow(task.task_id, f"it depends on {name!r}, which is not there")
        for name in filter(None, (task.if_true, task.if_false)):
            if name not in here:
                raise InvalidWorkflow(task.task_id, f"it leads to {name!r}, which is not there")
            if task.task_id not in here[name].dependencies:
                raise InvalidWorkflow(name, f"it does not depend on {task.task_id!r}, as it must")
    sorter = TopologicalSorter({task.task_id: task.dependencies for task in tasks})
    try:
        order = list(sorter.static_order())
    except CycleError as error:
        circle = [str(name) for name in error.args[1]][::-1]
        reason = (
            f"it depends on itself ({' after '.join(circle)[:300]}), as where two tasks were given "
            "one name: highway_dsl keeps the last of them"
        )
        raise InvalidWorkflow(circle[0], reason) from None
    for name, way in ways_of(here, order).items():
        if way.doubtful:
            raise InvalidWorkflow(
                name,
                f"it depends on the condition {way.doubtful!r} and on others, none of which comes "
                "after a task that this leads to: nothing tells which way it is of. Have it "
                "depend on the first task of its way; or, where it is of none, on a join that "
                "names all of these in its join_tasks",
            )
    return sum(map(len, awaited_of(here, order).values()))


@final
class Ways(NamedTuple):
    """The ways of conditions that a task is in."""

    # Each condition with the task that it leads to there: the task itself, or one before it. Of
    # ways in each other the innermost ones.
    around: tuple[tuple[str, str], ...]
    own: frozenset[str]  # conditions that it depends on for themselves: of no way of theirs
    doubtful: str | None  # a condition of which nobody can tell


def ways_of(here: Mapping[str, Task], order: Iterable[str]) -> dict[str, Ways]:
    """Of the tasks of one level. `order`: so that each comes after those that it depends on."""
    order = list(order)
    found: dict[str, Ways] = {}
    # Sets of tasks as bits: there may be very many dependencies.
    bit = {name: 1 << number for number, name in enumerate(order)}
    conditions = sum(bit[name] for name in order if here[name].operator == CONDITION)
    before: dict[str, int] = {}  # all that have to end before a task
    inside: dict[str, int] = {}  # the conditions in whose ways a task is
    for name in order:
        task = here[name]
        joined = frozenset(task.joined)
        direct = before[name] = inside[name] = 0
        for other in task.dependencies:
            direct |= 0 if other in joined else bit[other]
            before[name] |= before[other] | bit[other]
        doubtful: str | None = None
        ways: list[tuple[str, str]] = []
        own: set[str] = set()
        for other in task.dependencies:
            condition = here[other]
            leads_to = sorted({one for one in (condition.if_true, condition.if_false) if one})
            if name in leads_to:
                leads_to = [name]
            elif not leads_to:
                continue
            elif other in joined or inside[other] & ~direct:
                own.add(other)
                continue
            else:
                leads_to = [one for one in leads_to if before[name] & bit[one]]
                # The condition of the way that this one is in, which its tasks depend on as well.
                if not leads_to and direct & ~bit[other] & ~(conditions & before[other]):
                    doubtful = doubtful or other
            if leads_to:
                inside[name] |= bit[other]
                ways += [(other, one) for one in leads_to]
        outer = 0
        for other, _ in ways:
            outer |= before[other]
        around = tuple((other, one) for other, one in ways if not bit[other] & outer)
        found[name] = Ways(around, frozenset(own), doubtful)
    return found


def awaited_of(here: Mapping[str, Task], order: Iterable[str]) -> dict[str, list[str]]:
    """Of the tasks of one level, those whose ends each waits for, and that suffice: of what it
    depends on, what nothing else of that waits for, directly or through others. `order`: as for
    `ways_of`.

    What is left out has ended by then: somebody whose end is waited for waited for it. That is
    not so of one that is EARLY, which waits for nobody: nothing is left out because of it.
    """
    waits = {
        name: [] if here[name].trigger_rule in EARLY else here[name].dependencies for name in order
    }
    implied = implied_of(waits)
    return {
        name: [one for one in before if one not in implied[name]] for name, before in waits.items()
    }


def implied_of(before: Mapping[str, list[str]]) -> dict[str, set[str]]:
    """Of each, those directly before it that are before another one of these too. `before`: so
    that each comes after those before it."""
    bit = {name: 1 << number for number, name in enumerate(before)}
    ahead: dict[str, int] = {}  # all that are before one
    found: dict[str, set[str]] = {}
    for name, direct in before.items():
        further = reduce(or_, (ahead[one] for one in direct), 0)
        found[name] = {one for one in direct if bit[one] & further}
        ahead[name] = reduce(or_, (bit[one] for one in direct), further)
    return found


def _workflow(data: Any, name: str) -> tuple[Any, Mapping[Any, Any]]:
    """highway_dsl's own value of a workflow without tasks, which has no types for us; and its
    tasks, as they came. Raises InvalidWorkflow, with `name` or that of the workflow."""
    # Late: pydantic and the DSL cost a fifth of a second, which only who submits should pay.
    from highway_dsl import Workflow

    if not isinstance(data, Mapping) or not isinstance(data.get("tasks"), Mapping):
        raise InvalidWorkflow(name, "not a workflow of highway_dsl: it has no tasks")
    for task_name, task in data["tasks"].items():
        _kind(task, _shown(task, task_name))
    _check_fields(Workflow, data, name)
    workflow = _model(Workflow, {**data, "tasks": {}}, name)
    for field in _UNSUPPORTED_OF_WORKFLOWS:
        if getattr(workflow, field):
            raise InvalidWorkflow(workflow.name, f"{field} is not supported")
    return workflow, data["tasks"]


def _operator(raw: Any, name: str) -> Any:
    """highway_dsl's own value of one operator, without those in it."""
    import highway_dsl

    classes = {
        TASK: highway_dsl.TaskOperator,
        FOREACH: highway_dsl.ForEachOperator,
        CONDITION: highway_dsl.ConditionOperator,
        PARALLEL: highway_dsl.ParallelOperator,
        JOIN: highway_dsl.JoinOperator,
        WAIT: highway_dsl.WaitOperator,
        WAIT_FOR_EVENT: highway_dsl.WaitForEventOperator,
        EMIT_EVENT: highway_dsl.EmitEventOperator,
    }
    kind = _kind(raw, name)
    _check_fields(classes[kind], raw, name, _OURS.get(kind, ()))
    outside = {key: value for key, value in raw.items() if key not in _INSIDE}
    return _model(classes[kind], outside, name)


def _kind(raw: Any, name: str) -> str:
    kind = raw.get("operator_type") if isinstance(raw, Mapping) else None
    if not isinstance(kind, str):
        raise InvalidWorkflow(name, "it has no operator_type")
    if kind not in OPERATORS:
        raise OperatorUnsupported(name, kind[:100])
    return kind


def _check_fields(kind: Any, raw: Mapping[Any, Any], name: str, ours: tuple[str, ...] = ()) -> None:
    """Raises InvalidWorkflow for a field that pydantic would drop without a word. Not for one that
    is empty or false: a later highway_dsl writes down its new fields, too, where nobody used them.
    """
    from highway_dsl import RetryPolicy, TimeoutPolicy

    policies = {
        "retry_policy": RetryPolicy,
        "default_retry_policy": RetryPolicy,
        "timeout_policy": TimeoutPolicy,
    }
    fields = {*kind.model_fields, *ours}
    for key, value in raw.items():
        if key not in fields and value:
            reason = f"there is no field {str(key)[:200]!r}; {near(str(key), fields, NEAR_FIELDS)}"
            raise InvalidWorkflow(name, reason)
        if key in policies and isinstance(value, Mapping):
            _check_fields(policies[key], value, name)


def _model(kind: Any, data: Mapping[Any, Any], name: str) -> Any:
    from pydantic import ValidationError

    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        told = f"{place}: {first['msg']}" if place else str(first["msg"])
        raise InvalidWorkflow(name, told[:500]) from None
    except _ODD as error:
        # Its own validators meet values of other types than they expect.
        raise InvalidWorkflow(name, str(error)[:500]) from None


def _tasks(operators: Mapping[Any, Any], policy: Any, depth: int) -> list[Task]:
    """The tasks of one level, without those that highway_dsl repeats from bodies. `operators`:
    as they came, by a name for each; `depth`: how many loops and parallels are around them."""
    inside: dict[str, Any] = {}
    for raw in operators.values():
        _take_inside(raw, inside)
    level = [
        (_operator(raw, _shown(raw, name)), raw)
        for name, raw in operators.items()
        if not _is_repeated(raw, inside)
    ]
    branch_of = {
        name: operator.task_id
        for operator, _ in level
        for branch in getattr(operator, "branches", {}).values()
        for name in branch
    }
    return [_task(operator, raw, branch_of, policy, depth) for operator, raw in level]


def _shown(raw: Any, name: Any) -> str:
    task_id = raw.get("task_id") if isinstance(raw, Mapping) else None
    return (task_id if isinstance(task_id, str) else str(name))[:200]


def _take_inside(raw: Any, inside: dict[str, Any]) -> None:
    """Add the tasks of a body, and of the bodies in it, by their names."""
    body = raw.get("loop_body") if isinstance(raw, Mapping) else None
    for inner in body if isinstance(body, list) else ():
        if isinstance(inner, Mapping) and isinstance(inner.get("task_id"), str):
            inside[inner["task_id"]] = inner
            _take_inside(inner, inside)


def _is_repeated(raw: Any, inside: Mapping[str, Any]) -> bool:
    """Whether it is in a body too. Raises InvalidWorkflow where it is another one there."""
    if not isinstance(raw, Mapping) or raw.get("is_internal_loop_task") is not True:
        return False
    name = raw.get("task_id")
    if not isinstance(name, str) or name not in inside:
        return False
    if inside[name] != raw:
        raise InvalidWorkflow(name[:200], "it is written twice, and not as in the loop's body")
    return True


def _task(
    operator: Any, raw: Mapping[Any, Any], branch_of: Mapping[str, str], policy: Any, depth: int
) -> Task:
    kind = _word(operator.operator_type)
    for field in _UNSUPPORTED_OF_TASKS:
        if getattr(operator, field):
            raise InvalidWorkflow(operator.task_id, f"{field} is not supported")
    waits = [*operator.dependencies, *getattr(operator, "join_tasks", ())]
    # A parallel ends with its branches: who waits for a task in one of them waits for it.
    dependencies = list(dict.fromkeys(branch_of.get(name, name) for name in waits))
    said = {branch_of.get(name, name) for name in operator.dependencies}
    if kind == TASK and operator.function == _WAIT_FOR_BRANCHES:
        kind = JOIN
        _check_branches_timeout(operator)
    retry = operator.retry_policy or (policy if kind == TASK else None)
    if kind not in _TRIED_AGAIN and retry is not None and retry.max_retries > 0:
        raise InvalidWorkflow(operator.task_id, f"a retry of {kind} is not supported")
    common: dict[str, Any] = {
        "task_id": operator.task_id,
        "operator": kind,
        "dependencies": dependencies,
        "joined": [name for name in dependencies if name not in said],
        "trigger_rule": _word(operator.trigger_rule),
        "result_key": operator.result_key,
        "retry": None if retry is None else _retry(operator.task_id, retry),
        "timeout_s": None
        if operator.timeout_policy is None
        else _timeout_s(operator.task_id, operator.timeout_policy.timeout.total_seconds()),
    }
    if kind == TASK:
        return Task(
            **common, function=operator.function, args=operator.args, kwargs=operator.kwargs
        )
    if kind == FOREACH:
        if operator.dynamic:
            raise InvalidWorkflow(operator.task_id, "dynamic is not supported")
        body = _body(operator, raw, policy, depth)
        return Task(**common, items=operator.items, body=body)
    if kind == CONDITION:
        return Task(
            **common,
            condition=operator.condition,
            if_true=operator.if_true,
            if_false=operator.if_false,
        )
    if kind == PARALLEL:
        if operator.timeout is not None and common["timeout_s"] is None:
            common["timeout_s"] = _timeout_s(operator.task_id, operator.timeout)
        return Task(**common, branches=_branches(operator, raw, policy, depth))
    if kind == JOIN:
        if not hasattr(operator, "join_mode"):
            return Task(**common)
        return Task(**{**common, "trigger_rule": _JOIN_RULES[_word(operator.join_mode)]})
    if kind == WAIT:
        return Task(**common, wait_for=_moment(operator.task_id, operator.wait_for))
    if kind == WAIT_FOR_EVENT:
        if operator.timeout_seconds is not None:
            common["timeout_s"] = _timeout_s(operator.task_id, operator.timeout_seconds)
        return Task(
            **common,
            event_name=_event_name(operator, posted=False),
            correlation_key=_correlation_key(operator, raw),
        )
    assert kind == EMIT_EVENT
    return Task(
        **common,
        event_name=_event_name(operator, posted=True),
        correlation_key=_correlation_key(operator, raw),
        payload=operator.payload,
    )


def _check_branches_timeout(join: Any) -> None:
    """Raises InvalidWorkflow for a time that branches would be thought to have, and would not."""
    given = join.kwargs.get("timeout_seconds")
    if given not in (None, BRANCHES_TIMEOUT_S):
        reason = (
            "timeout_seconds of branches is not supported: leave it out (highway_dsl then writes "
            f"{BRANCHES_TIMEOUT_S}, which is not kept either) and give the tasks in the branches "
            "a timeout_policy, waits for events their timeout_seconds"
        )
        raise InvalidWorkflow(join.task_id, reason)


def _body(operator: Any, raw: Mapping[Any, Any], policy: Any, depth: int) -> list[Task]:
    """A foreach's tasks. That they come after the foreach, and after what that depends on, goes
    without saying: highway_dsl says the former of the first one, and of all of them that they
    come after the condition whose way the foreach is in."""
    body = raw.get("loop_body", [])
    if not isinstance(body, list):
        raise InvalidWorkflow(operator.task_id, "loop_body: no list")
    tasks = _tasks(dict(enumerate(body)), policy, _deeper(operator, depth))
    if not tasks:
        raise InvalidWorkflow(operator.task_id, "its body has no tasks")
    said = {operator.task_id, *operator.dependencies} - {task.task_id for task in tasks}
    return [
        msgspec.structs.replace(
            task, dependencies=[name for name in task.dependencies if name not in said]
        )
        for task in tasks
    ]


def _branches(
    operator: Any, raw: Mapping[Any, Any], policy: Any, depth: int
) -> dict[str, list[Task]]:
    workflows = raw.get("branch_workflows", {})
    if not isinstance(workflows, Mapping) or set(workflows) - set(operator.branches):
        raise InvalidWorkflow(operator.task_id, "branch_workflows: not those of its branches")
    branches: dict[str, list[Task]] = {}
    for name, names in operator.branches.items():
        if name not in workflows:
            raise InvalidWorkflow(operator.task_id, f"branch {name!r} has no tasks"[:500])
        workflow, operators = _workflow(workflows[name], f"{operator.task_id}.{name}"[:200])
        if workflow.variables:
            raise InvalidWorkflow(operator.task_id, "variables of a branch are not supported")
        retry = workflow.default_retry_policy or policy
        tasks = _tasks(operators, retry, _deeper(operator, depth))
        if not tasks or not {task.task_id for task in tasks} <= set(names):
            reason = f"branch {name!r} has other tasks than it says"[:500]
            raise InvalidWorkflow(operator.task_id, reason)
        branches[name] = tasks
    if not branches:
        raise InvalidWorkflow(operator.task_id, "it has no branches")
    return branches


def _deeper(operator: Any, depth: int) -> int:
    if depth >= NESTING_MAX:
        reason = f"more than {NESTING_MAX} loops and parallels in each other"
        raise InvalidWorkflow(operator.task_id, reason)
    return depth + 1


def _event_name(operator: Any, *, posted: bool) -> str:
    """The name of an event; what a template gives is not known here."""
    name = str(operator.event_name)
    if "{{" not in name:
        try:
            check_event_name(name, posted=posted)
        except InvalidRequest as error:
            raise InvalidWorkflow(operator.task_id, f"{error.field}: {error.reason}") from None
    return name


def _correlation_key(operator: Any, raw: Mapping[Any, Any]) -> str | None:
    """Of which event of its name; what a template gives is not known here. "" is none, as it is
    to `tools.workflow.wait_for_event`."""
    key = raw.get("correlation_key") or None
    if key is None or (isinstance(key, str) and "{{" in key):
        return key
    if not isinstance(key, str):
        raise InvalidWorkflow(operator.task_id, "correlation_key: a text")
    try:
        check_correlation_key(key)
    except InvalidRequest as error:
        raise InvalidWorkflow(operator.task_id, f"{error.field}: {error.reason}") from None
    return key


def _word(choice: Any) -> str:
    """An enumeration's value; highway_dsl keeps it as one or as text, as it came."""
    return str(getattr(choice, "value", choice))


def _retry(task_id: str, policy: Any) -> Retry:
    """The engine multiplies these with each other, so each has a limit."""
    if not 0 <= policy.max_retries <= RETRIES_MAX:
        raise InvalidWorkflow(task_id, f"max_retries: 0 to {RETRIES_MAX}")
    delay_s = policy.delay.total_seconds()
    if not 0 <= delay_s <= RETRY_DELAY_S_MAX:
        raise InvalidWorkflow(task_id, f"delay of retries: 0 to {RETRY_DELAY_S_MAX:.0f} seconds")
    if not 1 <= policy.backoff_factor <= BACKOFF_MAX:  # nor is NaN
        raise InvalidWorkflow(task_id, f"backoff_factor: 1 to {BACKOFF_MAX:.0f}")
    return Retry(policy.max_retries, delay_s, policy.backoff_factor)


def _timeout_s(task_id: str, given_s: float) -> float:
    if not 0 < given_s <= TIME_S_MAX:
        raise InvalidWorkflow(task_id, "a timeout: more than 0 seconds, and up to ten years")
    return float(given_s)


def _moment(task_id: str, given: Any) -> float | str:
    """Seconds from the beginning of the wait, or the text of a time, or of a template."""
    if isinstance(given, str):
        if "{{" in given:
            return given
        try:
            given = timedelta(seconds=float(given))
        except (ValueError, OverflowError):
            given = _duration(task_id, given)
    if not isinstance(given, timedelta):
        return str(given.isoformat())
    if not 0 <= given.total_seconds() <= TIME_S_MAX:
        raise InvalidWorkflow(task_id, "a wait takes 0 seconds and up to ten years")
    return given.total_seconds()


def _duration(task_id: str, text: str) -> timedelta:
    """highway_dsl writes a day as P1D, and reads only what begins with PT."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(timedelta).validate_python(text)
    except (ValidationError, *_ODD):
        reason = "a wait takes seconds, a duration as P1DT12H, or a time"
        raise InvalidWorkflow(task_id, reason) from None
