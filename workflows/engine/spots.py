"""Spots: one step of one run, by name."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self, final

# What a stage is for. A parallel has two: it begins with its FORK, and its own one closes it.
STEP: Final = "step"
FORK: Final = "fork"
END: Final = "end"  # of a whole level: the run, or one item of a loop; `task` is then the loop

TIMER: Final = "!time"  # after a step's name: the wait for the end of its time


@final
@dataclass(frozen=True, slots=True)
class Spot:
    """A step of a run. Its texts are the identifiers that stabilize knows it by: the same ones
    whenever they are made, so that a doorbell needs to look nothing up."""

    run: str
    task: str  # "" with END: the run as a whole
    iteration: str = ""  # as in `cas.records.Step`
    role: str = STEP

    @classmethod
    def of(cls, context: Mapping[str, Any]) -> Self:
        """What `context` made."""
        return cls(context["run"], context["task"], context["iteration"], context["role"])

    @property
    def context(self) -> dict[str, Any]:
        """As a stage keeps it."""
        return {
            "run": self.run,
            "task": self.task,
            "iteration": self.iteration,
            "role": self.role,
        }

    @property
    def step(self) -> str:
        """The step with its iteration, as waits and keys name it: "sum", "sum#2"."""
        return f"{self.task}#{self.iteration}" if self.iteration else self.task

    @property
    def waits(self) -> tuple[str, str]:
        """The names of the waits that the step may have."""
        return self.step, self.step + TIMER

    @property
    def stage_id(self) -> str:
        return _short(f"{self.run}/{self.task}#{self.iteration}!{self.role}")

    @property
    def item(self) -> int:
        """Of an iteration, the number of the innermost loop's item."""
        return int(self.iteration.rpartition(".")[2])


def inside(iteration: str, item: int) -> str:
    """The iteration of a loop's item, where the loop itself has `iteration`."""
    return f"{iteration}.{item}" if iteration else str(item)


def outside(iteration: str) -> str:
    """The iteration of the loop, where its item has `iteration`."""
    return iteration.rpartition(".")[0]


@final
@dataclass(frozen=True, slots=True)
class Execution:
    """What stabilize carries as one: a run (`level` ""), or one item of a loop in it."""

    run: str
    level: str = ""
    iteration: str = ""

    @property
    def name(self) -> str:
        return f"{self.run}/{self.level}#{self.iteration}"

    @property
    def identifier(self) -> str:
        return _short(self.name)

    @classmethod
    def parse(cls, name: str) -> Self:
        """What `name` says."""
        run, _, rest = name.partition("/")
        level, _, iteration = rest.rpartition("#")
        return cls(run, level, iteration)


def waits_of(task: str, iteration: str) -> tuple[str, str]:
    """The names of the waits that a step may have."""
    return Spot("", task, iteration).waits


def parsed_step(step: str) -> tuple[str, str]:
    """Task and iteration of a `Spot.step`."""
    task, _, iteration = step.partition("#")
    return task, iteration


def _short(name: str) -> str:
    """An identifier as long as stabilize takes: 26 characters, 130 bits."""
    digest = hashlib.sha256(name.encode()).digest()
    return base64.b32encode(digest)[:26].decode()
