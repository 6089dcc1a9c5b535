"""Runs over HTTP: submitted, shown, listed, cancelled, and nobody else's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from highway_dsl import WorkflowBuilder

from cas.catalog import Transaction
from cas.config import Settings, StoreSettings
from cas.records import COMPLETED, Step
from cas.store import Store
from gateway.workflows import PIECE_BYTES
from tests.clocks import KEEP_US
from tests.gateway.served import Answer, Served, serving
from workflows.run_log import RunLog
from workflows.run_view import STEPS_TOLD_MAX, TOLD_BYTES_MAX
from workflows.submissions import INPUTS_BYTES_MAX

PATH = "/api/v1/workflows"


def definition(
    build: Callable[[WorkflowBuilder], object] | None = None, name: str = "example"
) -> str:
    builder = WorkflowBuilder(name=name)
    if build is None:
        builder.task(
            "keep", "tools.storage.store", kwargs={"name": "n", "data": "{{text | default}}"}
        )
    else:
        build(builder)
    return str(builder.build().to_json())


def submit(served: Served, *, token: str = "", key: str = "", **form: Any) -> Answer:
    headers = {"Idempotency-Key": key} if key else {}
    body = json.dumps({"definition": definition(), **form})
    return served.ask("POST", PATH, body, token=token or served.admin, headers=headers)


def code(answer: Answer) -> str:
    """The code of a refusal in the form of this family."""
    assert answer.form["status"] == "error"
    assert answer.form["message"]
    return str(answer.form["code"])


def test_a_workflow_is_submitted_and_shown(served: Served) -> None:
    answer = submit(served, inputs={"text": "hello"})
    assert answer.status == 201
    run_id = answer.form["run_id"]
    assert answer.headers["location"] == f"{PATH}/{run_id}"
    shown = served.ask("GET", f"{PATH}/{run_id}", token=served.admin)
    assert shown.status == 200
    assert (shown.form["name"], shown.form["status"]) == ("example", "queued")  # no runner here
    assert shown.form["inputs"] == shown.form["variables"] == {"text": "hello"}
    assert shown.form["steps"] == []
    assert shown.headers["cache-control"] == "no-store"
    assert shown.form["trouble"] == ["no runner runs: workflows wait"]
    listed = served.ask("GET", PATH, token=served.admin)
    assert listed.form["trouble"] == ["no runner runs: workflows wait"]
    cancelled = served.ask("POST", f"{PATH}/{run_id}/cancel", token=served.admin)
    assert cancelled.status == 200
    ended = served.ask("GET", f"{PATH}/{run_id}", token=served.admin)
    assert ended.form["trouble"] == []  # whoever else waits


def test_a_definition_may_be_an_object_or_yaml(served: Served) -> None:
    assert submit(served, definition=json.loads(definition())).status == 201
    builder = WorkflowBuilder(name="example")
    builder.task("keep", "tools.storage.store", kwargs={"name": "n", "data": "x"})
    assert submit(served, definition=builder.build().to_yaml()).status == 201


@pytest.mark.parametrize(
    ("form", "told"),
    [({"inputs": ["x"]}, "object"), ({"definition": 1}, "str"), ({"definition": None}, "str")],
)
def test_a_definition_or_inputs_of_another_type_are_refused(
    served: Served, form: dict[str, Any], told: str
) -> None:
    answer = submit(served, **form)
    assert (answer.status, code(answer)) == (400, "INVALID_REQUEST")
    assert told in answer.form["message"]


def test_inputs_that_are_too_long_are_refused_before_anything_is_built(served: Served) -> None:
    values = "[]," * (INPUTS_BYTES_MAX // 3) + "[]"
    body = f'{{"definition":"no definition","inputs":{{"x":[{values}]}}}}'
    answer = served.ask("POST", PATH, body, token=served.admin)
    assert (answer.status, code(answer)) == (413, "TOO_LARGE")
    assert answer.form["limit_bytes"] == INPUTS_BYTES_MAX


def test_spaces_and_escapes_make_inputs_no_longer(served: Served) -> None:
    text = "é" * (INPUTS_BYTES_MAX // 4)
    form = {"definition": definition(), "inputs": {"text": text, "more": [0] * 1000}}
    body = json.dumps(form, indent=200)
    assert len(body) > INPUTS_BYTES_MAX * 3 // 2
    answer = served.ask("POST", PATH, body, token=served.admin)
    assert answer.status == 201, answer.body
    run = served.ask("GET", f"{PATH}/{answer.form['run_id']}", token=served.admin).form
    assert run["inputs"]["text"] == text


def test_the_same_key_runs_it_once(served: Served) -> None:
    first = submit(served, key="once-please")
    assert submit(served, key="once-please").form == first.form
    again = submit(served, key="once-please", inputs={"text": "other"})
    assert (again.status, code(again)) == (422, "IDEMPOTENCY_KEY_REUSED")


def test_runs_are_listed_by_page_and_state(served: Served) -> None:
    token = served.token("manage_workflows", tenant="lister")
    submitted = [submit(served, token=token).form["run_id"] for _ in range(3)]
    page = served.ask("GET", f"{PATH}?limit=2", token=token).form
    assert [run["run_id"] for run in page["runs"]] == submitted[:0:-1]
    rest = served.ask("GET", f"{PATH}?limit=2&cursor={page['next_cursor']}", token=token).form
    assert [run["run_id"] for run in rest["runs"]] == submitted[:1]
    assert rest["next_cursor"] is None
    assert len(served.ask("GET", f"{PATH}?status=queued", token=token).form["runs"]) == 3
    assert served.ask("GET", f"{PATH}?status=completed", token=token).form["runs"] == []
    assert served.ask("GET", f"{PATH}?status=odd", token=token).status == 400


def test_a_run_is_cancelled_once(served: Served) -> None:
    run_id = submit(served).form["run_id"]
    cancelled = served.ask("POST", f"{PATH}/{run_id}/cancel", token=served.admin)
    assert (cancelled.status, cancelled.form["status"]) == (200, "cancelled")
    again = served.ask("POST", f"{PATH}/{run_id}/cancel", token=served.admin)
    assert (again.status, code(again)) == (409, "RUN_ENDED")


@pytest.mark.parametrize(
    ("build", "wanted", "fact"),
    [
        (lambda b: b.task("a", "tools.odd.thing"), "INVALID_WORKFLOW", "tools.odd.thing"),
        (
            lambda b: b.while_loop("again", "{{x}}", lambda f: f.task("a", "tools.shell.run")),
            "OPERATOR_UNSUPPORTED",
            "while",
        ),
        (lambda b: b.task("a", "t", dependencies=["b"]), "INVALID_WORKFLOW", "not there"),
    ],
)
def test_what_cannot_run_is_refused_with_its_name(
    served: Served, build: Callable[[WorkflowBuilder], object], wanted: str, fact: str
) -> None:
    answer = submit(served, definition=definition(build))
    assert (answer.status, code(answer)) == (400, wanted)
    assert fact in answer.form["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"definition": 5}', b'{"definition": "", "more": 1}', b"\xff",
     b'{"definition": "{}", "inputs": []}', b"[" * 100_000],
)  # fmt: skip
def test_a_body_that_is_no_submission_is_refused(served: Served, body: bytes) -> None:
    answer = served.ask("POST", PATH, body, token=served.admin)
    assert answer.status == 400
    assert code(answer).startswith("INVALID_")


def test_a_member_that_is_there_twice_is_refused(served: Served) -> None:
    text = json.dumps(definition())
    body = f'{{"definition": {text}, "inputs": {{"text": "a"}}, "inputs": {{"text": "b"}}}}'
    answer = served.ask("POST", PATH, body, token=served.admin)
    assert (answer.status, code(answer)) == (400, "INVALID_REQUEST")
    assert "there twice" in answer.form["message"]


def test_a_submission_has_a_limit(served: Served) -> None:
    assert submit(served, inputs={"text": "x" * (1 << 21)}).status == 413
    assert submit(served, definition="x" * (1 << 21)).status == 413


def test_only_who_manages_workflows_may_and_only_the_own_ones(served: Served) -> None:
    run_id = submit(served).form["run_id"]
    weak = served.token("emit_events", "manage_storage")
    other = served.token("manage_workflows", tenant="other")
    assert submit(served, token=weak).status == 403
    assert served.ask("GET", PATH, token=weak).status == 403
    for token in (weak, other):
        for method, path in (("GET", run_id), ("POST", f"{run_id}/cancel"), ("GET", "nothing")):
            assert served.ask(method, f"{PATH}/{path}", token=token).status == 404
    assert served.ask("GET", PATH, token=other).form["runs"] == []
    nobody = served.ask("POST", PATH, b"{}")
    assert (nobody.status, code(nobody)) == (401, "UNAUTHORIZED")


# --- what a step came to


# Names that mean something in an address, and one that is longer than an entry of the index.
ODD_NAMES = ("a b", "é?x=1&y", "%2F", "50%", "result", "...", "{x}", "a;b,c", "+", "\n", "ß" * 200)


def finished(served: Served, results: dict[tuple[str, str], Any]) -> str:
    """A run whose steps came to these; one that came to None waits."""
    run_id: str = submit(served).form["run_id"]
    with Store.open(served.root, Settings(store=StoreSettings(root=served.root))) as store:
        log = RunLog(store.catalog, run_id, keep_us=KEEP_US, events_keep_us=KEEP_US)
        log.start()
        for (step, iteration), result in results.items():
            log.begin(step, iteration)
            if result is None:
                log.wait(step, iteration, {"link": "x"})
            else:
                log.finish(step, iteration, result)
    return run_id


def ask_step(served: Served, path: str, token: str = "") -> Answer:
    return served.ask("GET", f"{PATH}/{path}", token=token or served.admin)


def test_what_a_step_came_to_is_told_by_its_name_and_iteration(served: Served) -> None:
    run_id = finished(served, {("keep", ""): {"a": [1, None, "é"]}, ("keep", "1.0"): "of an item"})
    result = ask_step(served, f"{run_id}/steps/keep/result")
    assert (result.status, json.loads(result.body)) == (200, {"a": [1, None, "é"]})
    assert result.headers["content-type"] == "application/json"
    assert result.headers["content-length"] == str(len(result.body))
    assert result.headers["cache-control"] == "no-store"
    of_item = ask_step(served, f"{run_id}/steps/keep/result?iteration=1.0")
    assert of_item.body == b'"of an item"'
    shown = ask_step(served, run_id).form
    for step, query in zip(shown["steps"], ("", "?iteration=1.0"), strict=True):
        assert ask_step(served, f"{run_id}/steps/keep{query}").form == step
        assert step["status"] == "completed"
        assert step["value_bytes"] == len(compact(step["result"]))


def test_of_very_many_steps_the_newest_are_told_and_all_are_listed(served: Served) -> None:
    run_id = finished(served, {("keep", ""): "first"})
    with Store.open(served.root, Settings(store=StoreSettings(root=served.root))) as store:

        def change(txn: Transaction) -> None:
            for item in range(STEPS_TOLD_MAX):
                txn.insert(Step(run_id, "é old", str(item), COMPLETED, 1, txn.now_us + item))

        store.catalog.write(change, actor="x")
    form = ask_step(served, run_id).form
    assert form["steps_truncated"]
    told = [(step["step"], step["iteration"]) for step in form["steps"]]
    assert told == [("keep", "")] + [("é old", str(item)) for item in range(1, STEPS_TOLD_MAX)]
    assert form["variables"]["keep"] == "first"

    listed: list[dict[str, Any]] = []
    query = "limit=400"
    while True:
        page = ask_step(served, f"{run_id}/steps?{query}").form
        assert 1 <= len(page["steps"]) <= 400
        listed += page["steps"]
        if page["next_cursor"] is None:
            break
        query = urlencode({"limit": 400, "cursor": page["next_cursor"]})
    names = [(step["step"], step["iteration"]) for step in listed]
    assert names == sorted({*told, ("é old", "0")})
    assert listed[0] == ask_step(served, f"{run_id}/steps/keep").form


def test_a_cursor_of_steps_may_be_anything_that_is_not_too_long(served: Served) -> None:
    run_id = finished(served, {("keep", ""): "first"})
    for cursor in ("", ":", "zzz", "keep:", "é" * 400, "\x00:\x00"):
        answer = ask_step(served, f"{run_id}/steps?{urlencode({'cursor': cursor})}")
        assert answer.status == 200
        assert len(answer.form["steps"]) == (cursor in ("", ":", "\x00:\x00"))
    answer = ask_step(served, f"{run_id}/steps?cursor={'x' * 401}")
    assert (answer.status, code(answer)) == (400, "INVALID_REQUEST")
    assert ask_step(served, "nothing/steps").status == 404


def compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def test_a_step_may_have_any_name(served: Served) -> None:
    run_id = finished(served, {(name, ""): name for name in ODD_NAMES})
    for name in ODD_NAMES:
        path = f"{run_id}/steps/{quote(name, safe='')}"
        assert ask_step(served, path).form["step"] == name
        assert json.loads(ask_step(served, f"{path}/result").body) == name


def test_a_result_that_is_too_large_for_its_run_is_told_whole(served: Served) -> None:
    long, longer = "x" * TOLD_BYTES_MAX, "é" * (PIECE_BYTES + 1)  # two bytes each
    run_id = finished(served, {("a b", ""): long, ("c", "2"): longer})
    form = ask_step(served, run_id).form
    told = [step["result"] for step in form["steps"]]
    assert [cut["truncated"] for cut in told] == [True, True]
    assert form["variables"]["a b"] == told[0]
    for cut, value in zip(told, (long, longer), strict=True):
        answer = served.ask("GET", cut["result_url"], token=served.admin)
        assert answer.headers["content-length"] == str(cut["size_bytes"])
        assert answer.body == compact(value)
        head = served.ask("HEAD", cut["result_url"], token=served.admin)
        assert (head.headers["content-length"], head.body) == (str(cut["size_bytes"]), b"")


def test_the_result_of_a_loop_is_told_whole(served: Served) -> None:
    items = [{"text": "y" * 300_000} for _ in range(20)]
    run_id = finished(served, {("each", ""): {"results": items, "count": len(items)}})
    answer = ask_step(served, f"{run_id}/steps/each/result")
    assert answer.form == {"results": items, "count": 20}


def test_a_step_that_came_to_nothing_is_as_absent_as_any(served: Served) -> None:
    run_id = finished(served, {("done", ""): 1, ("waits", ""): None})
    weak, other = served.token("emit_events"), served.token("manage_workflows", tenant="other")
    assert ask_step(served, f"{run_id}/steps/waits").form["shown"] == {"link": "x"}
    refused = [
        ask_step(served, f"{run_id}/steps/waits/result"),
        ask_step(served, f"{run_id}/steps/none/result"),
        ask_step(served, f"{run_id}/steps/none"),
        ask_step(served, f"{run_id}/steps/done?iteration=0"),
        ask_step(served, f"{run_id}/steps/done/result?iteration={'%00' * 200}"),
        ask_step(served, f"nothing/steps/done/result?iteration={'9' * 1000}"),
        ask_step(served, f"nothing/steps/{'%00' * 500}"),
        *(
            ask_step(served, f"{run_id}/steps/done{end}", token)
            for token in (weak, other)
            for end in ("", "/result")
        ),
    ]
    assert {(answer.status, answer.body) for answer in refused} == {(404, refused[0].body)}
    assert code(refused[0]) == "NOT_FOUND"


# --- how many


def test_a_tenant_has_so_many_open_runs_and_no_more(root: Path) -> None:
    with serving(root, LIMITS__TENANT_RUNS="2") as server:
        first = submit(server, key="first")
        assert [first.status, submit(server).status] == [201, 201]
        refused = submit(server)
        assert (refused.status, code(refused)) == (429, "TOO_MANY_RUNS")
        assert (refused.form["limit"], refused.form["open"]) == (2, 2)
        assert submit(server, key="first").form == first.form  # it is there
        theirs = server.token("manage_workflows", tenant="theirs")
        assert submit(server, token=theirs).status == 201
        run_id = first.form["run_id"]
        assert server.ask("POST", f"{PATH}/{run_id}/cancel", token=server.admin).status == 200
        assert submit(server).status == 201


def test_submissions_are_counted_for_each_tenant(root: Path) -> None:
    with serving(root, LIMITS__TENANT_SUBMISSIONS="2/m") as server:
        answers = [submit(server), submit(server, definition="{}"), submit(server)]
        assert [answer.status for answer in answers] == [201, 400, 429]
        assert code(answers[-1]) == "TOO_MANY_REQUESTS"
        assert answers[-1].form["what"] == "submissions"
        assert int(answers[-1].headers["retry-after"]) > 0
        theirs = server.token("manage_workflows", tenant="theirs")
        assert submit(server, token=theirs).status == 201
        assert server.ask("GET", PATH, token=server.admin).status == 200
