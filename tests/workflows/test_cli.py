"""`blobcask workflow`: a run from the command line, with and without a server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, final

import pytest
from highway_dsl import WorkflowBuilder

from cas.alone import is_held
from cas.beats import last_beat
from cas.cli.call import Call
from cas.errors import CatalogFailed, InvalidRequest
from cas.runner import PLACE, STATUS, RunnerBeat
from cas.setting_sources import load_settings
from cas.store import Store
from tests.conftest import CHECKOUT
from tests.end_to_end.nodes import environ_of, until
from tests.gateway.served import WITH_RUNNER, serving
from tests.workflows.running import ACTOR, TENANT, bench
from workflows.engine.runner import Runner
from workflows.runs_cli import TROUBLE_LOOKS, LocalRuns, RunsView, follow, read_definition

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
APPROVE = """
from highway_dsl import WorkflowBuilder

def get_workflow():
    builder = WorkflowBuilder(name="approving")
    asks = {"approval_key": "pay", "title": "Pay?", "addressees": ["Ada", "Bob"]}
    builder.task("ask", "tools.workflow.request_approval", kwargs=asks, result_key="decision")
    return builder.build()
"""
SHELL = """
from highway_dsl import WorkflowBuilder

def get_workflow():
    builder = WorkflowBuilder(name="shelling")
    builder.task("say", "tools.shell.run", args=["echo {{who | default('nobody')}}"])
    return builder.build()
"""
FLAKY = """
from datetime import timedelta
from highway_dsl import WorkflowBuilder

def get_workflow():
    builder = WorkflowBuilder(name="flaky")
    builder.task("bad", "tools.shell.run", args=["false"])
    builder.retry(max_retries=2, delay=timedelta(0))
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


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def get_workflow(:\n", "line 1: SyntaxError: invalid syntax"),
        ("\nimport no_such_thing\n", "line 2 in <module>: ModuleNotFoundError: No module named"),
        (
            "def halve(n):\n    return n // 0\n\ndef get_workflow():\n    return halve(1)\n",
            "line 5 in get_workflow, line 2 in halve: ZeroDivisionError: integer division",
        ),
        # highway_dsl's own refusal, which has many lines.
        (
            KEEP.replace('builder.task(\n        "keep"', "builder.task(\n        7"),
            r"line 6 in get_workflow: ValidationError: ",
        ),
        ("import sys\nsys.exit('no such day')\n", "line 2 in <module>: SystemExit: no such day"),
        ("import os\nos.chdir('/')\n1 / 0\n", "line 3 in <module>: ZeroDivisionError: "),
        ("raise SyntaxError('odd', (7, 1, 1, ''))\n", "line 1 in <module>: SyntaxError: odd"),
        # Its author's own class, which has a mistake of its own.
        (
            "class Odd(Exception):\n    def __str__(self):\n        return 1\n\nraise Odd\n",
            "line 5 in <module>: Odd: it cannot be told",
        ),
        ("raise ValueError('\\ud800')\n", r"line 1 in <module>: ValueError: \?"),
        ("x = 1\n", r"it has no get_workflow\(\)"),
        (
            "def get_workflow():\n    return 1\n",
            r"get_workflow\(\) gives no workflow of highway_dsl",
        ),
    ],
)
def test_a_mistake_in_a_file_is_told_by_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    (tmp_path / "flow.py").write_text(text)
    for written in ("flow.py", "./flow.py", f"../{tmp_path.name}/flow.py", tmp_path / "flow.py"):
        file = Path(written)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InvalidRequest, match=f"^field 'FILE': {file}[:,] {reason}") as refused:
            read_definition(file)
        assert "\n" not in str(refused.value)
        assert "importlib" not in str(refused.value)


def test_an_input_that_is_no_json_is_a_text(environ: Mapping[str, str], file: Path) -> None:
    """Also what JSON can write, and nothing can keep."""
    texts = ("Ada", "NaN", "-Infinity", "1e400", r'"\ud800"', "[1,]", "1" * 5000, "")
    given = {"n": "[1, 2.5, null]", "name": '"Ada"'} | {f"t{i}": t for i, t in enumerate(texts)}
    inputs = [word for key, text in given.items() for word in ("--input", f"{key}={text}")]
    ran = blobcask(environ, "workflow", "run", str(file), "--detach", *inputs)
    assert ran.returncode == 0, ran.stderr
    shown = blobcask(environ, "workflow", "show", ran.stdout.strip(), "--json")
    expected = {"n": [1, 2.5, None], "name": "Ada"} | {f"t{i}": t for i, t in enumerate(texts)}
    assert json.loads(shown.stdout)["inputs"] == expected


@pytest.mark.parametrize(
    ("given", "reason"),
    [("x=\udcff", "not UTF-8"), ("\udcff=1", "not UTF-8"), (f"x={'[' * 20_000}", "too deep")],
    ids=["value", "name", "depth"],
)
def test_an_input_that_cannot_be_kept_is_one_line(
    environ: Mapping[str, str], file: Path, given: str, reason: str
) -> None:
    ran = blobcask(environ, "workflow", "run", str(file), "--input", given)
    assert (ran.returncode, reason in ran.stderr) == (2, True), ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1, ran.stderr


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "flow.json").write_bytes(b"\xff{}")
    with pytest.raises(InvalidRequest, match="not UTF-8 text"):
        read_definition(tmp_path / "flow.json")


def test_without_an_address_a_run_says_how_it_would_get_one(root: Path, tmp_path: Path) -> None:
    (tmp_path / "ask.py").write_text(ASK)
    environ = {**environ_of(root, {}), "PYTHONWARNINGS": "default"}
    ran = blobcask(environ, "workflow", "run", str(tmp_path / "ask.py"))
    assert ran.returncode == 11
    assert "[gateway] public_url is not set: " in ran.stdout
    assert "start `blobcask serve`" in ran.stdout


def test_what_may_not_run_here_is_refused_before_anybody_does_his_part(
    root: Path, tmp_path: Path
) -> None:
    """By the settings of the runner that is at work, where one is."""
    (tmp_path / "shell.py").write_text(SHELL)
    submit = ("workflow", "run", str(tmp_path / "shell.py"))
    with serving(root, WITH_RUNNER, WORKFLOWS__ALLOW_SHELL="yes") as served:
        until("the runner is there", lambda: is_held(root / PLACE))
        beside = {**environ_of(root, URL), "PYTHONWARNINGS": "default"}
        ran = blobcask(beside, *submit)
        assert ran.returncode == 0, ran.stderr
    sentence = "tools.shell.run: not allowed here: the operator sets [workflows] allow_shell = yes"
    here = blobcask(beside, *submit)
    assert (here.returncode, sentence in here.stderr) == (2, True)
    with serving(root, WITH_RUNNER) as served:
        to_server = ("--server", served.address, "--token", served.token("manage_workflows"))
        afar = blobcask(beside, *submit, *to_server)
        assert (afar.returncode, sentence in afar.stderr) == (2, True)
        until("the runner has told its settings", lambda: told_by_itself(root))
        allowed = {**beside, "BLOBCASK_WORKFLOWS__ALLOW_SHELL": "yes"}
        near = blobcask(allowed, *submit)
        assert (near.returncode, sentence in near.stderr) == (2, True)
        listed = blobcask(beside, "workflow", "list", "--json", *to_server)
        assert len(json.loads(listed.stdout)["runs"]) == 1


def told_by_itself(root: Path) -> bool:
    """Whether the last beat is of the process that has the place."""
    beat, place = last_beat(root / STATUS, RunnerBeat), root / PLACE
    return beat is not None and is_held(place) and place.read_text().strip() == str(beat.pid)


def test_a_run_from_the_command_line_carries_out_no_other(
    environ: Mapping[str, str], file: Path
) -> None:
    """Other tenants' least of all: the settings of this terminal are not those of the server."""
    submit = ("workflow", "run", str(file), "--input", "name=Ada")
    acmes = [blobcask(environ, *submit, "--tenant", "acme", "--detach").stdout for _ in range(2)]
    ran = blobcask(environ, *submit)
    assert ran.returncode == 0, ran.stderr
    listed = blobcask(environ, "workflow", "list", "--tenant", "acme", "--json")
    assert "Trouble: no runner runs: workflows wait\n" in listed.stderr
    statuses = {run["run_id"]: run["status"] for run in json.loads(listed.stdout)["runs"]}
    assert statuses == {run_id.strip(): "queued" for run_id in acmes}
    one = acmes[0].strip()
    resumed = blobcask(environ, "workflow", "resume", one, "--tenant", "acme")
    assert resumed.returncode == 0, resumed.stderr
    listed = blobcask(environ, "workflow", "list", "--tenant", "acme", "--json")
    assert {run["run_id"]: run["status"] for run in json.loads(listed.stdout)["runs"]} == {
        **statuses,
        one: "completed",
    }


def test_the_error_of_a_step_is_told_in_place_of_what_it_came_to(
    root: Path, tmp_path: Path
) -> None:
    (tmp_path / "ask.py").write_text(ASK)
    environ = {**environ_of(root, {}), "PYTHONWARNINGS": "default"}  # without an address
    ran = blobcask(environ, "workflow", "run", str(tmp_path / "ask.py"), "--json")
    assert ran.returncode == 11, ran.stderr
    form = json.loads(ran.stdout)
    shown = blobcask(environ, "workflow", "show", form["run_id"], "--step", "ask")
    assert (shown.returncode, shown.stdout) == (11, "")
    assert shown.stderr == f"ask: failed ({form['steps'][0]['error']})\n"
    with serving(root) as served:
        to_server = ("--server", served.address, "--token", served.token("manage_workflows"))
        afar = blobcask(environ, "workflow", "show", form["run_id"], "--step", "ask", *to_server)
        assert (afar.returncode, afar.stderr) == (11, shown.stderr)


def test_that_nobody_carries_runs_out_is_told_of_a_server_too(
    root: Path, file: Path, environ: Mapping[str, str]
) -> None:
    with serving(root) as served:  # without a runner
        to_server = ("--server", served.address, "--token", served.token("manage_workflows"))
        submit = ("workflow", "run", str(file), "--input", "name=Ada", "--detach")
        detached = blobcask(environ, *submit, *to_server)
        run_id = detached.stdout.strip()
        for words in (("list",), ("show", run_id)):
            told = blobcask(environ, "workflow", *words, *to_server)
            assert told.stderr == "Trouble: no runner runs: workflows wait\n"
        assert blobcask(environ, "workflow", "cancel", run_id, *to_server).returncode == 0
        ended = blobcask(environ, "workflow", "show", run_id, *to_server)
        assert ended.stderr == ""


@final
class Looks:
    """A server's run, which ends after so many looks."""

    def __init__(self, looks: int, trouble: list[str]) -> None:
        self._looks = looks
        self._trouble = trouble

    def get(self, run_id: str) -> dict[str, Any]:
        self._looks -= 1
        status = "running" if self._looks else "completed"
        return {"run_id": run_id, "status": status, "steps": [], "trouble": self._trouble}


@pytest.mark.parametrize(
    ("looks", "here", "told"),
    [(TROUBLE_LOOKS, False, 0), (3 * TROUBLE_LOOKS, False, 1), (3 * TROUBLE_LOOKS, True, 0)],
    ids=["a moment", "long", "this process does"],
)
def test_who_follows_a_run_is_told_once_that_nobody_carries_it_out(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    looks: int,
    here: bool,
    told: int,
) -> None:
    monkeypatch.setattr("workflows.runs_cli.LOOK_S", 0.0)
    runs = cast(RunsView, Looks(looks, ["no runner runs: workflows wait"]))
    follow(Call(), runs, "r", lambda: here)
    assert capsys.readouterr().err == "Trouble: no runner runs: workflows wait\n" * told


def test_a_step_that_failed_tells_how_often_it_was_tried(root: Path, tmp_path: Path) -> None:
    (tmp_path / "flaky.py").write_text(FLAKY)
    allowed = environ_of(root, {"WORKFLOWS__ALLOW_SHELL": "yes"})
    ran = blobcask(
        {**allowed, "PYTHONWARNINGS": "default"}, "workflow", "run", str(tmp_path / "flaky.py")
    )
    assert ran.returncode == 11, ran.stderr
    line = "  bad: failed after 3 attempts (tools.shell.run: 'false' ended with 1)\n"
    assert line in ran.stderr
    assert line in ran.stdout


def test_the_links_of_an_approval_are_told_whole(
    environ: Mapping[str, str], root: Path, tmp_path: Path
) -> None:
    """Where no mail is set up, nobody else tells them."""
    (tmp_path / "approve.py").write_text(APPROVE)
    with asking(environ, tmp_path / "approve.py", "ask") as (process, run_id):
        assert process.stderr is not None
        told = [process.stderr.readline() for _ in range(5)]
        process.send_signal(signal.SIGINT)
        process.wait(60)
    form = json.loads(blobcask(environ, "workflow", "show", run_id, "--json").stdout)
    (step,) = form["steps"]
    lines = [
        f"    {link['addressee']} {does}: {link[which]}\n"
        for link in step["shown"]["links"]
        for does, which in (("approves", "approve_url"), ("rejects", "reject_url"))
    ]
    assert len(lines) == 4
    lines.append("    no mail goes to Ada, Bob: pass the links on\n")
    assert told == lines
    shown = blobcask(environ, "workflow", "show", run_id)
    assert "".join(lines) in shown.stdout
    shows = blobcask(environ, "workflow", "show", run_id, "--step", "ask")
    assert json.loads(shows.stdout) == step["shown"]
    with serving(root) as served:  # which tells the same of it
        to_server = ("--server", served.address, "--token", served.token("manage_workflows"))
        afar = blobcask(environ, "workflow", "show", run_id, "--step", "ask", *to_server)
        assert json.loads(afar.stdout) == step["shown"]
        absent = blobcask(environ, "workflow", "show", run_id, "--step", "none", *to_server)
        assert absent.returncode == 3


def test_an_address_in_a_long_variable_is_whole(environ: Mapping[str, str], file: Path) -> None:
    url = f"https://files.example.org/{'y' * 300}?signature=z"
    name = f"{'x' * 150} {url} {'x' * 150}"
    ran = blobcask(environ, "workflow", "run", str(file), "--input", f"name={name}")
    assert ran.returncode == 0, ran.stderr
    assert f"name = {'x' * 150} {url}…\n" in ran.stdout


def test_the_help_says_how_a_run_that_fails_ends() -> None:
    told = blobcask(os.environ, "--help").stdout
    (line,) = (line for line in told.splitlines() if line.strip().startswith("11 "))
    assert "failed or was cancelled" in line


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
    """`workflow run` of a workflow that waits for a person, once its `step` waits."""

    def __init__(self, environ: Mapping[str, str], file: Path, step: str = "wait") -> None:
        self._step = step
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
            if f"{self._step}: waiting" in line:
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
        refused = blobcask(environ, "workflow", "run", str(file), *to_server)
        assert refused.returncode == 2
        assert "nothing is named 'name'" in refused.stderr
        file.write_text(KEEP.replace("{{name}}", "{{name.first}}"))
        failed = blobcask(environ, "workflow", "run", str(file), "--input", "name=Di", *to_server)
        assert failed.returncode == 11
        assert "there is no 'first' in a text" in failed.stdout


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
        with runs.carried_out([run], print) as check, pytest.raises(CatalogFailed, match="no sync"):
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
