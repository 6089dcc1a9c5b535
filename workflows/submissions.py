"""Submissions: what is to be run, checked alike whoever submits it and from where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from cas.errors import InvalidRequest, InvalidToolCall, InvalidWorkflow, TooLarge
from workflows.definitions import NEAR_NAMES, TASK, Definition, Reads, near
from workflows.engine.plan import Plan
from workflows.notation import as_json, check_depth
from workflows.tools.registry import Registry

INPUTS_BYTES_MAX: Final = 1 << 20  # as JSON
_COMPARED_MAX: Final = 2000  # inputs, among which the one that was meant is looked for


def read_submission(
    definition: str, inputs: Mapping[str, Any], tools: Registry, barred: Mapping[str, str]
) -> Definition:
    """The definition that `definition` (highway_dsl's JSON or YAML) writes down, of a run that
    can be kept with its `inputs`, and calls these `tools` as they can be called and none that is
    `barred`, each of which has its reason there.

    A mistake that only the run's end would show otherwise is refused here, before people have
    done their part: a tool without its arguments, a template without what it names.

    Raises InvalidRequest, InvalidWorkflow, OperatorUnsupported, TooLarge.
    """
    check_depth(inputs)
    _check_inputs(dict(inputs))
    parsed, reads = Definition.parse_reading(definition)
    parsed.check_tools(tools.names, barred)
    for task in parsed.everything():
        if task.operator != TASK:
            continue
        tool = tools.tool(task.function)
        if tool.foreign:  # nor is it known here whether it fills in its templates
            del reads[task.task_id]
            continue
        try:
            tool.check(task.args, task.kwargs)
        except InvalidToolCall as error:
            raise InvalidWorkflow(task.task_id, f"{error.value}: {error.reason}") from None
    _check_names(parsed, reads, inputs)
    return parsed


def _check_names(definition: Definition, reads: Reads, inputs: Mapping[str, Any]) -> None:
    """Raises InvalidWorkflow for a template that names what nothing is called, if the run could
    not complete without it. A way of a condition, and a task whose failure somebody takes up, may
    name an input that only some runs are given."""
    given = {*definition.variables, *inputs}
    outside = definition.everything(loops=False)
    everywhere = given.union(*((task.task_id, task.result_key) for task in outside))
    odd = [
        (task_id, name, text)
        for task_id, names in reads.items()
        for name, text in names.items()
        if name not in everywhere
    ]
    if not odd:  # a plan of many dependencies takes its time
        return
    plan = Plan(definition)
    for task_id, name, text in odd:
        level = plan.level_of[task_id]
        # Looked up, and not put together for each of very many loops: inputs may be as many.
        if name not in given and not plan.knows(level, name) and plan.is_certain(task_id):
            visible = plan.visible(level)
            named = visible | given if len(given) <= _COMPARED_MAX else visible
            others = near(name, named, NEAR_NAMES)
            reason = (
                f"{text}: nothing is named {name[:200]!r}; {others}; an input that may be missing "
                "is written {{name | default('')}}"
            )
            raise InvalidWorkflow(task_id, reason)


def _check_inputs(inputs: dict[str, Any]) -> None:
    """Raises InvalidRequest for what would not be kept as it is, TooLarge."""
    try:
        raw = as_json(inputs)
    except ValueError as error:
        raise InvalidRequest("inputs", str(error)) from None
    if len(raw) > INPUTS_BYTES_MAX:
        raise TooLarge(INPUTS_BYTES_MAX)
