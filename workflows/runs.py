"""Runs of workflows as the catalog has them: what was asked for, and what came of each step.

These records are the whole truth of a run. The engine below (`workflows.engine`) keeps a
database of its own, to know what comes next; it may be deleted at any time, for a run begins
there again and finds the results of its finished steps here.

    queued → running ⇄ waiting → completed | failed | cancelled

A step runs at least once, and is finished once (invariant 14): `begin` tells of a step that was
finished before, and only the first `finish` counts. What it came to is kept apart from it and
read by who needs it: the steps of a run are many, and a change of one of them must cost no more
for that, since nobody else writes meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, Final, TypeVar, final
from urllib.parse import quote, urlencode

import msgspec
from msgspec import UNSET

from cas.catalog import Catalog, Snapshot, Transaction
from cas.clock import DAY_US
from cas.endings import end, let_go, step_as_of
from cas.errors import (
    BlobcaskError,
    CatalogClosed,
    CatalogFailed,
    NotFound,
    RunEnded,
    ToolFailed,
    TooManyRuns,
)
from cas.events import REMEMBERED_US, drop, subscription_id
from cas.identifiers import new_id
from cas.listing import PAGE_MAX, Page, newest, own
from cas.once import OnceKey, once
from cas.records import (
    CANCELLED,
    COMPLETED,
    FAILED,
    FULL,
    ITEM,
    ITEMS,
    QUEUED,
    RESULT,
    RUNNING,
    SHOWN,
    SKIPPED,
    WAITING,
    Run,
    RunText,
    Step,
    StepValue,
    Subscription,
)
from cas.references import check_segment
from cas.totals import items_of, open_runs_of, values_of
from workflows.definitions import Definition

_ERROR_CHARS_MAX: Final = 2000
ENDED: Final = (COMPLETED, FAILED, CANCELLED)


# Of all results of a run together, and what else is kept beside its steps. What is larger
# belongs into files: these are in the index and in the journal, and are read as a whole.
VALUES_BYTES_MAX: Final = 64 << 20
# Of all loops of a run together, since loops may be in loops. A step costs 9 ms of processor
# time: so many items are a quarter of an hour's work at least, and some seconds' to end.
ITEMS_MAX: Final = 100_000
# Told to somebody who looks at a run: of one value, and of all together.
TOLD_BYTES_MAX: Final = 1 << 20
TOLD_IN_ALL_BYTES_MAX: Final = 8 << 20
# Steps that are told with their run; all of them are told in pages.
STEPS_TOLD_MAX: Final = 1000
_ITEMS_AT_ONCE: Final = 500  # written in one transaction
_PAGE: Final = 100  # results read at once

_log = logging.getLogger(__name__)


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
            return _text_of(snapshot, self.run.run_id)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What it was given; raises NotFound, as `text`."""
        found: dict[str, Any] = msgspec.json.decode(self.text.inputs)
        return found

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
        what `cursor` names."""
        limit = max(1, min(limit, PAGE_MAX))
        step_id, _, iteration = (cursor or "").partition(":")  # no name of a step has one
        after = () if cursor is None else (step_id, iteration)
        with self._catalog.read() as snapshot:
            found = snapshot.range(Step, "", (self.run.run_id,), after=after, limit=limit + 1)
        found = [step_as_of(self.run, step) for step in found]
        if len(found) <= limit:
            return Page(found, None)
        del found[limit:]
        return Page(found, f"{found[-1].step_id}:{found[-1].iteration}")

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
            return _value(snapshot, step.run_id, kind, step.step_id, step.iteration)

    @cached_property
    def told(self) -> dict[tuple[str, str], Any]:
        """What is told with the run: see `told_among`."""
        return self.told_among(self.steps_told)

    def told_among(self, steps: Iterable[Step]) -> dict[tuple[str, str], Any]:
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
            if value is not UNSET:
                told[step.step_id, step.iteration] = value
                left -= size_bytes if size_bytes <= bytes_max else 0
        return told

    def told_of(self, step: Step, bytes_max: int = TOLD_BYTES_MAX) -> Any:
        """The value of a step; UNSET where it has none. In place of one of more than
        `bytes_max`, how large it is and, of a result, where it is read whole."""
        if step.value_bytes is None:
            return UNSET
        if step.value_bytes <= bytes_max:
            raw = self.value(step)
            # None: it was what the step showed, which is over.
            return UNSET if raw is None else msgspec.json.decode(raw)
        instead: dict[str, Any] = {"truncated": True, "size_bytes": step.value_bytes}
        if step.status == COMPLETED:
            instead["result_url"] = result_path(step)
        return instead

    @property
    def variables(self) -> dict[str, Any]:
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


@final
class Runs:
    """The runs of one tenant. Safe for threads."""

    def __init__(
        self,
        catalog: Catalog,
        *,
        tenant_id: str,
        actor: str,
        request_id: str,
        keep_us: int = 30 * DAY_US,
        events_keep_us: int = REMEMBERED_US,
        open_max: int = 0,
    ) -> None:
        """`keep_us`: how long a run is remembered that is cancelled here, `events_keep_us`: what
        tells of what ends with it (`[events] keep`); `open_max`: how many may be open at once,
        0: any number."""
        self._catalog = catalog
        self._keep_us = keep_us
        self._events_keep_us = events_keep_us
        self._open_max = open_max
        self._tenant_id = check_segment(tenant_id, "tenant")
        self._actor = actor
        self._request_id = request_id

    def submit(
        self, definition: Definition, inputs: Mapping[str, Any], key: OnceKey | None = None
    ) -> Run:
        """Record a run, to be begun by the runner; durable on return. With a `key`, once.

        Raises KeyReused; TooManyRuns, unless the key's run is there; InvalidWorkflow where it
        would wait until a time that no wait lasts to.
        """
        text, given = definition.to_json(), msgspec.json.encode(dict(inputs))

        def change(txn: Transaction) -> Run:
            def insert() -> str:
                definition.check_times(txn.now_us)
                open_runs = open_runs_of(txn, self._tenant_id)
                if 0 < self._open_max <= open_runs:
                    raise TooManyRuns(self._open_max, open_runs)
                run = Run(
                    new_id(txn.now_us),
                    self._tenant_id,
                    definition.name,
                    QUEUED,
                    txn.now_us,
                    self._actor,
                )
                txn.insert(run)
                txn.insert(RunText(run.run_id, text, given))
                return run.run_id

            run_id, _ = once(txn, self._tenant_id, key, insert)
            return self._own(txn, run_id)

        return self._catalog.write(change, actor=self._actor, request_id=self._request_id)

    def get(self, run_id: str) -> RunView:
        """A run with its steps; raises NotFound, also for another tenant's."""
        with self._catalog.read() as snapshot:
            return RunView(self._catalog, self._own(snapshot, run_id))

    def list(
        self, *, status: str | None = None, cursor: str | None = None, limit: int = 100
    ) -> Page[Run]:
        """A page of runs, newest first."""
        index = "tenant" if status is None else "status"
        prefix = (self._tenant_id,) if status is None else (self._tenant_id, status)
        with self._catalog.read() as snapshot:
            return newest(snapshot, Run, index, prefix, cursor, limit)

    def cancel(self, run_id: str) -> Run:
        """End a run; steps that run at this moment end, and their results are dropped.

        It has ended, durably, before the rest of what ends with it. Raises NotFound, RunEnded.
        """

        def change(txn: Transaction) -> Run:
            run = self._own(txn, run_id)
            if run.status in ENDED:
                raise RunEnded(run.status)
            return _end(txn, run, CANCELLED, "", self._keep_us, self._events_keep_us)

        run = self._catalog.write(change, actor=self._actor, request_id=self._request_id)
        return _let_go(self._catalog, run, self._actor, self._events_keep_us)

    def _own(self, snapshot: Snapshot, run_id: str) -> Run:
        run = own(snapshot, Run, self._tenant_id, run_id)
        if run is None:
            raise NotFound("run", run_id)
        return run


@final
class RunLog:
    """One run as the runner writes it. Every method is durable on return."""

    def __init__(
        self,
        catalog: Catalog,
        run_id: str,
        keep_us: int = 30 * DAY_US,
        events_keep_us: int = REMEMBERED_US,
    ) -> None:
        """`keep_us` and `events_keep_us`: see `Runs`."""
        self._catalog = catalog
        self._keep_us = keep_us
        self._events_keep_us = events_keep_us
        self.run_id = run_id
        self.actor = f"run:{run_id}"

    def read(self) -> RunView:
        """The run and its steps as they are; raises NotFound."""
        with self._catalog.read() as snapshot:
            run = snapshot.get(Run, self.run_id)
            if run is None:
                raise NotFound("run", self.run_id)
            return RunView(self._catalog, run)

    def text(self) -> RunText:
        """What the run was asked to do; raises NotFound."""
        with self._catalog.read() as snapshot:
            return _text_of(snapshot, self.run_id)

    def step(self, step_id: str, iteration: str = "") -> Step | None:
        """A step as it is now; None before it began."""
        with self._catalog.read() as snapshot:
            return snapshot.get(Step, self.run_id, step_id, iteration)

    def result(self, step_id: str, iteration: str = "") -> bytes | None:
        """JSON: what a step came to; None unless it is completed."""
        with self._catalog.read() as snapshot:
            return _value(snapshot, self.run_id, RESULT, step_id, iteration)

    def shown(self, step_id: str, iteration: str = "") -> bytes | None:
        """JSON: what a step shows that waits."""
        with self._catalog.read() as snapshot:
            return _value(snapshot, self.run_id, SHOWN, step_id, iteration)

    def steps_within(self, step_id: str, iteration: str) -> list[Step]:
        """What there is of a step for each item of the loop that it names, or is directly in,
        which has `iteration`."""
        with self._catalog.read() as snapshot:
            return list(_within(snapshot, Step, (self.run_id, step_id), iteration))

    def results_within(self, step_id: str, iteration: str) -> dict[str, bytes]:
        """The results of a step, by iteration, for the items of the loop that it is in."""
        with self._catalog.read() as snapshot:
            found = _within(snapshot, StepValue, (self.run_id, RESULT, step_id), iteration)
            return {value.iteration: value.value for value in found}

    def item(self, loop: str, iteration: str) -> bytes | None:
        """JSON: what an item of a loop is; None where it has none."""
        with self._catalog.read() as snapshot:
            return _value(snapshot, self.run_id, ITEM, loop, iteration)

    def items(self, loop: str, iteration: str) -> int | None:
        """How many items a loop has; None before they are recorded."""
        with self._catalog.read() as snapshot:
            raw = _value(snapshot, self.run_id, ITEMS, loop, iteration)
        return None if raw is None else msgspec.json.decode(raw, type=int)

    def check_room(self, what: str) -> None:
        """Raise ToolFailed where this run has had a result refused because it has too many: what
        else is done for it would be done for nothing."""
        with self._catalog.read() as snapshot:
            if _value(snapshot, self.run_id, FULL, "", "") is not None:
                raise ToolFailed(
                    what,
                    f"not begun: the results of this run have reached {VALUES_BYTES_MAX} bytes",
                )

    def record_items(self, loop: str, iteration: str, items: list[Any]) -> None:
        """Keep what a loop goes over, from its beginning on: what its template says may change
        while it runs. Harmless to stop and to repeat: how many they are is written last.

        Raises RunEnded; ToolFailed where the run has too many results, or would have more than
        ITEMS_MAX items.
        """
        within = f"{iteration}." if iteration else ""
        values = [
            StepValue(self.run_id, ITEM, loop, f"{within}{number}", msgspec.json.encode(item))
            for number, item in enumerate(items)
        ]
        count = msgspec.json.encode(len(items))
        with self._catalog.read() as snapshot:
            # Those of an attempt that was stopped: they were written in their order.
            written = _within(snapshot, StepValue, (self.run_id, ITEM, loop), iteration)
            there = sum(1 for _ in written)
        for start in range(0, len(values), _ITEMS_AT_ONCE):
            more = len(items) - max(start, there)
            self._put_all(values[start : start + _ITEMS_AT_ONCE], loop, more)
        self._put_all([StepValue(self.run_id, ITEMS, loop, iteration, count)])

    def _put_all(self, values: list[StepValue], loop: str = "", more: int = 0) -> None:
        """Keep values: those of a loop where `more` items are to come, these included."""

        def change(txn: Transaction) -> None:
            self._open(txn)
            in_all = items_of(txn, self.run_id) + more
            if more and in_all > ITEMS_MAX:
                reason = f"the loops of this run would have {in_all} of {ITEMS_MAX} items together"
                raise ToolFailed(loop, reason)
            for value in values:
                _put(txn, value)

        self._write(change)

    def start(self) -> Run:
        """The runner has it; raises NotFound, RunEnded."""
        return self._change(
            lambda txn, run: (
                run
                if run.started_at is not None
                else msgspec.structs.replace(run, status=RUNNING, started_at=txn.now_us)
            )
        )

    def begin(self, step_id: str, iteration: str = "") -> Step:
        """A step begins (again). One that is finished is returned as it is, to be used; so is
        one that was cancelled.

        Raises RunEnded.
        """

        def change(txn: Transaction) -> Step:
            run = self._open(txn)
            found = txn.get(Step, self.run_id, step_id, iteration)
            if found is not None and found.status in (COMPLETED, SKIPPED, CANCELLED):
                return found
            if found is None:
                step = Step(self.run_id, step_id, iteration, RUNNING, 1, txn.now_us)
                txn.insert(step)
            else:
                step = msgspec.structs.replace(
                    found,
                    status=RUNNING,
                    # Waking from a wait is no further attempt.
                    attempts=found.attempts + (found.status != WAITING),
                    ended_at=None,
                    error="",
                    retry_at=None,
                )
                txn.replace(step)
            self._show(txn, run)
            return step

        return self._catalog.write(change, actor=self.actor)

    def wait(self, step_id: str, iteration: str, shown: Mapping[str, Any] | None = None) -> Step:
        """A step waits for somebody; `shown` is what others need to let it go on.

        Raises RunEnded; ToolFailed where the run has too many results.
        """
        raw = None if shown is None else msgspec.json.encode(dict(shown))
        return self._step(step_id, iteration, WAITING, SHOWN, raw)

    def finish(self, step_id: str, iteration: str, result: Any) -> Step:
        """A step is done; `result` is any JSON value, which may be a `msgspec.Raw`.

        Raises RunEnded; ToolFailed where the run would have more than VALUES_BYTES_MAX.
        """
        return self._step(step_id, iteration, COMPLETED, RESULT, msgspec.json.encode(result))

    def skip(self, step_id: str, iteration: str = "", why: str = "") -> Step:
        """A step that is left out: by a condition, or `why` something before it failed.

        Raises RunEnded.
        """

        def change(txn: Transaction) -> Step:
            self._open(txn)
            found = txn.get(Step, self.run_id, step_id, iteration)
            if found is not None:
                return found
            now_us = txn.now_us
            step = Step(
                self.run_id, step_id, iteration, SKIPPED, 0, now_us, ended_at=now_us, error=why
            )
            txn.insert(step)
            return step

        return self._catalog.write(change, actor=self.actor)

    def retry(self, step_id: str, iteration: str, error: str, delay_us: int) -> Step:
        """An attempt failed and another follows after `delay_us`; the error is shown until that
        begins. Both are counted from here on (invariant 14).

        Raises RunEnded.
        """
        return self._step(step_id, iteration, RUNNING, error=error, retry_us=delay_us)

    def fail(self, step_id: str, iteration: str, error: str) -> Step:
        """A step failed for good. Raises RunEnded."""
        return self._step(step_id, iteration, FAILED, error=error)

    def cancel_within(
        self,
        names: Iterable[str],
        iteration: str,
        waits_of: Callable[[str, str], Iterable[str]],
    ) -> None:
        """Of these steps, all inside of a loop that has `iteration` and is over: those that are
        at work or wait are cancelled, and what they wait for is over. `waits_of` tells the
        waits of a step. Harmless to stop and to repeat.

        Raises RunEnded.
        """
        names = list(names)
        after, before = _bounds(iteration)

        def going(snapshot: Snapshot) -> list[Step]:
            found: list[Step] = []
            for name in names:
                for status in (RUNNING, WAITING):
                    if len(found) < _ITEMS_AT_ONCE:
                        found += snapshot.range(
                            Step,
                            "status",
                            (self.run_id, status, name),
                            after=after,
                            before=before,
                            limit=_ITEMS_AT_ONCE,
                        )
            return found

        def change(txn: Transaction) -> bool:
            run = self._open(txn)
            found = going(txn)
            for step in found:
                for name in waits_of(step.step_id, step.iteration):
                    key = subscription_id(run.tenant_id, self.run_id, name)
                    wait = txn.get(Subscription, key)
                    if wait is not None and wait.claimed_at is None:
                        drop(txn, wait)
                _drop(txn, self.run_id, SHOWN, step.step_id, step.iteration)
                txn.replace(
                    msgspec.structs.replace(
                        step,
                        status=CANCELLED,
                        ended_at=txn.now_us,
                        value_bytes=None,
                        retry_at=None,
                    )
                )
            self._show(txn, run)
            return bool(found)

        with self._catalog.read() as snapshot:
            more = bool(going(snapshot))
        while more:
            more = self._catalog.write(change, actor=self.actor)

    def end(self, status: str, error: str = "") -> Run:
        """The run is completed or failed; one that has ended before stays as it is, and what
        ends with it is ended to the end."""

        def change(txn: Transaction) -> Run:
            run = txn.get(Run, self.run_id)
            if run is None:
                raise NotFound("run", self.run_id)
            if run.status in ENDED:
                return run
            error_kept = error[:_ERROR_CHARS_MAX]
            return _end(txn, run, status, error_kept, self._keep_us, self._events_keep_us)

        run = self._catalog.write(change, actor=self.actor)
        return _let_go(self._catalog, run, self.actor, self._events_keep_us)

    def _step(
        self,
        step_id: str,
        iteration: str,
        status: str,
        kind: str = "",
        value: bytes | None = None,
        error: str = "",
        retry_us: int | None = None,
    ) -> Step:
        """Change a step that has begun; `value` is what there is of it from now on."""

        def change(txn: Transaction) -> Step:
            run = self._open(txn)
            found = txn.get(Step, self.run_id, step_id, iteration)
            if found is None:
                raise NotFound("step", step_id)
            if found.status in (COMPLETED, SKIPPED, CANCELLED):
                return found  # only the first one counts
            if kind != SHOWN or value is None:
                _drop(txn, self.run_id, SHOWN, step_id, iteration)
            if value is not None:
                _put(txn, StepValue(self.run_id, kind, step_id, iteration, value))
            step = msgspec.structs.replace(
                found,
                status=status,
                ended_at=txn.now_us if status in (COMPLETED, FAILED) else None,
                value_bytes=None if value is None else len(value),
                error=error[:_ERROR_CHARS_MAX],
                failures=found.failures + (retry_us is not None),
                retry_at=None if retry_us is None else txn.now_us + retry_us,
            )
            txn.replace(step)
            self._show(txn, run)
            return step

        return self._write(change)

    def _write(self, change: Callable[[Transaction], T]) -> T:
        """Write values; what there is no room for is refused, and that is remembered."""
        try:
            return self._catalog.write(change, actor=self.actor)
        except _Full as full:

            def remember(txn: Transaction) -> None:
                self._open(txn)
                if _value(txn, self.run_id, FULL, "", "") is None:
                    txn.insert(StepValue(self.run_id, FULL, "", "", b"true"))

            self._catalog.write(remember, actor=self.actor)
            raise ToolFailed(full.step_id, full.reason) from None

    def _show(self, txn: Transaction, run: Run) -> None:
        """Keep the run's own status true: waiting where no step runs and one waits."""

        def any_is(status: str) -> bool:
            return bool(txn.range(Step, "status", (self.run_id, status), limit=1))

        status = WAITING if not any_is(RUNNING) and any_is(WAITING) else RUNNING
        if run.status != status:
            txn.replace(msgspec.structs.replace(run, status=status))

    def _change(self, act: Callable[[Transaction, Run], Run]) -> Run:
        def change(txn: Transaction) -> Run:
            run = self._open(txn)
            changed = act(txn, run)
            if changed != run:
                txn.replace(changed)
            return changed

        return self._catalog.write(change, actor=self.actor)

    def _open(self, snapshot: Snapshot) -> Run:
        run = snapshot.get(Run, self.run_id)
        if run is None:
            raise NotFound("run", self.run_id)
        if run.status in ENDED:
            raise RunEnded(run.status)
        return run


def _end(
    txn: Transaction, run: Run, status: str, error: str, keep_us: int, events_keep_us: int
) -> Run:
    ended = msgspec.structs.replace(
        run,
        status=status,
        error=error,
        open=None,
        ended_at=txn.now_us,
        forget_at=txn.now_us + keep_us,
        # A term is not counted from a time in doubt (invariant 10).
        undated_at=None if txn.believed else txn.now_us,
    )
    return end(txn, ended, events_keep_us)


def _let_go(catalog: Catalog, run: Run, actor: str, events_keep_us: int) -> Run:
    """End the rest of what ends with a run that has ended, where there is more. What cannot be
    written now, as on a full disk, is left to the sweep: the run has ended, whoever asked for it.
    """
    if run.ending is None:
        return run
    try:
        let_go(catalog, run.run_id, actor, events_keep_us)
    except (CatalogFailed, CatalogClosed):
        raise  # the store must be opened anew
    except (BlobcaskError, OSError) as error:
        _log.warning("run %s has ended; the sweep ends the rest of it: %s", run.run_id, error)
        return run
    return msgspec.structs.replace(run, ending=None)


def _text_of(snapshot: Snapshot, run_id: str) -> RunText:
    found = snapshot.get(RunText, run_id)
    if found is None:
        raise NotFound("run", run_id)
    return found


def _value(
    snapshot: Snapshot, run_id: str, kind: str, step_id: str, iteration: str
) -> bytes | None:
    found = snapshot.get(StepValue, run_id, kind, step_id, iteration)
    return None if found is None else found.value


class _Full(Exception):
    """A value of a step has no room beside the others of its run."""

    def __init__(self, step_id: str, reason: str) -> None:
        super().__init__(step_id, reason)
        self.step_id = step_id
        self.reason = reason


def _put(txn: Transaction, value: StepValue) -> None:
    """Keep a value in the place of the one before. Raises _Full where they become too large
    together."""
    found = txn.get(StepValue, *value.primary_key())
    before_bytes = 0 if found is None else found.size_bytes
    size_bytes = values_of(txn, value.run_id) - before_bytes + value.size_bytes
    if size_bytes > VALUES_BYTES_MAX:
        raise _Full(
            value.step_id,
            f"with {value.size_bytes} bytes more the results of this run would have {size_bytes} "
            f"of {VALUES_BYTES_MAX}; store them as files",
        )
    if found is None:
        txn.insert(value)
    else:
        txn.replace(value)


def _drop(txn: Transaction, run_id: str, kind: str, step_id: str, iteration: str) -> None:
    found = txn.get(StepValue, run_id, kind, step_id, iteration)
    if found is not None:
        txn.delete(found)


T = TypeVar("T")
V = TypeVar("V", Step, StepValue)


def _within(
    snapshot: Snapshot, kind: type[V], prefix: tuple[str, ...], iteration: str
) -> Iterator[V]:
    """Those whose iteration is one of the items of a loop that has `iteration`."""
    after, before = _bounds(iteration)
    depth = iteration.count(".") + 1 if iteration else 0
    while page := snapshot.range(kind, "", prefix, after=after, before=before, limit=_PAGE):
        for found in page:
            if found.iteration.count(".") == depth:
                yield found
        after = (page[-1].iteration,)


def _bounds(iteration: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """After and before which, exclusively, the iterations inside of `iteration` are."""
    # "1.0" to "1.99" come before "1/": of all iterations only these are read.
    return ((f"{iteration}.",), (f"{iteration}/",)) if iteration else (("",), ())


def steps_of(snapshot: Snapshot, run_id: str) -> list[Step]:
    """The steps of a run in the order in which they began."""
    found: list[Step] = []
    after: tuple[str, ...] = ()
    while page := snapshot.range(Step, "", (run_id,), after=after, limit=PAGE_MAX):
        found += page
        after = (page[-1].step_id, page[-1].iteration)
    return sorted(found, key=lambda step: step.started_at)
