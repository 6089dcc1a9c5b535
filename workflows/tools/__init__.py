"""What the steps of a workflow call: `tools.storage.store` and the others.

A tool is a function of a `Calling` (who calls, and the `Place` to work at) and of the step's
arguments. It returns a JSON value, or a `Waiting` where its result comes with an event. What it
raises fails this attempt of the step; the step's retry policy says whether another one follows,
but for what would come again: a refusal of its arguments, and a `ToolFailed` without `again`.

`blobcask workflow tools` shows its signature and its docstring, which is therefore written for
those who write workflows.

    registry    tools by name               calling    what a tool is told, and says
    place       what tools ask of a store   toolbox    tools without a workflow
    storage     files                       workflow   waits, approvals, webhooks
    llm         language models             shell      commands
"""

from workflows.tools.calling import Calling, Waiting
from workflows.tools.place import Place
from workflows.tools.registry import Registry, Tool, built_in, default_registry, raw

__all__ = [
    "Calling",
    "Place",
    "Registry",
    "Tool",
    "Waiting",
    "built_in",
    "default_registry",
    "raw",
]
