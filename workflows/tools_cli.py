"""`blobcask workflow tools`: what the steps of a workflow can call, for those who write one."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from cas.cli.call import Call, pass_call
from cas.errors import ToolFailed

if TYPE_CHECKING:
    from workflows.tools.registry import Tool

JSON = dict[str, Any]


@click.command("tools")
@click.argument("name", metavar="[NAME]", required=False)
@pass_call
def tools(call: Call, name: str | None) -> None:
    """Tell what tools there are and how they are called; of one, all that there is to say.

    It tells those that are installed here, also by other packages. Whether tools.shell.run may
    run, the operator says: [workflows] allow_shell.
    """
    if call.server is not None:
        raise click.UsageError("this verb tells the tools that are installed here")
    # Late: the other verbs begin without them.
    from workflows.tools.registry import default_registry

    registry = default_registry()
    if name is not None:
        form = _told(registry.tool(name))
        call.answer(form, [form["signature"], "", *form["doc"].splitlines()])
        return
    forms = [_told_anyway(registry.tool(each)) for each in registry.names]
    call.answer({"tools": forms}, _listed(forms))


def _told(tool: Tool) -> JSON:
    """Raises ToolFailed where it cannot be loaded."""
    # Late, as above.
    from workflows.tools.registry import arguments

    signature = f"{tool.name}{arguments(inspect.signature(tool.function))}"
    return {"name": tool.name, "signature": signature, "doc": inspect.getdoc(tool.function) or ""}


def _told_anyway(tool: Tool) -> JSON:
    """Of one that cannot be loaded, why: the others can be called."""
    try:
        return _told(tool)
    except ToolFailed as error:
        why = error.reason
    except Exception as error:  # noqa: BLE001  whatever another package does when it is loaded
        why = f"cannot be loaded: {type(error).__name__}: {error}"
    return {"name": tool.name, "signature": tool.name, "doc": why}


def _listed(forms: Iterable[JSON]) -> Iterator[str]:
    for form in forms:
        yield form["signature"]
        first, _, _ = form["doc"].partition("\n\n")
        for line in first.splitlines():
            yield f"    {line}"
