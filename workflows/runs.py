"""Runs of workflows as the catalog has them: what was asked for, and what came of each step.

These records are the whole truth of a run. The engine below (`workflows.engine`) keeps a
database of its own, to know what comes next; it may be deleted at any time, for a run begins
there again and finds the results of its finished steps here.

A step of theirs is written by `run_log`, seen by `run_view`; what it came to is kept apart from
it (`step_values`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import msgspec

from cas.catalog import Catalog, Snapshot, Transaction
from cas.errors import NotFound, RunEnded, TooManyRuns
from cas.identifiers import new_id
from cas.listing import Page, newest, own
from cas.once import OnceKey, once
from cas.records import CANCELLED, ENDED, QUEUED, Run, RunText
from cas.references import check_segment
from cas.totals import open_runs_of
from workflows.definitions import Definition
from workflows.run_log import end_run, let_go_of
from workflows.run_view import RunView


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
        keep_us: int,
        events_keep_us: int,
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
            return end_run(txn, run, CANCELLED, "", self._keep_us, self._events_keep_us)

        run = self._catalog.write(change, actor=self._actor, request_id=self._request_id)
        return let_go_of(self._catalog, run, self._actor, self._events_keep_us)

    def _own(self, snapshot: Snapshot, run_id: str) -> Run:
        run = own(snapshot, Run, self._tenant_id, run_id)
        if run is None:
            raise NotFound("run", run_id)
        return run
