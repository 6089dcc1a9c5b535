"""Definitions: a workflow of highway_dsl, checked once at the door and plain values after it.

`Definition.parse` takes what people send (highway_dsl's JSON or YAML), has highway_dsl itself
validate it, and refuses what the engine does not carry, by name: a definition that would run
otherwise than it says is worse than none. `Definition.from_json` reads what `parse` has
accepted before, without highway_dsl.

Of a foreach highway_dsl repeats the tasks of its body among those of the workflow
(`is_internal_loop_task`); here they are in the body alone. The tasks of a parallel's branches
are in its branches alone, in highway_dsl as here; a parallel is done when its branches are, so
the task that highway_dsl adds to wait for them (`tools.workflow.wait_for_parallel_branches`)
is a join here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from graphlib import CycleError, TopologicalSorter
from typing import Any, Final, final

import msgspec

from cas.errors import InvalidWorkflow, OperatorUnsupported, TooLarge
from workflows import templates
from workflows.notation import read_notation

DEFINITION_BYTES_MAX: Final = 1 << 20
TASKS_MAX: Final = 1000
# Of all templates of a definition, without the texts around them: Jinja reads a MiB of them in
# five seconds, in a process that others need.
TEMPLATE_BYTES_MAX: Final = 256 << 10
RETRIES_MAX: Final = 1000
RETRY_DELAY_S_MAX: Final = 24 * 3600.0  # the runner waits no longer between two tries
BACKOFF_MAX: Final = 100.0
TIME_S_MAX: Final = 10 * 366 * 24 * 3600.0  # of a timeout and of a wait, as those of events

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
TRIGGER_RULES: Final = (ALL_SUCCESS, ALL_DONE, ONE_SUCCESS, ONE_DONE, NONE_FAILED)

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
_ODD: Final = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)
_LIMITED: Final = (TASK, WAIT, WAIT_FOR_EVENT, FOREACH)  # those whose time can be limited
_UNSUPPORTED_OF_WORKFLOWS: Final = ("schedule", "start_date", "is_paused", "deadline_seconds")


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
        if len(text.encode(errors="surrogatepass")) > DEFINITION_BYTES_MAX:
            raise TooLarge(DEFINITION_BYTES_MAX)
        workflow = _validated(text)
        for field in _UNSUPPORTED_OF_WORKFLOWS:
            if getattr(workflow, field):
                raise InvalidWorkflow(workflow.name, f"{field} is not supported")
        try:
            tasks = _tasks(workflow.tasks.values(), workflow.default_retry_policy)
        except RecursionError:
            raise InvalidWorkflow(workflow.name, "too deep") from None
        if not tasks:
            raise InvalidWorkflow(workflow.name, "it has no tasks")
        definition = cls(workflow.name, {task.task_id: task for task in tasks}, workflow.variables)
        definition._check()
        return definition

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

    def check_tools(self, known: Iterable[str]) -> None:
        """Raises InvalidWorkflow where a task calls a tool that is not `known`."""
        names = set(known)
        for task in self.everything():
            if task.operator == TASK and task.function not in names:
                raise InvalidWorkflow(task.task_id, f"there is no tool {task.function!r}")

    def _check(self) -> None:
        identifiers: set[str] = set()
        template_bytes = 0
        for number, task in enumerate(self.everything()):
            if number >= TASKS_MAX:
                raise InvalidWorkflow(self.name, f"more than {TASKS_MAX} tasks")
            # Steps are kept by these names, and the templates see them all together.
            if task.task_id in identifiers:
                raise InvalidWorkflow(task.task_id, "two tasks have this name")
            if not task.task_id or len(task.task_id) > 200 or set("#:/") & set(task.task_id):
                # Waits and keys of steps are named by it, and a client's own have a ":".
                raise InvalidWorkflow(task.task_id[:200], "a name of 1 to 200 characters, no # : /")
            identifiers.add(task.task_id)
            template_bytes += _check_templates(task)
            if template_bytes > TEMPLATE_BYTES_MAX:
                reason = f"more than {TEMPLATE_BYTES_MAX} bytes of templates"
                raise InvalidWorkflow(self.name, reason)
            if task.timeout_s is not None and task.operator not in _LIMITED:
                reason = f"a timeout of {task.operator} is not supported"
                raise InvalidWorkflow(task.task_id, reason)
        _check_level(list(self.tasks.values()))
        for task in self.everything():
            _check_level(task.body)
            for branch in task.branches.values():
                _check_level(branch)


def _check_templates(task: Task) -> int:
    """How many bytes of templates it has; raises InvalidWorkflow, which names the task, where
    one cannot be read."""
    try:
        template_bytes = templates.check(
            [task.args, task.kwargs, task.items, task.wait_for, task.event_name, task.payload]
        )
        if task.operator == CONDITION:
            template_bytes += templates.check_condition(task.condition)
        return template_bytes
    except InvalidWorkflow as error:
        raise InvalidWorkflow(task.task_id, f"{error.value}: {error.reason}") from None


def _check_level(tasks: list[Task]) -> None:
    """Raises InvalidWorkflow where tasks depend on others that are not there, or in a circle."""
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
    try:
        TopologicalSorter({task.task_id: task.dependencies for task in tasks}).prepare()
    except CycleError as error:
        raise InvalidWorkflow(str(error.args[1][0]), "it depends on itself") from None


def _validated(text: str) -> Any:
    """highway_dsl's own value of it, which has no types for us."""
    # Late: pydantic and the DSL cost a fifth of a second, which only who submits should pay.
    from highway_dsl import Workflow
    from pydantic import ValidationError

    data = read_notation(text)
    if not isinstance(data, Mapping) or not isinstance(data.get("tasks"), Mapping):
        raise InvalidWorkflow("definition", "not a workflow of highway_dsl: it has no tasks")
    for name, task in data["tasks"].items():
        operator = task.get("operator_type") if isinstance(task, Mapping) else None
        if not isinstance(operator, str):
            raise InvalidWorkflow(str(name)[:200], "it has no operator_type")
        if operator not in OPERATORS:
            raise OperatorUnsupported(str(name)[:200], operator[:100])
    try:
        return Workflow.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "definition"
        raise InvalidWorkflow(place[:200], str(first["msg"])[:500]) from None
    except _ODD as error:
        # Its own validators meet values of other types than they expect.
        raise InvalidWorkflow("definition", str(error)[:500]) from None


def _tasks(operators: Iterable[Any], policy: Any) -> list[Task]:
    """The tasks of one level, without those that highway_dsl repeats from bodies."""
    level = list(operators)
    inside = {name for operator in level for name in _names_inside(operator)}
    branch_of = {
        name: operator.task_id
        for operator in level
        for branch in getattr(operator, "branches", {}).values()
        for name in branch
    }
    return [
        _task(operator, branch_of, policy) for operator in level if operator.task_id not in inside
    ]


def _names_inside(operator: Any) -> Iterator[str]:
    """The names of the tasks of a body, and of the bodies in it."""
    for inner in getattr(operator, "loop_body", ()):
        yield inner.task_id
        yield from _names_inside(inner)


def _task(operator: Any, branch_of: Mapping[str, str], policy: Any) -> Task:
    kind = _word(operator.operator_type)
    if kind not in OPERATORS:
        raise OperatorUnsupported(operator.task_id, kind)
    for field in _UNSUPPORTED_OF_TASKS:
        if getattr(operator, field):
            raise InvalidWorkflow(operator.task_id, f"{field} is not supported")
    waits = [*operator.dependencies, *(operator.join_tasks if kind == JOIN else ())]
    # A parallel ends with its branches: who waits for a task in one of them waits for it.
    dependencies = list(dict.fromkeys(branch_of.get(name, name) for name in waits))
    retry = operator.retry_policy or (policy if kind == TASK else None)
    common: dict[str, Any] = {
        "task_id": operator.task_id,
        "operator": kind,
        "dependencies": dependencies,
        "trigger_rule": _word(operator.trigger_rule),
        "result_key": operator.result_key,
        "retry": None if retry is None else _retry(operator.task_id, retry),
        "timeout_s": None
        if operator.timeout_policy is None
        else _timeout_s(operator.task_id, operator.timeout_policy.timeout.total_seconds()),
    }
    if kind == TASK and operator.function == _WAIT_FOR_BRANCHES:
        return Task(**{**common, "operator": JOIN})
    if kind == TASK:
        return Task(
            **common, function=operator.function, args=operator.args, kwargs=operator.kwargs
        )
    if kind == FOREACH:
        if operator.dynamic:
            raise InvalidWorkflow(operator.task_id, "dynamic is not supported")
        body = _body(operator, policy)
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
        return Task(**common, branches=_branches(operator, policy))
    if kind == JOIN:
        return Task(**{**common, "trigger_rule": _JOIN_RULES[_word(operator.join_mode)]})
    if kind == WAIT:
        return Task(**common, wait_for=_moment(operator.task_id, operator.wait_for))
    if kind == WAIT_FOR_EVENT:
        if operator.timeout_seconds is not None:
            common["timeout_s"] = _timeout_s(operator.task_id, operator.timeout_seconds)
        return Task(**common, event_name=operator.event_name)
    assert kind == EMIT_EVENT
    return Task(**common, event_name=operator.event_name, payload=operator.payload)


def _body(operator: Any, policy: Any) -> list[Task]:
    """A foreach's tasks; that the first ones come after the foreach itself goes without saying."""
    body = [
        msgspec.structs.replace(
            task, dependencies=[name for name in task.dependencies if name != operator.task_id]
        )
        for task in _tasks(operator.loop_body, policy)
    ]
    if not body:
        raise InvalidWorkflow(operator.task_id, "its body has no tasks")
    return body


def _branches(operator: Any, policy: Any) -> dict[str, list[Task]]:
    from highway_dsl import Workflow
    from pydantic import ValidationError

    branches: dict[str, list[Task]] = {}
    for name, names in operator.branches.items():
        try:
            workflow = Workflow.model_validate(operator.branch_workflows[name])
        except KeyError:
            raise InvalidWorkflow(operator.task_id, f"branch {name!r} has no tasks") from None
        except (ValidationError, *_ODD) as error:
            raise InvalidWorkflow(operator.task_id, f"branch {name!r}: {error}"[:500]) from None
        tasks = _tasks(workflow.tasks.values(), workflow.default_retry_policy or policy)
        if not tasks or not {task.task_id for task in tasks} <= set(names):
            raise InvalidWorkflow(operator.task_id, f"branch {name!r} has other tasks than it says")
        branches[name] = tasks
    if not branches:
        raise InvalidWorkflow(operator.task_id, "it has no branches")
    return branches


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
