"""Scope: what the templates of one step see.

The inputs and results of the run; inside of a loop also `item`, `index` (from 0), `loop` and
the results of the same item's tasks, the inner loop's before the outer one's. Under a name that
has no value otherwise, what a step shows that waits; and last the run itself, as `run_id`.

A value is read when a template names it: of all that a run knows, most templates name little.
What is only asked for (`is defined`) is not read.

As objects of Python a result takes up to 45 times the bytes that it has as JSON, and results of a
run have up to 64 MiB. So what one step's templates read has a limit, and only a few steps fill in
theirs at a time, which costs nobody anything: it is work under the interpreter's lock. The runner
takes so much for it at most, READING_AT_ONCE times:

    READ_BYTES_MAX              what they read, as objects
    16 MiB                      the JSON of it, while it is read
    45 MiB                      the inputs (1 MiB of JSON over HTTP), as objects
    16 to 128 MiB               what they give (`templates.RENDERED_BYTES_MAX`): a text may take
                                four bytes a character, and is there twice while it is made

What a tool is given it has for as long as it works; all else is let go of before it is called.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Self, final

import msgspec

from cas.errors import InvalidWorkflow
from cas.records import COMPLETED, RUNNING, WAITING, Step
from workflows import templates
from workflows.definitions import Task
from workflows.engine.plan import OF_ITEMS, RUN_ID, Plan
from workflows.engine.spots import Spot, inside, outside
from workflows.run_log import RunLog

READ_BYTES_MAX: Final = 32 << 20  # of all that the templates of one step read, as objects
READING_AT_ONCE: Final = 2  # steps

# What the objects take that such a byte of JSON stands for, measured and rounded up.
_OBJECT_BYTES: Final = {b"[": 90, b"{": 130, b":": 60, b",": 60}
_NO_ASCII_BYTES: Final = 26  # more for a text that is no ASCII
_CLOSE_BYTES: Final = 1 << 20  # from so much on it is looked at more closely, which takes longer
_TEXT: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"')
_FOUR_BYTES: Final = re.compile(rb"[\xf0-\xf4]")  # a text with one of these takes four a character,
_TWO_BYTES: Final = re.compile(rb"[\xc4-\xef]")  # with one of these two

_places: Final = threading.BoundedSemaphore(READING_AT_ONCE)


@final
@dataclass(frozen=True, slots=True)
class _Level:
    """The run, or one item of a loop in it."""

    name: str  # "" or the loop's
    iteration: str  # its tasks'
    number: int = 0  # of the item


@final
class Scope(Mapping[str, Any]):
    """What the step at a spot sees, by name.

    Templates are filled in while it is entered, which waits for its turn; afterwards it keeps
    nothing. Raises InvalidWorkflow for a value that would make it more than READ_BYTES_MAX.
    """

    def __init__(self, plan: Plan, log: RunLog, spot: Spot) -> None:
        self._plan = plan
        self._log = log
        self._left_bytes = READ_BYTES_MAX
        self._found: dict[str, Any] = {}
        self._given: dict[str, Any] | None = None  # inputs and variables
        self._levels = [_Level("", "")]
        numbers = [int(number) for number in spot.iteration.split(".")] if spot.iteration else []
        for loop, number in zip(plan.loops_around(spot.task), numbers, strict=True):
            iteration = inside(self._levels[-1].iteration, number)
            self._levels.append(_Level(loop.task_id, iteration, number))

    def __enter__(self) -> Self:
        _places.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self._left_bytes = READ_BYTES_MAX
        self._found.clear()
        self._given = None
        _places.release()

    def __getitem__(self, name: str) -> Any:
        if name not in self._found:
            read = self._reader(name)
            if read is None:
                raise KeyError(name)
            self._found[name] = read()
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._found or (isinstance(name, str) and self._reader(name) is not None)

    def __iter__(self) -> Iterator[str]:
        names = {RUN_ID, *self._inputs}
        for level in self._levels:
            names |= self._plan.named(level.name).keys()
            names |= set(OF_ITEMS) if level.name else set()
        return (name for name in names if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _reader(self, name: str) -> Callable[[], Any] | None:
        """What reads the value with this name; None where nothing has it."""
        log = self._log
        for level in reversed(self._levels):
            step = self._step(level, name, (COMPLETED,))
            if step is not None:
                return partial(self._read, name, log.result, step.step_id, step.iteration)
            if level.name and name in OF_ITEMS:
                return partial(self._of_item, level, name)
        if name in self._inputs:
            return partial(self._inputs.get, name)
        for level in reversed(self._levels):
            step = self._step(level, name, (WAITING, RUNNING))
            if step is not None:
                return partial(self._read, name, log.shown, step.step_id, step.iteration)
        return (lambda: log.run_id) if name == RUN_ID else None

    def _step(self, level: _Level, name: str, states: tuple[str, ...]) -> Step | None:
        """The step whose value has this name: of several, the one that began last."""
        tasks = self._plan.named(level.name).get(name, ())
        steps = [self._log.step(task, level.iteration) for task in tasks]
        found = [
            step
            for step in steps
            if step is not None and step.status in states and step.value_bytes is not None
        ]
        return max(found, key=lambda step: (step.started_at, step.step_id), default=None)

    def _of_item(self, level: _Level, name: str) -> Any:
        if name == "index":
            return level.number
        if name == "item":
            return self._read(name, self._log.item, level.name, level.iteration)
        count = self._log.items(level.name, outside(level.iteration))
        return {"index0": level.number, "index": level.number + 1, "length": count}

    def _read(
        self, name: str, read: Callable[[str, str], bytes | None], of: str, iteration: str
    ) -> Any:
        raw = read(of, iteration)
        if raw is None:
            return None
        takes_bytes = _object_bytes(raw)
        if takes_bytes > self._left_bytes:
            reason = (
                f"its {len(raw)} bytes take some {takes_bytes} as objects, and what one step reads "
                f"may take {READ_BYTES_MAX}; store it as a file"
            )
            raise InvalidWorkflow(name, reason)
        self._left_bytes -= takes_bytes
        return msgspec.json.decode(raw)

    @property
    def _inputs(self) -> dict[str, Any]:
        if self._given is None:
            given: dict[str, Any] = msgspec.json.decode(self._log.text().inputs)
            self._given = {**self._plan.definition.variables, **given}
        return self._given


def items_of(loop: Task, known: Scope) -> list[Any]:
    """The items of a foreach. Raises InvalidWorkflow where they are no list."""
    with known:
        items = templates.render(loop.items, known)
    if isinstance(items, str) and items.lstrip().startswith("["):
        try:
            items = msgspec.json.decode(items)
        except msgspec.DecodeError:
            pass
    if not isinstance(items, list):
        kind = type(items).__name__
        raise InvalidWorkflow(loop.task_id, f"its items are no list but a {kind}")
    return items


def _object_bytes(raw: bytes) -> int:
    """What a value takes that is read from JSON, rather too much than too little."""
    wide, texts_bytes = 1, 0
    if not raw.isascii():
        wide = 4 if _FOUR_BYTES.search(raw) else 2 if _TWO_BYTES.search(raw) else 1
    if b"\\u" in raw or not raw.isascii():
        texts_bytes = raw.count(b'"') // 2 * _NO_ASCII_BYTES
    structure_bytes = _structure_bytes(raw)
    if structure_bytes > _CLOSE_BYTES:  # what stands in a text is none: it may be JSON itself
        structure_bytes = _structure_bytes(_TEXT.sub(b"", raw))
    return len(raw) * wide + texts_bytes + structure_bytes


def _structure_bytes(raw: bytes) -> int:
    return sum(raw.count(mark) * size_bytes for mark, size_bytes in _OBJECT_BYTES.items())
