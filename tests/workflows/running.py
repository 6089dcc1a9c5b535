"""A runner in this process, with tools of the test's own: for stories about single runs."""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import msgspec
from highway_dsl import WorkflowBuilder

from cas.catalog import Transaction
from cas.config import GatewaySettings, Settings, Size, StoreSettings, Url, WorkflowSettings
from cas.events import subscription_id
from cas.keys import load_keys
from cas.records import ENDED, Step, Subscription
from cas.store import Store
from workflows.definitions import Definition
from workflows.engine.runner import Runner
from workflows.events import Events
from workflows.run_view import RunView
from workflows.tools import Calling, Registry, Waiting, built_in
from workflows.views import Workflows

TENANT = "acme"
ACTOR = "ann"
DEADLINE_S = 60.0


def until(true: Callable[[], bool], what: str = "") -> None:
    """Wait until something is so: what other threads and processes do tells nobody else."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline_s, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.01)


@final
@dataclass
class Bench:
    """A store, what runs its workflows, and what the tools of the test were asked for."""

    store: Store
    workflows: Workflows
    registry: Registry
    calls: Counter[str] = field(default_factory=Counter)  # by what `t.say` was told to say
    _runner: Runner | None = None
    _thread: threading.Thread | None = None

    def start(self, say: Callable[[str], None] = lambda told: None) -> None:
        self._runner = Runner(self.store, self.workflows, registry=self.registry, say=say)
        self._thread = threading.Thread(target=self._runner.run, name="runner")
        self._thread.start()

    @property
    def runs(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def stop(self) -> None:
        if self._runner is not None and self._thread is not None:
            self._runner.stop()
            self._thread.join()
        self._runner = self._thread = None

    @property
    def events(self) -> Events:
        return self.workflows.events(TENANT, ACTOR)

    def submit(self, builder: WorkflowBuilder, **inputs: Any) -> str:
        definition = Definition.parse(builder.build().to_json())
        return self.workflows.runs(TENANT, ACTOR).submit(definition, inputs).run_id

    def view(self, run: str) -> RunView:
        return self.workflows.runs(TENANT, ACTOR).get(run)

    def cancel(self, run: str) -> None:
        self.workflows.runs(TENANT, ACTOR).cancel(run)

    def end_the_time(self, run: str, wait: str) -> None:
        """The time of a wait that takes long is over now."""

        def change(txn: Transaction) -> None:
            found = txn.get(Subscription, subscription_id(TENANT, run, wait))
            assert found is not None
            now_us, seq = txn.now_us, txn.position.seq + 1
            over = msgspec.structs.replace(found, expires_at=now_us, open_until=now_us, seq=seq)
            txn.replace(over)

        self.store.catalog.write(change)

    def step(self, run: str, task: str, iteration: str = "") -> Step | None:
        for step in self.view(run).steps:
            if (step.step_id, step.iteration) == (task, iteration):
                return step
        return None

    def until_status(self, run: str, task: str, status: str, iteration: str = "") -> Step:
        def there() -> bool:
            step = self.step(run, task, iteration)
            return step is not None and step.status == status

        until(there, f"{task}#{iteration} is {status}")
        found = self.step(run, task, iteration)
        assert found is not None
        return found

    def ended(self, run: str) -> RunView:
        """The run, once it has ended."""
        until(
            lambda: self.view(run).run.status in ENDED or not self.runs,
            f"the end of {self.view(run)}",
        )
        assert self.runs, "the runner ended"
        return self.view(run)

    def run(self, builder: WorkflowBuilder, **inputs: Any) -> RunView:
        return self.ended(self.submit(builder, **inputs))


@contextmanager
def bench(folder: Path, **workflow_settings: Any) -> Iterator[Bench]:
    """A bench whose runner is not started."""
    settings = Settings(
        store=StoreSettings(root=folder, min_free=Size(0)),
        gateway=GatewaySettings(public_url=Url("http://blobcask.example")),
        workflows=WorkflowSettings(**workflow_settings),
    )
    with Store.open(folder, settings) as store:
        workflows = Workflows(store, load_keys(settings))
        made = Bench(store, workflows, built_in())
        _add_tools(made)
        try:
            yield made
        finally:
            made.stop()
            workflows.close()


def _add_tools(bench: Bench) -> None:
    counting = threading.Lock()

    def say(calling: Calling, what: Any = None) -> Any:
        with counting:
            bench.calls[str(what)] += 1
        return what

    def fail(calling: Calling, why: str = "no", until_attempt: int = 1 << 30) -> str:
        with counting:
            bench.calls[why] += 1
        if calling.attempt < until_attempt:
            raise OSError(why)
        return why

    def wait(calling: Calling, name: str, timeout_s: float | None = None) -> Waiting:
        return Waiting("t.wait", name, None, timeout_s, {"name": name})

    bench.registry.add("t.say", say)
    bench.registry.add("t.fail", fail)
    bench.registry.add("t.wait", wait)


def scratch() -> tempfile.TemporaryDirectory[str]:
    place = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="blobcask-", dir=place if place.is_dir() else None)
