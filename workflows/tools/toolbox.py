"""Tools without a workflow: called by a program, blocking where a step would sleep.

tools = Toolbox(place)
stored = tools.storage.store(name="report", data="…", content_type="text/plain")
url = tools.storage.get_url(stored["storage_ref"])
"""

from __future__ import annotations

import uuid
from typing import Any, final

from cas.config import Settings
from cas.references import DIRECT_RUN, check_segment
from workflows.tools.calling import Calling, Waiting
from workflows.tools.place import Place
from workflows.tools.registry import Registry, default_registry


@final
class Toolbox:
    """The tools of a registry at one place, for one run. Safe for threads."""

    def __init__(
        self,
        place: Place,
        *,
        run: str = DIRECT_RUN,
        actor: str = "",
        settings: Settings | None = None,
        registry: Registry | None = None,
    ) -> None:
        """`settings` are those of this process, also where the place is remote: they say what
        language model is asked, and whether commands may run here. Raises InvalidName."""
        self._place = place
        self._run = check_segment(run, "run")
        self._actor = actor
        self._settings = settings or Settings()
        self._registry = registry or default_registry()

    def call(self, tool: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call a tool by its name, and return its result, waiting for it where it must.

        Each call is a step of its own. Raises InvalidToolCall, ToolFailed, and what the place
        raises.
        """
        step = f"call-{uuid.uuid4().hex}"
        calling = Calling(
            self._place.tenant_id, self._run, step, self._place, self._settings, actor=self._actor
        )
        result = self._registry.tool(tool)(calling, *args, **kwargs)
        if not isinstance(result, Waiting):
            return result
        claimed = self._place.wait(
            result.event_name, result.correlation_key, result.timeout_s, run=self._run
        )
        return result.result(claimed)

    def __getattr__(self, family: str) -> _Named:
        if family.startswith("_"):
            raise AttributeError(family)
        return _Named(self, f"tools.{family}")


@final
class _Named:
    """The beginning of a tool's name, or all of it."""

    def __init__(self, toolbox: Toolbox, name: str) -> None:
        self._toolbox = toolbox
        self._name = name

    def __getattr__(self, part: str) -> _Named:
        if part.startswith("_"):
            raise AttributeError(part)
        return _Named(self._toolbox, f"{self._name}.{part}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._toolbox.call(self._name, *args, **kwargs)
