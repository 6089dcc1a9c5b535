"""Kit: what the steps of one process share."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from cas.records import Run
from cas.store import Store
from workflows.complaints import Complaints
from workflows.engine.attempts import Attempts
from workflows.engine.database import Database
from workflows.engine.items import Items
from workflows.engine.outcomes import Outcome
from workflows.engine.spots import Spot
from workflows.events import Events
from workflows.run_log import RunLog
from workflows.tools.registry import Registry
from workflows.views import Workflows


@final
class Kit:
    """Safe for threads."""

    def __init__(
        self, store: Store, workflows: Workflows, registry: Registry, at: Callable[[str], None]
    ) -> None:
        """`at` is told of places where tests kill the process."""
        self.store = store
        self.settings = store.settings
        self.workflows = workflows
        self.registry = registry
        self.at = at
        self.attempts = Attempts()
        self.complaints = Complaints()
        self.items = Items()
        # What could not be written yet: the tools are not called again for that.
        self.unwritten: dict[Spot, Outcome] = {}
        self._database: Database | None = None

    def attach(self, database: Database) -> None:
        """Where loops begin their items; before anything else."""
        self._database = database

    @property
    def database(self) -> Database:
        assert self._database is not None
        return self._database

    def log_of(self, run: str) -> RunLog:
        settings = self.settings
        return RunLog(self.store.catalog, run, settings.workflows.keep, settings.events.keep)

    def events_of(self, run: Run, log: RunLog) -> Events:
        """The events of a run's tenant, in the name of who submitted it."""
        return self.workflows.events(run.tenant_id, log.actor)

    def now_us(self) -> int:
        """The catalog's time."""
        with self.store.catalog.read() as snapshot:
            return self.store.now_us(snapshot)

    def drop(self, spot: Spot) -> None:
        """What is kept of a step that its loop ended without."""
        self.unwritten.pop(spot, None)
        self.attempts.over(spot)
        self.items.over(spot)

    def forget(self, run: str) -> None:
        """Drop what is kept of a run that has ended."""
        self.items.forget(run)
        self.attempts.forget(run)
        for spot in [spot for spot in list(self.unwritten) if spot.run == run]:
            self.unwritten.pop(spot, None)
