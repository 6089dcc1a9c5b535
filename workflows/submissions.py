"""Submissions: what is to be run, checked alike whoever submits it and from where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from cas.errors import TooLarge
from workflows.definitions import Definition
from workflows.notation import check_depth

INPUTS_BYTES_MAX: Final = 1 << 20  # as JSON


def read_submission(
    definition: str, inputs: Mapping[str, Any], tools: Iterable[str], barred: Mapping[str, str]
) -> Definition:
    """The definition that `definition` (highway_dsl's JSON or YAML) writes down, of a run that
    can be kept with its `inputs`, and calls these `tools` and none that is `barred`, each of which
    has its reason there.

    Raises InvalidWorkflow, OperatorUnsupported, TooLarge.
    """
    check_depth(inputs)
    if len(msgspec.json.encode(dict(inputs))) > INPUTS_BYTES_MAX:
        raise TooLarge(INPUTS_BYTES_MAX)
    parsed = Definition.parse(definition)
    parsed.check_tools(tools, barred)
    return parsed
