"""`blobcask workflow run | resume | list | show | cancel`: for the runs of a ROOT, or of a server.

`run` follows what it submitted to its end. Where nobody runs the workflows of this ROOT, it
carries this one out itself, and no other: those of others need not fit the settings of this
terminal. Interrupted, it leaves the run where it is.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, final

import click
import msgspec

from cas.cli.call import FIRST_TENANT, Call, table, tenant_option
from cas.cli.exits import WrongFound
from cas.errors import InvalidRequest, NotFound
from cas.keys import load_keys
from cas.records import CANCELLED, COMPLETED, ENDED, FAILED, QUEUED, RUNNING, WAITING
from cas.runner import runner_of
from workflows.forms import one_step, plain, run_form, whole_run
from workflows.leaving import leave_at_end

if TYPE_CHECKING:
    from cas.store import Store
    from workflows.views import Workflows

JSON = dict[str, Any]

LOOK_S: Final = 0.25  # between two looks at a run that is followed
TROUBLE_LOOKS: Final = 20  # at which nobody carries it out, until that is said: one may start
VARIABLE_CHARS: Final = 200  # of a variable; what is longer is told whole by its step
_URL: Final = re.compile(r"https?://[^\s\"\\]+")
_FRAMES: Final = 5  # of a file of the user's that fails: the innermost


class RunsView(Protocol):
    """Runs as JSON, here or at a server."""

    def submit(self, definition: str, inputs: Mapping[str, Any]) -> JSON: ...
    def get(self, run_id: str) -> JSON: ...
    def step(self, run_id: str, step_id: str, iteration: str = "") -> JSON: ...
    def result(self, run_id: str, step_id: str, iteration: str = "") -> Any: ...
    def list(self, status: str | None, cursor: str | None, limit: int) -> JSON: ...
    def cancel(self, run_id: str) -> JSON: ...


@final
class LocalRuns:
    """The runs of one tenant of a store that this process has open."""

    def __init__(self, store: Store, workflows: Workflows, tenant_id: str, actor: str) -> None:
        self._store = store
        self._workflows = workflows
        self._runs = workflows.runs(tenant_id, actor)

    @contextmanager
    def carried_out(
        self, run_ids: Collection[str], say: Callable[[str], None]
    ) -> Iterator[Callable[[], bool]]:
        """Carry these out meanwhile, and no others, unless a runner of all is there, or comes.

        What it gives tells whether this process does, or waits for its turn; it raises what the
        runner met, once that has ended.
        """
        from workflows.engine.runner import Runner

        runner = Runner(self._store, self._workflows, only=run_ids, say=say)
        met: list[BaseException] = []

        def work() -> None:
            try:
                runner.run()
            except BaseException as error:  # noqa: BLE001  it is raised in the thread that asks
                met.append(error)

        def check() -> bool:
            if met:
                raise met[0]
            return thread.is_alive()

        thread = threading.Thread(target=work, name="runner", daemon=True)
        thread.start()
        try:
            yield check
        finally:
            runner.stop()
            thread.join()
            if runner.left:
                leave_at_end()

    def _trouble(self) -> list[str]:
        return runner_of(self._store).trouble()

    def submit(self, definition: str, inputs: Mapping[str, Any]) -> JSON:
        # Late: only who submits pays for the DSL.
        from workflows.submissions import read_submission
        from workflows.tools.registry import barred, default_registry

        # By the settings of who will carry it out.
        runner = runner_of(self._store).for_all
        refused = barred(self._store.settings) if runner is None else runner.barred
        parsed = read_submission(definition, inputs, default_registry(), refused)
        return dict(run_form(self._runs.submit(parsed, inputs)))

    def get(self, run_id: str) -> JSON:
        return plain(whole_run(self._runs.get(run_id), self._trouble))

    def step(self, run_id: str, step_id: str, iteration: str = "") -> JSON:
        return plain(one_step(self._runs.get(run_id), step_id, iteration))

    def result(self, run_id: str, step_id: str, iteration: str = "") -> Any:
        return json.loads(self._runs.get(run_id).result(step_id, iteration))

    def list(self, status: str | None, cursor: str | None, limit: int) -> JSON:
        page = self._runs.list(status=status, cursor=cursor, limit=limit)
        runs = [run_form(run) for run in page.items]
        return {"runs": runs, "next_cursor": page.next_cursor, "trouble": self._trouble()}

    def cancel(self, run_id: str) -> JSON:
        return dict(run_form(self._runs.cancel(run_id)))


@click.command("run")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--input", "inputs", multiple=True, metavar="KEY=VALUE",
    help="A variable of the run: JSON, or else a text; may be given several times.",
)  # fmt: skip
@click.option("--detach", is_flag=True, help="Only submit it, and print its identifier.")
@tenant_option
@click.pass_obj
def run(call: Call, file: Path, inputs: tuple[str, ...], detach: bool, tenant: str | None) -> None:
    """Run a workflow of highway_dsl: a Python FILE with get_workflow(), or its JSON or YAML.

    A Python file is executed, here, with all that you may do. A run that fails or is cancelled
    ends this with 11.
    """
    definition = read_definition(file)
    given = dict(_input(text) for text in inputs)
    with _runs(call, tenant, make=True) as runs:
        run_id = runs.submit(definition, given)["run_id"]
        if detach:
            call.answer({"run_id": run_id}, [run_id])
            return
        call.say(f"Run {run_id}")
        with _carried_out(call, runs, [run_id]) as check:
            form = follow(call, runs, run_id, check)
    call.answer(form, _lines(form))
    if form["status"] != COMPLETED:
        raise WrongFound


@click.command("resume")
@click.argument("run_id", metavar="[ID]", required=False)
@tenant_option
@click.pass_obj
def resume(call: Call, run_id: str | None, tenant: str | None) -> None:
    """Go on with a run, or with all that have not ended, and follow them to their end.

    A server goes on by itself; this is for a ROOT that none serves, after an interruption. A run
    that fails or is cancelled ends this with 11.
    """
    forms: list[JSON] = []
    with _runs(call, tenant) as runs:
        waiting = [runs.get(run_id)["run_id"]] if run_id else _open(runs)
        with _carried_out(call, runs, waiting) as check:
            for each in waiting:
                call.say(f"Run {each}")
                forms.append(follow(call, runs, each, check))
    call.answer({"runs": forms}, [line for form in forms for line in _lines(form)])
    if any(form["status"] != COMPLETED for form in forms):
        raise WrongFound


@click.command("list")
@click.option(
    "--status", type=click.Choice([QUEUED, RUNNING, WAITING, COMPLETED, FAILED, CANCELLED])
)
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True)
@click.option("--cursor", help="Where an earlier listing ended.")
@tenant_option
@click.pass_obj
def list_runs(
    call: Call, status: str | None, limit: int, cursor: str | None, tenant: str | None
) -> None:
    """List runs, newest first."""
    with _runs(call, tenant) as runs:
        page = runs.list(status, cursor, limit)
    _say_trouble(call, page)
    rows = [(run["run_id"], run["status"], run["created_at"], run["name"]) for run in page["runs"]]
    call.answer(page, table(("RUN", "STATUS", "CREATED", "NAME"), rows))
    if page["next_cursor"] and not call.json:
        call.say(f"There are more: --cursor {page['next_cursor']}")


@click.command("show")
@click.argument("run_id", metavar="ID")
@click.option(
    "--step", "step_id", metavar="NAME",
    help="Only what this step came to or, while it waits, what it shows: its JSON.",
)  # fmt: skip
@click.option(
    "--iteration", metavar="I",
    help="Of a step in a loop, the item's number from 0; in a loop of a loop 2.0.",
)  # fmt: skip
@tenant_option
@click.pass_obj
def show(
    call: Call, run_id: str, step_id: str | None, iteration: str | None, tenant: str | None
) -> None:
    """Show a run: its steps, and its variables. What is too long there, --step NAME tells; of a
    step that failed or was cancelled that is its error on stderr, and this ends with 11.
    """
    if step_id is None and iteration is not None:
        raise click.UsageError("--iteration is that of a --step")
    with _runs(call, tenant) as runs:
        if step_id is not None:
            # JSON in any case: a text with its quotes, so that programs need not guess.
            value = _value(call, runs, run_id, step_id, iteration or "")
            click.echo(json.dumps(value, ensure_ascii=False))
            return
        form = runs.get(run_id)
    _say_trouble(call, form)
    call.answer(form, _lines(form))


@click.command("cancel")
@click.argument("run_id", metavar="ID")
@tenant_option
@click.pass_obj
def cancel(call: Call, run_id: str, tenant: str | None) -> None:
    """End a run; steps at work end first, for nothing."""
    with _runs(call, tenant) as runs:
        form = runs.cancel(run_id)
    call.answer(form, [form["status"]])


def read_definition(file: Path) -> str:
    """The JSON or YAML of a workflow; of a Python file, what its get_workflow() builds."""
    if file.suffix != ".py":
        try:
            return file.read_text("utf-8")
        except UnicodeDecodeError:
            raise InvalidRequest("FILE", f"{file}: not UTF-8 text") from None
    path = file.absolute()  # as Python names it, and before it can change the folder
    try:
        return _built(file)
    # Whatever it does, and a script that has no get_workflow() may exit: the mistake is there.
    except (Exception, SystemExit) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest("FILE", _mistake(file, path, error)) from None


def _built(file: Path) -> str:
    """Raises InvalidRequest, and whatever the file does."""
    spec = importlib.util.spec_from_file_location("blobcask_workflow", file)
    if spec is None or spec.loader is None:
        raise InvalidRequest("FILE", f"{file}: not a Python file that can be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    build = getattr(module, "get_workflow", None)
    if not callable(build):
        raise InvalidRequest("FILE", f"{file}: it has no get_workflow()")
    built = build()
    # A builder will do, too: one forgets to call build().
    workflow = built.build() if hasattr(built, "build") else built
    if not hasattr(workflow, "to_json"):
        raise InvalidRequest("FILE", f"{file}: get_workflow() gives no workflow of highway_dsl")
    return str(workflow.to_json())


def _mistake(file: Path, path: Path, error: BaseException) -> str:
    """Where the `file`, at `path`, went wrong, and how, on one line. Of the frames only its own:
    those of whoever runs it, and of libraries, are nothing its author could mend."""
    # Late: most runs make no mistake.
    from workflows.engine.outcomes import told

    own = [frame for frame in traceback.extract_tb(error.__traceback__)
           if Path(frame.filename) == path]  # fmt: skip
    places = [f"line {frame.lineno} in {frame.name}" for frame in own[-_FRAMES:]]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        places, error = [f"line {error.lineno}"], SyntaxError(error.msg)
    said = " ".join(told(error).split())  # of some, many lines
    kind = type(error).__name__
    return f"{', '.join([str(file), *places])}: {kind}{f': {said}' if said else ''}"


def _input(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise InvalidRequest("--input", f"write KEY=VALUE, not {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("--input", f"{text!r}: not UTF-8 text") from None
    try:
        # As a server reads it: what that does not take, such as NaN and 1e400, is a text.
        return key, msgspec.json.decode(value)
    except RecursionError:
        raise InvalidRequest("--input", f"{key}: too deep") from None
    except ValueError:
        return key, value


@contextmanager
def _runs(call: Call, tenant: str | None, *, make: bool = False) -> Iterator[RunsView]:
    if call.server is not None:
        with call.remote() as remote:
            yield remote.runs(tenant or "")
        return
    # Late: a listing needs neither the tools nor the watcher, but the views do.
    from workflows.views import Workflows

    with call.open(make=make) as store:
        workflows = Workflows(store, load_keys(call.settings))
        try:
            yield LocalRuns(store, workflows, tenant or FIRST_TENANT, call.actor)
        finally:
            workflows.close()


def _open(runs: RunsView) -> list[str]:
    """The runs that have not ended, oldest first."""
    found: list[str] = []
    for status in (QUEUED, RUNNING, WAITING):
        cursor: str | None = None
        while True:
            page = runs.list(status, cursor, 1000)
            found += [run["run_id"] for run in page["runs"]]
            cursor = page["next_cursor"]
            if cursor is None:
                break
    return sorted(found)


def _carried_out(
    call: Call, runs: RunsView, run_ids: Collection[str]
) -> AbstractContextManager[Callable[[], bool]]:
    """Have runs carried out; a server does so by itself."""
    if isinstance(runs, LocalRuns):
        return runs.carried_out(run_ids, call.say)
    return nullcontext(lambda: False)


def _say_trouble(call: Call, form: JSON) -> None:
    """Say why nobody carries runs out."""
    for what in form.get("trouble", ()):  # a server of an earlier release tells none
        call.say(f"Trouble: {what}")


def follow(call: Call, runs: RunsView, run_id: str, check: Callable[[], bool]) -> JSON:
    """Tell each change of a step on stderr, until the run has ended; and that nobody carries it
    out, unless `check` says that this process does.

    Raises what `check` does: nobody carries the run out any more.
    """
    told: dict[tuple[str, str], str] = {}
    looks = 0  # in a row, at which nobody did
    while True:
        form = runs.get(run_id)
        for step in form["steps"]:
            name = (step["step"], step["iteration"])
            if told.get(name) != step["status"]:
                told[name] = step["status"]
                for line in _told(step):
                    call.say(line)
        if form["status"] in ENDED:
            return form
        looks = 0 if check() or not form.get("trouble") else looks + 1
        if looks == TROUBLE_LOOKS:
            _say_trouble(call, form)
        time.sleep(LOOK_S)


def _value(call: Call, runs: RunsView, run_id: str, step_id: str, iteration: str) -> Any:
    """What a step came to, whole; before that, what it shows. Raises NotFound, and WrongFound
    for one that came to an error, which it tells."""
    try:
        return runs.result(run_id, step_id, iteration)
    except NotFound:
        step = runs.step(run_id, step_id, iteration)
        if step["status"] in (FAILED, CANCELLED):
            for line in _told(step):
                call.say(line.strip())
            raise WrongFound from None
        if step["shown"] is None:
            raise
        return step["shown"]


def _told(step: JSON) -> Iterator[str]:
    """How a step is and, of what people do for the run to go on, where: whole, for a link that
    is cut leads nowhere."""
    name = f"{step['step']} #{step['iteration']}" if step["iteration"] else step["step"]
    shows = step["shown"] or step["result"]
    shows = shows if isinstance(shows, dict) else {}
    failed = step["status"] == FAILED
    reason = step["error"] if failed else str(shows.get("upload_url", ""))
    tried = f" after {step['attempts']} attempts" if failed and step["attempts"] > 1 else ""
    yield f"  {name}: {step['status']}{tried}" + (f" ({reason})" if reason else "")
    links = shows.get("links")
    unmailed: list[str] = []
    for link in links if isinstance(links, list) else ():
        if isinstance(link, dict) and {"approve_url", "reject_url"} <= link.keys():
            who = link.get("addressee") or "anybody"
            yield f"    {who} approves: {link['approve_url']}"
            yield f"    {who} rejects: {link['reject_url']}"
            if link.get("mailed") is False:  # a server that is older than this does not say
                unmailed.append(who)
    if unmailed and step["status"] == WAITING:
        yield f"    no mail goes to {', '.join(unmailed)}: pass the links on"


def _lines(form: JSON) -> Iterator[str]:
    yield f"{form['run_id']}  {form['name']}  {form['status']}"
    if form["error"]:
        yield f"error: {form['error']}"
    for step in form["steps"]:
        yield from _told(step)
    if form.get("steps_truncated"):
        yield "  …: of its loops only the steps that began last"
    tasks = {step["step"] for step in form["steps"]}
    variables = form["variables"]
    for name, value in variables.items():
        others = (other for each, other in variables.items() if each not in tasks)
        if name in tasks and any(other == value for other in others):
            continue  # told under its `result_key`
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        yield f"{name} = {_shortened(text)}"


def _shortened(text: str) -> str:
    """The beginning of a long text; an address that begins there is whole."""
    ends = (url.end() for url in _URL.finditer(text) if url.start() < VARIABLE_CHARS)
    chars = max(VARIABLE_CHARS, *ends, 0)
    return text if len(text) <= chars else f"{text[:chars]}…"
