"""Submissions: what is to be run, checked alike whoever submits it and from where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from cas.errors import InvalidRequest, TooLarge
from workflows.definitions import Definition
from workflows.notation import as_json, check_depth

INPUTS_BYTES_MAX: Final = 1 << 20  # as JSON


def read_submission(
    definition: str, inputs: Mapping[str, Any], tools: Iterable[str], barred: Mapping[str, str]
) -> Definition:
    """The definition that `definition` (highway_dsl's JSON or YAML) writes down, of a run that
    can be kept with its `inputs`, and calls these `tools` and none that is `barred`, each of which
    has its reason there.

    Raises InvalidRequest, InvalidWorkflow, OperatorUnsupported, TooLarge.
    """
    check_depth(inputs)
    _check_inputs(dict(inputs))
    parsed = Definition.parse(definition)
    parsed.check_tools(tools, barred)
    return parsed


def _check_inputs(inputs: dict[str, Any]) -> None:
    """Raises InvalidRequest for what would not be kept as it is, TooLarge."""
    try:
        raw = as_json(inputs)
    except ValueError as error:
        raise InvalidRequest("inputs", str(error)) from None
    if len(raw) > INPUTS_BYTES_MAX:
        raise TooLarge(INPUTS_BYTES_MAX)
