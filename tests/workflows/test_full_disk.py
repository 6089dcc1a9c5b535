"""A disk that is full at the moment when a step ends: its tool was called, and is not called
again only because what it came to could not be written (invariant 14)."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from highway_dsl import WorkflowBuilder

from cas.config import Settings, Size, StoreSettings
from cas.keys import load_keys
from cas.records import COMPLETED, ENDED, RUNNING
from cas.store import Store
from tests.mounts import fill, mounted
from tests.workflows.running import ACTOR, TENANT, bench, until
from workflows.definitions import Definition
from workflows.tools import Calling
from workflows.views import Workflows

DISK_BYTES = 24 << 20  # no room for the ballast, so that full is full
LARGE = "x" * 100_000  # of what is written, so that no room is left for it anywhere
AGAIN = "begins again in"  # what the runner says of a step that could not be written


@pytest.fixture
def small(tmp_path: Path, program: Callable[[str], str]) -> Iterator[Path]:
    """A filesystem of its own; skipped where this user may not mount."""
    with mounted(tmp_path, DISK_BYTES, program) as disk:
        yield disk


def test_what_a_full_disk_refused_is_written_when_there_is_room_and_nothing_is_called_again(
    small: Path, caplog: pytest.LogCaptureFixture
) -> None:
    works, go = threading.Semaphore(0), threading.Event()
    calls: Counter[str] = Counter()

    def work(calling: Calling, what: str) -> str:
        calls[calling.step_name] += 1
        works.release()
        go.wait(60)
        return what

    with bench(small / "store") as made:
        made.registry.add("t.work", work)
        made.start()
        flow = WorkflowBuilder(name="work")
        flow.foreach("each", "{{ns}}", lambda body: body.task("one", "t.work", args=[LARGE]))
        flow.task("last", "t.say", args=["done"])
        run = made.submit(flow, ns=list(range(6)))
        for _ in range(6):
            assert works.acquire(timeout=60)
        hog = fill(small)
        go.set()
        until(lambda: AGAIN in caplog.text)
        assert made.view(run).run.status == RUNNING
        hog.unlink()
        view = made.ended(run)
        assert (view.run.status, view.run.error) == (COMPLETED, "")
    assert calls == {f"one#{number}": 1 for number in range(6)}
    assert made.calls["done"] == 1


@pytest.mark.slow
def test_a_runner_that_is_killed_on_a_full_disk_is_followed_by_one_that_ends_the_run(
    small: Path, tmp_path: Path
) -> None:
    root, ledger, said = small / "store", tmp_path / "ledger", tmp_path / "said"

    def runner() -> subprocess.Popen[bytes]:
        words = [sys.executable, "-W", "ignore", "-m", "tests.workflows.victim"]
        with said.open("wb") as stream:
            return subprocess.Popen(
                [*words, root, ledger], stdout=subprocess.DEVNULL, stderr=stream
            )

    def calls() -> list[str]:
        return ledger.read_text().splitlines() if ledger.exists() else []

    settings = Settings(store=StoreSettings(root=root, min_free=Size(0)))
    with Store.open(root, settings) as store:
        workflows = Workflows(store, load_keys(settings))
        runs = workflows.runs(TENANT, ACTOR)
        flow = WorkflowBuilder(name="work")
        flow.task("work", "t.hold", args=[LARGE])
        flow.task("last", "t.note", args=["done"])
        run = runs.submit(Definition.parse(flow.build().to_json()), {}).run_id
        killed = runner()
        try:
            until(lambda: bool(calls()))
            hog = fill(small)
            ledger.with_suffix(".go").touch()
            until(lambda: AGAIN in said.read_text())
        finally:
            killed.kill()
            killed.wait()
        assert runs.get(run).run.status == RUNNING
        hog.unlink()
        follower = runner()
        try:
            until(lambda: runs.get(run).run.status in ENDED, said.read_text())
        finally:
            follower.terminate()
            follower.wait()
        assert (runs.get(run).run.status, runs.get(run).run.error) == (COMPLETED, "")
        # Whatever the first call did outside was not known to be done: the second one has the
        # same key, by which whoever does it knows it again.
        first, second, last = calls()
        assert first == second
        assert last == f"{run} last"
        workflows.close()
