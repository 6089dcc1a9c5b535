"""What a tool is told when it is called, and what it says when it has to wait."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from cas.config import Settings
from cas.errors import ToolFailed
from cas.once import OnceKey, step_key
from workflows.events import Claimed
from workflows.tools.place import Place


def _as_it_is(text: str) -> Any:
    return text


@final
@dataclass(frozen=True, slots=True)
class Calling:
    """One call of a tool by one step of a run. A step that is begun again after a crash makes
    the same call, with the same `key`s."""

    tenant_id: str
    run: str
    step: str  # the task's name
    place: Place
    settings: Settings = field(default_factory=Settings)
    iteration: str = ""  # "" outside of loops, else as in `cas.records.Step`
    actor: str = ""
    attempt: int = 1
    # The step's time: what the call comes to later is dropped, so a tool that can end what it
    # has begun ends it then.
    timeout_s: float | None = None
    # Fills in the templates of a text, which gives a value where the text is one template. Only
    # tools that are `raw` need it: those of all others are filled in before.
    render: Callable[[str], Any] = _as_it_is

    @property
    def step_name(self) -> str:
        """The step with its iteration, such as "sum#2": the name of its waits and keys."""
        return f"{self.step}#{self.iteration}" if self.iteration else self.step

    def key(self, what: str) -> OnceKey:
        """The key by which this step does `what` once, however often it is begun."""
        return step_key(self.run, self.step_name, what)


def _payload_of(claimed: Claimed) -> Any:
    return claimed.payload


@final
@dataclass(frozen=True, slots=True)
class Waiting:
    """A tool's answer when its result is still to come: with an event.

    The step sleeps until then, without a thread. A runner that was killed meanwhile calls the
    tool again and gets an equal one.
    """

    tool: str
    event_name: str
    correlation_key: str | None = None
    timeout_s: float | None = None  # None: as long as it takes
    # What others need to let the step go on, such as a link; they see it while it waits.
    shown: Mapping[str, Any] | None = None
    # Makes the step's result of the event, which there is; raises ToolFailed.
    then: Callable[[Claimed], Any] = _payload_of

    def result(self, claimed: Claimed) -> Any:
        """The result of the step, once its wait is claimed.

        Raises ToolFailed where the time was over first, or where the event says that nothing
        more will come.
        """
        if claimed.event is None:
            after = "" if self.timeout_s is None else f" after {self.timeout_s:g} s"
            raise ToolFailed(self.tool, f"{self.event_name!r} did not come: timed out{after}")
        return self.then(claimed)
