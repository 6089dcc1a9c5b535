"""A run as somebody sees who looks at it: its steps, and what they came to."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any, Final, final
from urllib.parse import quote, urlencode

import msgspec

from cas.catalog import Catalog, Snapshot
from cas.endings import step_as_of
from cas.errors import NotFound
from cas.listing import PAGE_BYTES_MAX, PAGE_MAX, Page
from cas.records import COMPLETED, RESULT, SHOWN, Run, RunText, Step
from workflows import step_values
from workflows.definitions import Definition

# Told to somebody who looks at a run: of one value, and of all together.
TOLD_BYTES_MAX: Final = 1 << 20
TOLD_IN_ALL_BYTES_MAX: Final = 1 << 20
# Steps that are told with their run; all of them are told in pages.
STEPS_TOLD_MAX: Final = 1000

# A value that is passed on as the JSON that it is kept as: of plain values each small one takes 25
# times its text. Or what is told in place of a large one.
Told = msgspec.Raw | dict[str, Any]


@final
class RunView:
    """A run, and its steps and what they came to as they are when they are asked for."""

    def __init__(self, catalog: Catalog, run: Run) -> None:
        self._catalog = catalog
        self.run = run

    def __repr__(self) -> str:
        return f"RunView({self.run.status!r}, {self.run.error!r}, {self.steps!r})"

    @cached_property
    def text(self) -> RunText:
        """What it was asked to do. Raises NotFound where it was forgotten meanwhile."""
        with self._catalog.read() as snapshot:
            return text_of(snapshot, self.run.run_id)

    @cached_property
    def inputs(self) -> dict[str, msgspec.Raw]:
        """What it was given, each as JSON; raises NotFound, as `text`."""
        return msgspec.json.decode(self.text.inputs, type=dict[str, msgspec.Raw])

    @cached_property
    def steps(self) -> list[Step]:
        """All of them, in the order in which they began."""
        with self._catalog.read() as snapshot:
            found = steps_of(snapshot, self.run.run_id)
        return [step_as_of(self.run, step) for step in found]

    @cached_property
    def steps_told(self) -> list[Step]:
        """Those that are told with the run: of more than STEPS_TOLD_MAX those outside of loops,
        and of those in loops the ones that began last."""
        in_loops = sum(1 for step in self.steps if step.iteration)
        left_out = min(in_loops, len(self.steps) - STEPS_TOLD_MAX)
        told = []
        for step in self.steps:
            if step.iteration and left_out > 0:
                left_out -= 1
            else:
                told.append(step)
        return told

    def page(self, cursor: str | None, limit: int) -> Page[Step]:
        """Up to `limit` steps by their names and iterations, from the one on that comes after
        what `cursor` names; fewer where they are long with the values that are told with them
        (PAGE_BYTES_MAX), but one at least where there is any."""
        limit = max(1, min(limit, PAGE_MAX))
        step_id, _, iteration = (cursor or "").partition(":")  # no name of a step has one
        after = () if cursor is None else (step_id, iteration)
        with self._catalog.read() as snapshot:
            run = (self.run.run_id,)
            found = snapshot.range(
                Step, "", run, after=after, limit=limit, bytes_max=PAGE_BYTES_MAX
            )
            shown = _told_together([step_as_of(self.run, step) for step in found])
            after = (shown[-1].step_id, shown[-1].iteration) if shown else after
            more = bool(shown and snapshot.range(Step, "", run, after=after, limit=1))
        return Page(shown, ":".join(after) if more else None)

    def step(self, step_id: str, iteration: str = "") -> Step | None:
        """One of them, as it is now; None before it began."""
        with self._catalog.read() as snapshot:
            found = snapshot.get(Step, self.run.run_id, step_id, iteration)
        return None if found is None else step_as_of(self.run, found)

    def result(self, step_id: str, iteration: str = "") -> bytes:
        """JSON: what a step came to, whole, however large it is. It never changes.

        Raises NotFound for a step that is not there, has not come to anything, or was forgotten.
        """
        step = self.step(step_id, iteration)
        found = None
        if step is not None and step.status == COMPLETED:
            found = self.value(step)
        if found is None:
            raise NotFound("result of step", step_id)
        return found

    def value(self, step: Step) -> bytes | None:
        """JSON: the result of a step or, before there is one, what it shows to others."""
        if step.value_bytes is None:
            return None
        kind = RESULT if step.status == COMPLETED else SHOWN
        with self._catalog.read() as snapshot:
            return step_values.value(snapshot, step.run_id, kind, step.step_id, step.iteration)

    @cached_property
    def told(self) -> dict[tuple[str, str], Told]:
        """What is told with the run: see `told_among`."""
        return self.told_among(self.steps_told)

    def told_among(self, steps: Iterable[Step]) -> dict[tuple[str, str], Told]:
        """The values of those that have any, each under the step's name and iteration. Of one
        that is too large to be told, or where there are too many, see `told_of`."""
        told = {}
        left = TOLD_IN_ALL_BYTES_MAX
        # Those in loops last: what a loop came to has theirs.
        for step in sorted(steps, key=lambda step: bool(step.iteration)):
            size_bytes = step.value_bytes
            if size_bytes is None:
                continue
            bytes_max = min(left, TOLD_BYTES_MAX)
            value = self.told_of(step, bytes_max)
            if value is not None:
                told[step.step_id, step.iteration] = value
                left -= size_bytes if size_bytes <= bytes_max else 0
        return told

    def told_of(self, step: Step, bytes_max: int = TOLD_BYTES_MAX) -> Told | None:
        """The value of a step; None where it has none. In place of one of more than
        `bytes_max`, how large it is and, of a result, where it is read whole."""
        if step.value_bytes is None:
            return None
        if step.value_bytes <= bytes_max:
            raw = self.value(step)
            # None: it was what the step showed, which is over.
            return None if raw is None else msgspec.Raw(raw)
        instead: dict[str, Any] = {"truncated": True, "size_bytes": step.value_bytes}
        if step.status == COMPLETED:
            instead["result_url"] = result_path(step)
        return instead

    @property
    def variables(self) -> dict[str, Any]:
        """`variables_told`, as plain values."""
        found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self.variables_told))
        return found

    @property
    def variables_told(self) -> dict[str, Any]:
        """What is known by name: the inputs, and for each step outside of loops its result,
        under its `result_key` where it has one, else under its own name. For each foreach
        `{"results": [...], "count": n}`, in the order of its items. Of a step that waits, what
        it shows to others, unless something else has that name."""
        definition = Definition.from_json(self.text.definition)
        known: dict[str, Any] = dict(definition.variables)
        known |= self.inputs
        keys = {
            task.task_id: task.result_key or task.task_id
            for task in definition.everything(loops=False)
        }
        shown: dict[str, Any] = {}
        for step in self.steps:
            name = (step.step_id, step.iteration)
            if step.iteration or name not in self.told:
                continue
            found = known if step.status == COMPLETED else shown
            found[keys.get(step.step_id, step.step_id)] = self.told[name]
        return shown | known


def result_path(step: Step) -> str:
    """Where the gateway tells what a step came to."""
    # Without a slash: no name of a step has one.
    path = f"/api/v1/workflows/{step.run_id}/steps/{quote(step.step_id, safe='')}/result"
    return f"{path}?{urlencode({'iteration': step.iteration})}" if step.iteration else path


def _told_together(steps: list[Step]) -> list[Step]:
    """The first of `steps`, at least one, that fit on a page with their values."""
    size_bytes = 0
    for count, step in enumerate(steps):
        value_bytes = step.value_bytes or 0
        # In place of a larger value little is told.
        size_bytes += value_bytes if value_bytes <= TOLD_BYTES_MAX else 0
        size_bytes += len(step.error)
        if count and size_bytes > PAGE_BYTES_MAX:
            return steps[:count]
    return steps


def text_of(snapshot: Snapshot, run_id: str) -> RunText:
    found = snapshot.get(RunText, run_id)
    if found is None:
        raise NotFound("run", run_id)
    return found


def steps_of(snapshot: Snapshot, run_id: str) -> list[Step]:
    """The steps of a run in the order in which they began."""
    found: list[Step] = []
    after: tuple[str, ...] = ()
    while page := snapshot.range(Step, "", (run_id,), after=after, limit=PAGE_MAX):
        found += page
        after = (page[-1].step_id, page[-1].iteration)
    return sorted(found, key=lambda step: step.started_at)
