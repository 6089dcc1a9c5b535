"""A run as it is written: by the runner, step after step, and at its end by whoever ends it.

    queued → running ⇄ waiting → completed | failed | cancelled

A step runs at least once, and is finished once (invariant 14): `begin` tells of a step that was
finished before, and only the first `finish` counts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeVar, final

import msgspec

from cas.catalog import Catalog, Snapshot, Transaction
from cas.endings import end, let_go
from cas.errors import (
    BlobcaskError,
    CatalogClosed,
    CatalogFailed,
    NotFound,
    RunEnded,
    ToolFailed,
)
from cas.events import drop, subscription_id
from cas.records import (
    CANCELLED,
    COMPLETED,
    ENDED,
    FAILED,
    FULL,
    ITEM,
    ITEMS,
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
from cas.totals import steps_of
from workflows import step_values
from workflows.run_view import RunView, text_of

_ERROR_CHARS_MAX: Final = 2000
# Of all loops of a run together, since loops may be in loops: each item has the tasks of the body.
# A step costs 9 ms of processor time: so many are a quarter of an hour's work at least, and some
# seconds' to end.
STEPS_MAX: Final = 100_000
_ITEMS_AT_ONCE: Final = 500  # written in one transaction

T = TypeVar("T")

_log = logging.getLogger(__name__)


@final
class RunLog:
    """One run as the runner writes it. Every method is durable on return."""

    def __init__(
        self,
        catalog: Catalog,
        run_id: str,
        keep_us: int,
        events_keep_us: int,
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
            return text_of(snapshot, self.run_id)

    def step(self, step_id: str, iteration: str = "") -> Step | None:
        """A step as it is now; None before it began."""
        with self._catalog.read() as snapshot:
            return snapshot.get(Step, self.run_id, step_id, iteration)

    def result(self, step_id: str, iteration: str = "") -> bytes | None:
        """JSON: what a step came to; None unless it is completed."""
        with self._catalog.read() as snapshot:
            return step_values.value(snapshot, self.run_id, RESULT, step_id, iteration)

    def shown(self, step_id: str, iteration: str = "") -> bytes | None:
        """JSON: what a step shows that waits."""
        with self._catalog.read() as snapshot:
            return step_values.value(snapshot, self.run_id, SHOWN, step_id, iteration)

    def steps_within(self, step_id: str, iteration: str) -> list[Step]:
        """What there is of a step for each item of the loop that it names, or is directly in,
        which has `iteration`."""
        with self._catalog.read() as snapshot:
            return list(step_values.within(snapshot, Step, (self.run_id, step_id), iteration))

    def results_within(self, step_id: str, iteration: str) -> dict[str, bytes]:
        """The results of a step, by iteration, for the items of the loop that it is in."""
        with self._catalog.read() as snapshot:
            found = step_values.within(
                snapshot, StepValue, (self.run_id, RESULT, step_id), iteration
            )
            return {value.iteration: value.value for value in found}

    def item(self, loop: str, iteration: str) -> bytes | None:
        """JSON: what an item of a loop is; None where it has none."""
        with self._catalog.read() as snapshot:
            return step_values.value(snapshot, self.run_id, ITEM, loop, iteration)

    def items(self, loop: str, iteration: str) -> int | None:
        """How many items a loop has; None before they are recorded."""
        with self._catalog.read() as snapshot:
            raw = step_values.value(snapshot, self.run_id, ITEMS, loop, iteration)
        return None if raw is None else msgspec.json.decode(raw, type=int)

    def check_room(self, what: str) -> None:
        """Raise ToolFailed where this run has had a result refused because it has too many: what
        else is done for it would be done for nothing."""
        with self._catalog.read() as snapshot:
            if step_values.value(snapshot, self.run_id, FULL, "", "") is not None:
                raise ToolFailed(
                    what,
                    f"not begun: the results of this run have reached "
                    f"{step_values.VALUES_BYTES_MAX} bytes",
                )

    def check_open(self) -> None:
        """Raises NotFound; RunEnded where the run has ended."""
        with self._catalog.read() as snapshot:
            self._open(snapshot)

    def record_items(self, loop: str, iteration: str, items: list[Any], tasks: int = 1) -> None:
        """Keep what a loop goes over, from its beginning on: what its template says may change
        while it runs. Harmless to stop and to repeat: how many they are is written last.

        `tasks` is how many the body has, without those in loops in it, which count when these
        begin. Raises RunEnded; ToolFailed where the run has too many results, or its loops would
        have more than STEPS_MAX steps.
        """
        within = f"{iteration}." if iteration else ""
        values = [
            StepValue(
                self.run_id, ITEM, loop, f"{within}{number}", msgspec.json.encode(item), tasks
            )
            for number, item in enumerate(items)
        ]
        count = msgspec.json.encode(len(items))
        with self._catalog.read() as snapshot:
            # Those of an attempt that was stopped: they were written in their order.
            written = step_values.within(snapshot, StepValue, (self.run_id, ITEM, loop), iteration)
            there = sum(1 for _ in written)
        for start in range(0, len(values), _ITEMS_AT_ONCE):
            more = (len(items) - max(start, there)) * tasks
            self._put_all(values[start : start + _ITEMS_AT_ONCE], loop, more)
        self._put_all([StepValue(self.run_id, ITEMS, loop, iteration, count)])

    def _put_all(self, values: list[StepValue], loop: str = "", more: int = 0) -> None:
        """Keep values: those of a loop that has `more` steps to come, theirs included."""

        def change(txn: Transaction) -> None:
            self._open(txn)
            in_all = steps_of(txn, self.run_id) + more
            if more and in_all > STEPS_MAX:
                reason = f"the loops of this run would have {in_all} of {STEPS_MAX} steps together"
                raise ToolFailed(loop, reason)
            for value in values:
                step_values.put(txn, value)

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

        Raises RunEnded; ToolFailed where the run would have more than
        `step_values.VALUES_BYTES_MAX`.
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
        after, before = step_values.bounds(iteration)

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
                step_values.drop(txn, self.run_id, SHOWN, step.step_id, step.iteration)
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
            return end_run(txn, run, status, error_kept, self._keep_us, self._events_keep_us)

        run = self._catalog.write(change, actor=self.actor)
        return let_go_of(self._catalog, run, self.actor, self._events_keep_us)

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
                step_values.drop(txn, self.run_id, SHOWN, step_id, iteration)
            if value is not None:
                step_values.put(txn, StepValue(self.run_id, kind, step_id, iteration, value))
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
        except step_values.Full as full:

            def remember(txn: Transaction) -> None:
                self._open(txn)
                if step_values.value(txn, self.run_id, FULL, "", "") is None:
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


def end_run(
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


def let_go_of(catalog: Catalog, run: Run, actor: str, events_keep_us: int) -> Run:
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
