"""`blobcask workflow`: a run from the command line, with and without a server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from highway_dsl import WorkflowBuilder

from cas.cli.call import Call
from cas.errors import CatalogFailed
from cas.setting_sources import load_settings
from cas.store import Store
from tests.conftest import CHECKOUT
from tests.end_to_end.nodes import environ_of, until
from tests.gateway.served import WITH_RUNNER, serving
from tests.workflows.running import ACTOR, TENANT, bench
from workflows.engine.runner import Runner
from workflows.runs_cli import LocalRuns, follow

pytestmark = pytest.mark.slow

KEEP = """
from highway_dsl import WorkflowBuilder

def get_workflow():
    builder = WorkflowBuilder(name="keeping")
    builder.task(
        "keep",
        "tools.storage.store",
        kwargs={"name": "greeting", "data": "Hello {{name}}"},
        result_key="kept",
    )
    return builder.build()
"""
ASK = """
from highway_dsl import WorkflowBuilder

def get_workflow():
    builder = WorkflowBuilder(name="asking")
    builder.task("ask", "tools.storage.request_upload", kwargs={"name": "x"}, result_key="asked")
    builder.task(
        "wait",
        "tools.workflow.wait_for_event",
        kwargs={"event_name": "{{asked.event_name}}"},
        result_key="sent",
    )
    return builder.build()
"""
URL = {"GATEWAY__PUBLIC_URL": "https://files.example.org"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "flow.py"
    path.write_text(KEEP)
    return path


@pytest.fixture
def environ(root: Path) -> Mapping[str, str]:
    environ = environ_of(root, URL)
    # Of libraries below stabilize, at their import.
    environ["PYTHONWARNINGS"] = "default"
    return environ


def blobcask(environ: Mapping[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cas", *words],
        env=environ,
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_run_is_carried_out_here_where_nobody_serves(
    environ: Mapping[str, str], file: Path, root: Path
) -> None:
    ran = blobcask(environ, "workflow", "run", str(file), "--input", "name=Ada", "--json")
    assert ran.returncode == 0, ran.stderr
    form = json.loads(ran.stdout)
    assert form["status"] == "completed"
    assert "keep: completed" in ran.stderr
    got = blobcask(environ, "cat", form["variables"]["kept"]["storage_ref"])
    assert got.stdout == "Hello Ada"
    listed = blobcask(environ, "workflow", "list", "--json")
    assert [run["run_id"] for run in json.loads(listed.stdout)["runs"]] == [form["run_id"]]
    shown = blobcask(environ, "workflow", "show", form["run_id"])
    assert "keep: completed" in shown.stdout
    assert "Trouble" not in listed.stderr + shown.stderr
    whole = blobcask(environ, "workflow", "show", form["run_id"], "--step", "keep")
    assert json.loads(whole.stdout) == form["variables"]["kept"]
    of_item = ("workflow", "show", form["run_id"], "--iteration", "0")
    assert blobcask(environ, *of_item).returncode == 2
    assert blobcask(environ, *of_item, "--step", "keep").returncode == 3
    assert blobcask(environ, "workflow", "cancel", form["run_id"]).returncode == 5


def test_a_definition_that_cannot_run_is_one_line(
    environ: Mapping[str, str], tmp_path: Path
) -> None:
    for name, text in (
        ("a.py", "x = 1\n"),
        ("b.json", "{}"),
        ("c.yaml", "tasks: ["),
        ("d.py", KEEP.replace("tools.storage.store", "tools.storage.stare")),
    ):
        (tmp_path / name).write_text(text)
        ran = blobcask(environ, "workflow", "run", str(tmp_path / name))
        assert ran.returncode == 2, ran.stderr
        assert len(ran.stderr.strip().splitlines()) == 1, ran.stderr


def test_an_interrupted_run_is_gone_on_with(
    environ: Mapping[str, str], tmp_path: Path, root: Path
) -> None:
    (tmp_path / "ask.py").write_text(ASK)
    with asking(environ, tmp_path / "ask.py") as (process, run_id):
        process.send_signal(signal.SIGINT)
        process.wait(60)
    shown = blobcask(environ, "workflow", "show", run_id, "--json")
    assert "Trouble: no runner runs: workflows wait\n" in shown.stderr
    listed = blobcask(environ, "workflow", "list")
    assert "Trouble: no runner runs: workflows wait\n" in listed.stderr
    link = json.loads(shown.stdout)
    token = link["variables"]["asked"]["upload_token"]
    assert link["variables"]["asked"]["upload_url"] == f"https://files.example.org/u/{token}"
    # Completed while nobody runs it.
    with Store.open(root, load_settings(None, environ)) as store:
        opened = store.upload_link(token)
        opened.put(0, b"some words", filename="a.txt")
        opened.complete()
    ran = blobcask(environ, "workflow", "resume", "--json")
    assert ran.returncode == 0, ran.stderr
    (form,) = json.loads(ran.stdout)["runs"]
    assert (form["run_id"], form["status"]) == (run_id, "completed")
    assert [file["filename"] for file in form["variables"]["sent"]["files"]] == ["a.txt"]


class asking:  # noqa: N801  used as a function
    """`workflow run` of a workflow that waits for a person, once it waits."""

    def __init__(self, environ: Mapping[str, str], file: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cas", "workflow", "run", str(file)],
            env=environ,
            cwd=CHECKOUT,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> tuple[subprocess.Popen[str], str]:
        assert self._process.stderr is not None
        run_id = ""
        for line in self._process.stderr:
            if line.startswith("Run "):
                run_id = line.split()[1]
            if "wait: waiting" in line:
                break
        assert run_id
        return self._process, run_id

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()


def test_a_server_runs_what_is_submitted_to_it(root: Path, file: Path) -> None:
    with serving(root, WITH_RUNNER) as served:
        to_server = ("--server", served.address, "--token", served.admin)
        environ = {**served.environ, "PYTHONWARNINGS": "default"}
        ran = blobcask(environ, "workflow", "run", str(file), "--input", "name=Bo", *to_server)
        assert ran.returncode == 0, ran.stderr
        assert "keep: completed" in ran.stderr
        detached = blobcask(
            environ, "workflow", "run", str(file), "--input", "name=Cy", "--detach", *to_server
        )
        run_id = detached.stdout.strip()

        def completed() -> bool:
            shown = blobcask(environ, "workflow", "show", run_id, "--json", *to_server)
            return bool(json.loads(shown.stdout)["status"] == "completed")

        until("it is completed", completed)
        whole = blobcask(environ, "workflow", "show", run_id, "--step", "keep", *to_server)
        assert json.loads(whole.stdout)["storage_ref"]
        failed = blobcask(environ, "workflow", "run", str(file), *to_server)
        assert failed.returncode == 11
        assert "name" in failed.stdout


def test_who_follows_a_run_is_told_that_its_runner_ended(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(runner: Runner) -> None:
        raise CatalogFailed("no sync")

    monkeypatch.setattr(Runner, "run", fails)
    with bench(root) as made:
        flow = WorkflowBuilder(name="waiting")
        flow.task("wait", "t.wait", kwargs={"name": "never"})
        run = made.submit(flow)
        runs = LocalRuns(made.store, made.workflows, TENANT, ACTOR)
        with runs.carried_out() as check, pytest.raises(CatalogFailed, match="no sync"):
            follow(Call(), runs, run, check)


def test_one_run_too_many_is_refused_here_and_by_a_server(root: Path, file: Path) -> None:
    with serving(root, LIMITS__TENANT_RUNS="1") as served:
        # This process has the same settings as the server.
        environ = {**served.environ, "PYTHONWARNINGS": "default"}
        submit = ("workflow", "run", str(file), "--input", "name=Di", "--detach")
        to_server = ("--server", served.address, "--token", served.admin)
        assert blobcask(environ, *submit, *to_server).returncode == 0
        for refused in (blobcask(environ, *submit, *to_server), blobcask(environ, *submit)):
            assert (refused.returncode, refused.stdout) == (6, "")
            assert "1 runs have not ended, of 1 that may be open" in refused.stderr
