"""`blobcask workflow serve`, as it is started by `blobcask serve`, or by hand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from highway_dsl import WorkflowBuilder

from cas.beats import SILENT_US_MAX, write_beat
from cas.config import Settings, Size, StoreSettings
from cas.keys import load_keys
from cas.records import COMPLETED, ENDED, QUEUED, RUNNING, WAITING
from cas.references import parse_reference
from cas.runner import STATUS, runner_of
from cas.store import Store
from tests.workflows.running import ACTOR, TENANT, until
from workflows.definitions import Definition
from workflows.views import Workflows


@contextmanager
def served(root: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "cas", "workflow", "serve", "--root", str(root), *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "BLOBCASK_STORE__MIN_FREE": "0B"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stderr:
            process.stderr.close()


def test_it_runs_what_is_submitted_and_ends_when_told(root: Path) -> None:
    settings = Settings(store=StoreSettings(root=root, min_free=Size(0)))
    with Store.open(root, settings) as store, served(root) as runner:
        workflows = Workflows(store, load_keys(settings))
        flow = WorkflowBuilder(name="report")
        flow.task(
            "keep",
            "tools.storage.store",
            kwargs={"name": "report", "data": "hello {{who}}", "content_type": "text/plain"},
            result_key="kept",
        )
        flow.task("read", "tools.storage.retrieve", args=["{{kept.storage_ref}}"])
        definition = Definition.parse(flow.build().to_json())
        runs = workflows.runs(TENANT, ACTOR)
        run = runs.submit(definition, {"who": "ann"}).run_id
        until(lambda: runs.get(run).run.status in ENDED, "the end of the run")
        view = runs.get(run)
        assert (view.run.status, view.run.error) == (COMPLETED, "")
        assert view.variables["read"] == "hello ann"
        kept = store.files(TENANT, ACTOR).stat(
            parse_reference(view.variables["kept"]["storage_ref"])
        )
        assert (kept.workflow_run_id, kept.created_by) == (run, f"run:{run}")
        assert msgspec.json.decode(view.value(view.steps[0]) or b"")["size_bytes"] == 9
        runner.send_signal(signal.SIGTERM)
        assert runner.wait(timeout=60) == 0
        workflows.close()


@pytest.mark.slow
def test_that_it_was_killed_or_stands_still_is_told(root: Path) -> None:
    """By the kernel, which knows who holds a lock, and by the age of its last sign of life."""
    settings = Settings(store=StoreSettings(root=root, min_free=Size(0)))
    with Store.open(root, settings) as store:
        workflows = Workflows(store, load_keys(settings))
        flow = WorkflowBuilder(name="waits")
        flow.task("wait", "tools.workflow.wait_for_event", kwargs={"event_name": "never"})
        runs = workflows.runs(TENANT, ACTOR)
        with served(root) as runner:
            until(lambda: runner_of(store).beat is not None, "a sign of life")
            runner.kill()
            runner.wait()
            assert runner_of(store).trouble() == []  # nothing waits for it
            run = runs.submit(Definition.parse(flow.build().to_json()), {}).run_id
            assert runner_of(store).trouble() == ["no runner runs: workflows wait"]
            assert runner_of(store).open == {QUEUED: 1, RUNNING: 0, WAITING: 0}
        with served(root) as runner:
            until(lambda: runs.get(run).run.status == WAITING, "that it waits")
            assert runner_of(store).open == {QUEUED: 0, RUNNING: 0, WAITING: 1}
            assert runner_of(store).trouble() == []
            runner.send_signal(signal.SIGSTOP)
            os.waitpid(runner.pid, os.WUNTRACED)
            beat = runner_of(store).beat
            assert beat is not None
            assert (beat.pid, beat.waits, beat.failures) == (runner.pid, False, 0)
            # As long after its last sign of life as nobody wants to wait here.
            write_beat(root / STATUS, msgspec.structs.replace(beat, at=beat.at - 2 * SILENT_US_MAX))
            (told,) = runner_of(store).trouble()
            # Two minutes, and the age of that sign.
            assert told.startswith("the runner is silent for 1")
        workflows.close()


def test_it_ends_with_its_parent(root: Path) -> None:
    with Store.open(root, Settings(store=StoreSettings(root=root, min_free=Size(0)))):
        pass
    with served(root, "--with-parent", "1") as runner:  # which is not its parent
        assert runner.wait(timeout=60) == 0


FAILS_WHILE_A_TOOL_WORKS = """
import sys, threading
import workflows.engine.runner as runner
from cas.cli import main
from cas.errors import CatalogFailed
from workflows.run_log import RunLog
from workflows.tools import built_in

works = threading.Event()

def slow(calling):
    works.set()
    threading.Event().wait(600)

def boom(calling):
    works.wait()

def finish(log, step, iteration, value):
    raise CatalogFailed("no sync")

tools = built_in()
tools.add("t.slow", slow)
tools.add("t.boom", boom)
runner.default_registry = lambda: tools
RunLog.finish = finish
sys.argv = ["blobcask", "workflow", "serve", "--root", sys.argv[1]]
main()
"""


def test_it_ends_at_once_where_its_catalog_fails_though_a_tool_works(root: Path) -> None:
    """So that who started it starts it again."""
    settings = Settings(store=StoreSettings(root=root, min_free=Size(0)))
    with Store.open(root, settings) as store:
        workflows = Workflows(store, load_keys(settings))
        flow = WorkflowBuilder(name="fails")
        flow.task("slow", "t.slow", dependencies=[])
        flow.task("boom", "t.boom", dependencies=[])
        definition = Definition.parse(flow.build().to_json())
        workflows.runs(TENANT, ACTOR).submit(definition, {})
        workflows.close()
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FAILS_WHILE_A_TOOL_WORKS, str(root)],
        env={**os.environ, "BLOBCASK_STORE__MIN_FREE": "0B"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 8, ended.stderr
    assert ended.stderr.splitlines()[-1] == "Error: no sync"
