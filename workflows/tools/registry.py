"""The tools by the names that workflows call them.

The built-in ones are loaded when they are first called, or their arguments are looked at; the
libraries that they need are imported later still, so the door, which judges definitions, needs
none of them. More come from the entry points of the group `blobcask.tools`:

    [project.entry-points."blobcask.tools"]
    "tools.acme.translate" = "acme.blobcask:translate"

where `translate(calling, *args, **kwargs)` returns a JSON value or a `Waiting`. Only who calls
such a tool loads it, and `blobcask workflow tools`, which tells of it: whatever its package takes,
or needs around it, is the runner's matter. So nobody else knows its arguments.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Final, TypeVar, final

from cas.config import Settings
from cas.errors import InvalidToolCall, ToolFailed
from workflows.tools.calling import Calling

# fn(calling, *args, **kwargs) -> a JSON value, or a Waiting
ToolFunction = Callable[..., Any]
F = TypeVar("F", bound=ToolFunction)

GROUP: Final = "blobcask.tools"
BUILT_IN: Final[Mapping[str, str]] = {
    "tools.storage.store": "workflows.tools.storage:store",
    "tools.storage.retrieve": "workflows.tools.storage:retrieve",
    "tools.storage.get_url": "workflows.tools.storage:get_url",
    "tools.storage.delete": "workflows.tools.storage:delete",
    "tools.storage.request_upload": "workflows.tools.storage:request_upload",
    "tools.workflow.wait_for_event": "workflows.tools.workflow:wait_for_event",
    "tools.workflow.request_approval": "workflows.tools.workflow:request_approval",
    "tools.workflow.register_webhook": "workflows.tools.workflow:register_webhook",
    "tools.llm.call": "workflows.tools.llm:call",
    "tools.shell.run": "workflows.tools.shell:run",
}
SHELL: Final = "tools.shell.run"
SHELL_BARRED: Final = "not allowed here: the operator sets [workflows] allow_shell = yes"
_NAME: Final = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+", re.ASCII)
_RAW: Final = "blobcask_raw"


def raw(function: F) -> F:
    """Mark a tool that is given its arguments with the templates still in them, and fills
    them in itself by `calling.render`: where that must happen after something else."""
    setattr(function, _RAW, True)
    return function


@final
class Tool:
    """One tool under its name; its function is loaded at the first use. Safe for threads."""

    def __init__(
        self, name: str, load: Callable[[], ToolFunction], *, foreign: bool = False
    ) -> None:
        """`foreign`: another package's, which is loaded by who calls it and nobody else."""
        self.name = name
        self.foreign = foreign
        self._load = load
        self._function: ToolFunction | None = None
        self._signature: inspect.Signature | None = None

    @property
    def function(self) -> ToolFunction:
        """Raises ToolFailed where it cannot be loaded."""
        if self._function is None:
            try:
                self._function = self._load()  # twice at worst, with the same outcome
            except (ImportError, AttributeError) as error:
                raise ToolFailed(self.name, f"cannot be loaded: {error}") from error
        return self._function

    @property
    def raw(self) -> bool:
        """Whether it takes its arguments before their templates are filled in."""
        return bool(getattr(self.function, _RAW, False))

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise InvalidToolCall unless the tool can be called so; looks at no value."""
        if self._signature is None:
            self._signature = inspect.signature(self.function)
        try:
            self._signature.bind(None, *args, **kwargs)
        except TypeError as error:
            reason = f"{error}; it is called with {arguments(self._signature)}"
            raise InvalidToolCall(self.name, reason) from None

    def __call__(self, calling: Calling, *args: Any, **kwargs: Any) -> Any:
        """A JSON value, or a `Waiting`.

        Raises InvalidToolCall for arguments it does not take, ToolFailed, and what the place
        it works at raises.
        """
        self.check(args, kwargs)
        return self.function(calling, *args, **kwargs)


@final
class Registry:
    """Tools by name. Filled before it is used, and safe for threads then."""

    def __init__(self) -> None:
        self._tools: dict[str, Tool] = {}

    def add(self, name: str, function: ToolFunction) -> None:
        """Take a tool; raises ValueError for a name that is taken or is none."""
        self.add_lazily(name, lambda: function)

    def add_lazily(
        self, name: str, load: Callable[[], ToolFunction], *, foreign: bool = False
    ) -> None:
        """Take a tool that is loaded when it is needed, a `foreign` one when it is called; raises
        as `add`."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a tool, such as tools.acme.translate")
        if name in self._tools:
            # Which of the two a workflow calls must not hang on the order of installation.
            raise ValueError(f"there is a tool {name!r} already")
        self._tools[name] = Tool(name, load, foreign=foreign)

    def tool(self, name: str) -> Tool:
        """The tool of this name; raises InvalidToolCall."""
        found = self._tools.get(name)
        if found is None:
            raise InvalidToolCall(name, f"no such tool; there are {', '.join(self.names)}")
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._tools

    @property
    def names(self) -> list[str]:
        return sorted(self._tools)


def built_in() -> Registry:
    """A registry of the tools that come with blobcask, to which more can be added."""
    registry = Registry()
    for name, where in BUILT_IN.items():
        registry.add_lazily(name, _loader(where))
    return registry


def installed() -> Registry:
    """The built-in tools and those of the entry points of what is installed.

    Raises ValueError where an installed package brings a tool whose name is taken.
    """
    registry = built_in()
    for point in entry_points(group=GROUP):
        registry.add_lazily(point.name, point.load, foreign=True)
    return registry


@cache
def default_registry() -> Registry:
    """What is installed, looked up once a process; raises as `installed`."""
    return installed()


def barred(settings: Settings) -> dict[str, str]:
    """The tools that are there and may not be called under these settings, each with the reason.
    Who takes a workflow asks, so that nobody has done his part by the time it is refused."""
    return {} if settings.workflows.allow_shell else {SHELL: SHELL_BARRED}


def arguments(signature: inspect.Signature) -> str:
    """What a tool takes, as Python writes it: (name, data, content_type=None)."""
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in list(signature.parameters.values())[1:]  # without `calling`
    ]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _loader(where: str) -> Callable[[], ToolFunction]:
    module, _, name = where.partition(":")

    def load() -> ToolFunction:
        function: ToolFunction = getattr(importlib.import_module(module), name)
        return function

    return load
