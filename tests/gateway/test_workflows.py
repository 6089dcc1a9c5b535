"""Runs over HTTP: submitted, shown, listed, cancelled, and nobody else's."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from highway_dsl import WorkflowBuilder

from tests.gateway.served import Answer, Served

PATH = "/api/v1/workflows"


def definition(
    build: Callable[[WorkflowBuilder], object] | None = None, name: str = "example"
) -> str:
    builder = WorkflowBuilder(name=name)
    if build is None:
        builder.task("keep", "tools.storage.store", kwargs={"name": "n", "data": "{{text}}"})
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


def test_a_definition_may_be_an_object_or_yaml(served: Served) -> None:
    assert submit(served, definition=json.loads(definition())).status == 201
    builder = WorkflowBuilder(name="example")
    builder.task("keep", "tools.storage.store", kwargs={"name": "n", "data": "x"})
    assert submit(served, definition=builder.build().to_yaml()).status == 201


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
