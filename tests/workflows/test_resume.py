"""Runners that are killed: the next one goes on, and repeats nothing that was finished
(invariant 14)."""

from __future__ import annotations

import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import msgspec
import pytest
from highway_dsl import WorkflowBuilder

from cas.config import Settings, Size, StoreSettings
from cas.keys import load_keys
from cas.records import COMPLETED, ENDED, WAITING
from cas.store import Store
from tests.workflows.running import ACTOR, DEADLINE_S, TENANT, until
from workflows.definitions import Definition
from workflows.run_view import RunView
from workflows.views import Workflows

HOLD_US = 3_600_000_000


@final
@dataclass
class Scene:
    """A ROOT, and runners on it that come and go."""

    root: Path
    ledger: Path
    store: Store
    workflows: Workflows
    runner: subprocess.Popen[str] | None = None
    kills: int = 0
    finished: dict[str, int] = field(default_factory=dict)  # step -> calls when it was finished

    def start(self, place: str = "", number: int = 0) -> subprocess.Popen[str]:
        words = [str(self.root), str(self.ledger), place, str(number)]
        self.runner = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.workflows.victim", *words],
            stdout=subprocess.PIPE,
            text=True,
        )
        return self.runner

    def kill(self) -> None:
        assert self.runner is not None
        self.runner.kill()
        self.buried()

    def buried(self) -> None:
        """Note the end of a runner."""
        assert self.runner is not None
        self.runner.wait()
        if self.runner.stdout:
            self.runner.stdout.close()
        assert self.runner.returncode == -9, "it was to be killed, and ended otherwise"
        self.runner = None
        self.kills += 1

    def stop(self) -> None:
        if self.runner is not None:
            self.runner.terminate()
            self.runner.wait()
            if self.runner.stdout:
                self.runner.stdout.close()
            self.runner = None

    def submit(self) -> str:
        flow = WorkflowBuilder(name="story")
        flow.task("first", "t.note", args=["{{names}}"])
        flow.task("ask", "t.ask", kwargs={"name": "go"}, result_key="asked")
        flow.foreach(
            "each",
            "{{first}}",
            lambda body: body.task("note", "t.note", args=["{{item}}"]).task(
                "answer", "t.ask", kwargs={"name": "for {{note}}"}
            ),
        )
        flow.task("last", "t.note", args=["{{each.results}} {{asked}}"])
        definition = Definition.parse(flow.build().to_json())
        names = {"names": ["x", "y", "z"]}
        return self.workflows.runs(TENANT, ACTOR).submit(definition, names).run_id

    def view(self, run: str) -> RunView:
        return self.workflows.runs(TENANT, ACTOR).get(run)

    def calls(self, run: str) -> Counter[str]:
        """How often each step has called its tool."""
        if not self.ledger.exists():
            return Counter()
        lines = (line.split() for line in self.ledger.read_text().splitlines())
        return Counter(step for whose, step in lines if whose == run)

    def remember(self, run: str) -> None:
        """What is finished now: none of it may be called again."""
        calls = self.calls(run)
        for step in self.view(run).steps:
            name = f"{step.step_id}#{step.iteration}" if step.iteration else step.step_id
            if step.status == COMPLETED and name in calls:
                self.finished.setdefault(name, calls[name])

    def answer(self, run: str) -> None:
        """Give those that wait what they wait for."""
        events = self.workflows.events(TENANT, ACTOR)
        view = self.view(run)
        for step in view.steps:
            shown = view.value(step)
            if step.status == WAITING and shown is not None:
                name = msgspec.json.decode(shown)["name"]
                wait = self.waits.setdefault(f"{run} {step.step_id}#{step.iteration}", name)
                if wait:
                    events.emit(name, f"[{name}]", hold_us=HOLD_US)
                    self.waits[f"{run} {step.step_id}#{step.iteration}"] = ""

    waits: dict[str, str] = field(default_factory=dict)  # "": it was answered

    def check(self, run: str) -> None:
        """The run has come to what it had to, with nothing repeated that was finished."""
        view = self.view(run)
        assert (view.run.status, view.run.error) == (COMPLETED, "")
        (last,) = (step for step in view.steps if step.step_id == "last")
        assert (
            msgspec.json.decode(view.value(last) or b"") == '["[for x]","[for y]","[for z]"] [go]'
        )
        calls = self.calls(run)
        assert {step: calls[step] for step in self.finished} == self.finished
        # Each kill may have come between a call and its record, for as many as were under way.
        assert set(calls) == {"first", "note#0", "note#1", "note#2", "last"}
        assert all(calls[step] <= 1 + self.kills for step in calls)

    def carry(self, run: str) -> None:
        """Answer and, where the runner is gone, start another one, until the run has ended."""
        deadline_s = time.monotonic() + DEADLINE_S
        while self.view(run).run.status not in ENDED:
            assert time.monotonic() < deadline_s, self.view(run)
            self.answer(run)
            if self.runner is not None and self.runner.poll() is not None:
                self.buried()
                self.remember(run)
            if self.runner is None:
                self.start()
            time.sleep(0.02)


@contextmanager
def staged(root: Path, tmp_path: Path) -> Iterator[Scene]:
    settings = Settings(store=StoreSettings(root=root, min_free=Size(0)))
    with Store.open(root, settings) as store:
        workflows = Workflows(store, load_keys(settings))
        made = Scene(root, tmp_path / "ledger", store, workflows)
        try:
            yield made
        finally:
            made.stop()
            workflows.close()


@pytest.fixture
def scene(root: Path, tmp_path: Path) -> Iterator[Scene]:
    with staged(root, tmp_path) as made:
        yield made


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("begun", 1),
        ("begun", 4),
        ("called", 1),
        ("called", 3),
        ("subscribed", 1),
        ("subscribed", 3),
        ("claimed", 1),
        ("claimed", 2),
        ("suspending", 1),
        ("suspending", 3),
        ("stored", 1),
        ("stored", 6),
        ("signalling", 1),
        ("signalling", 4),
        ("finishing", 1),
        ("finishing", 5),
        ("finished", 1),
        ("finished", 5),
    ],
)
@pytest.mark.slow
def test_a_runner_that_is_killed_there_is_followed_by_one_that_ends_the_run(
    scene: Scene, place: str, number: int
) -> None:
    run = scene.submit()
    scene.start(place, number)
    scene.carry(run)
    assert scene.kills == 1, "it never came to that place"
    scene.check(run)


@pytest.mark.slow
def test_whenever_runners_are_killed_the_run_ends(scene: Scene) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)  # noqa: T201  to tell what a failure was
    chance = random.Random(seed)
    for _ in range(5):
        run = scene.submit()
        scene.finished.clear()
        scene.kills = 0
        deadline_s = time.monotonic() + DEADLINE_S
        while scene.view(run).run.status not in ENDED and scene.kills < 3:
            assert time.monotonic() < deadline_s
            runner = scene.start()
            assert runner.stdout is not None
            runner.stdout.readline()  # it runs
            ends_s = time.monotonic() + chance.uniform(0.0, 0.6)
            while time.monotonic() < ends_s:
                scene.answer(run)
            scene.kill()
            scene.remember(run)
        scene.carry(run)
        scene.check(run)
        scene.stop()


@pytest.mark.slow
def test_the_engines_own_database_may_be_lost(scene: Scene) -> None:
    run = scene.submit()
    scene.start()
    until(lambda: _waits(scene, run, "ask"))
    scene.kill()
    scene.remember(run)
    shutil.rmtree(scene.root / "workflows")
    scene.start()
    scene.answer(run)
    until(lambda: _waits(scene, run, "answer", 3))
    scene.kill()
    scene.remember(run)
    database = scene.root / "workflows" / "engine.db"
    database.write_bytes(b"no database at all" * 1000)
    scene.start()
    until(lambda: _waits(scene, run, "answer", 3))
    scene.kill()
    # Another version's tables: whole, and of no use.
    shutil.rmtree(scene.root / "workflows")
    database.parent.mkdir()
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE pipeline_executions (id, something_else)")
        connection.execute("CREATE TABLE queue_messages (id, other)")
    scene.carry(run)
    scene.check(run)
    assert scene.calls(run) == {"first": 1, "note#0": 1, "note#1": 1, "note#2": 1, "last": 1}


@pytest.mark.slow
def test_an_engine_that_is_ahead_of_the_catalog_begins_anew(root: Path, tmp_path: Path) -> None:
    """A ROOT that was put back to an earlier time, and its engine's database was not."""
    place, earlier = root / "store", root / "earlier"
    with staged(place, tmp_path) as scene:
        run = scene.submit()
        scene.start()
        until(lambda: _waits(scene, run, "ask"))
        scene.kill()
    shutil.copytree(place, earlier)
    with staged(place, tmp_path) as scene:
        scene.start()
        scene.answer(run)
        until(lambda: _waits(scene, run, "answer", 3))
        scene.kill()
    shutil.rmtree(earlier / "workflows")
    shutil.move(place / "workflows", earlier / "workflows")
    with staged(earlier, tmp_path) as scene:
        scene.kills = 2
        scene.carry(run)
        scene.check(run)


@pytest.mark.slow
def test_what_happened_while_no_runner_ran_is_found(scene: Scene) -> None:
    run = scene.submit()
    scene.start()
    until(lambda: _waits(scene, run, "ask"))
    scene.kill()
    scene.answer(run)
    scene.start()
    until(lambda: _waits(scene, run, "answer", 3))
    scene.kill()
    scene.answer(run)
    scene.carry(run)
    scene.check(run)


@pytest.mark.slow
def test_a_second_runner_waits_for_its_turn(scene: Scene) -> None:
    run = scene.submit()
    first = scene.start()
    until(lambda: _waits(scene, run, "ask"))
    second = Scene(scene.root, scene.ledger, scene.store, scene.workflows)
    waiting = second.start()
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == f"Waiting: another runner (PID {first.pid}) runs here.\n"
    scene.kill()
    assert waiting.stdout.readline().startswith("Running the workflows of")
    second.carry(run)
    second.kills = 1
    second.check(run)
    second.stop()


def _waits(scene: Scene, run: str, task: str, many: int = 1) -> bool:
    found = [step for step in scene.view(run).steps if step.step_id == task]
    return sum(step.status == WAITING for step in found) == many
