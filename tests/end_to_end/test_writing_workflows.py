"""What README says to those who write workflows: its second one, and its words on the rest."""

from __future__ import annotations

import hashlib
import hmac
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from highway_dsl import RetryPolicy, WorkflowBuilder

from tests.conftest import CHECKOUT
from tests.end_to_end.payment import get_workflow
from tests.end_to_end.runs import Client
from tests.gateway.served import COMPLETE, WITH_RUNNER, Served, serving

pytestmark = pytest.mark.slow
INPUTS = {"payee": "Cleo", "amount": 100}


def test_the_workflow_of_the_readme_is_the_one_that_is_tested() -> None:
    tested = (CHECKOUT / "tests/end_to_end/payment.py").read_text()
    _, _, code = tested.partition('"""\n\n')
    assert code.strip() in (CHECKOUT / "README.md").read_text()


def press(served: Served, url: str) -> None:
    """The button of the page that a link opens."""
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert served.ask("POST", url, "comment=", headers=form).status in (200, 303)


@pytest.mark.parametrize(
    ("button", "status", "letter"),
    [
        ("approve_url", "approved", "100 EUR to CLEO"),
        ("reject_url", "rejected", "No money: rejected"),
        (None, "expired", "No money: expired"),
    ],
)
def test_a_decision_decides_the_way_and_completes_its_step(
    root: Path, button: str | None, status: str, letter: str
) -> None:
    definition = str(get_workflow().to_json())
    if button is None:
        assert '"expires_in": 86400' in definition
        definition = definition.replace('"expires_in": 86400', '"expires_in": 1')
    with serving(root, COMPLETE, SWEEPER__INTERVAL="1s") as served:
        client = Client(served)
        run_id = client.submit(definition, INPUTS)
        if button is not None:
            asked = client.variable(run_id, "decision")  # its links, while it waits
            assert [link["addressee"] for link in asked["links"]] == ["ada@example.org", "Bob"]
            press(served, asked["links"][1][button])
        run = client.end(run_id)
        assert run["status"] == "completed", run
        statuses = {step["step"]: step["status"] for step in run["steps"]}
        ways = ("completed", "skipped") if button == "approve_url" else ("skipped", "completed")
        assert statuses == {
            "ask": "completed",
            "approved": "completed",
            "order": ways[0],
            "refuse": ways[1],
            "link": "completed",
        }
        assert run["variables"]["decision"]["status"] == status
        url = run["variables"]["letter_url"]
        answer = served.ask("GET", urlsplit(url)._replace(scheme="", netloc="").geturl())
        assert (answer.status, answer.body.decode()) == (200, letter)


def test_what_templates_know(root: Path) -> None:
    builder = WorkflowBuilder(name="templates")
    of_item = "{{index}} {{loop.index}}/{{loop.length}} {{item.name | upper}}"
    text = f"{of_item} {{{{run_id}}}} {{{{unknown | default('-')}}}}"
    builder.foreach(
        "each",
        "{{files}}",
        lambda body: body.task(
            "keep", "tools.storage.store", kwargs={"name": "n", "data": text}, result_key="kept"
        ).task("read", "tools.storage.retrieve", args=["{{kept}}"]),
    )
    builder.task(
        "all",
        "tools.storage.store",
        kwargs={
            "name": "all",
            "data": "{{each.results}} {{each.count + 1}} {{files[0].name ~ files.1.name}}",
        },
    )
    builder.task("whole", "tools.storage.retrieve", args=["{{all.storage_ref}}"])
    with serving(root, WITH_RUNNER) as served:
        client = Client(served)
        inputs = {"files": [{"name": "a"}, {"name": "b"}]}
        run_id = client.submit(str(builder.build().to_json()), inputs)
        variables = client.end(run_id)["variables"]
    results = [f"0 1/2 A {run_id} -", f"1 2/2 B {run_id} -"]
    assert variables["each"] == {"results": results, "count": 2}
    assert variables["whole"] == f'["{results[0]}","{results[1]}"] 3 ab'


def test_a_shell_is_called_by_name_and_a_command_that_fails_is_tried_again(root: Path) -> None:
    tries = root / "tries"
    script = (
        f'echo "$1" >> {tries}; test $(wc -l < {tries}) -ge 3 && tr a-z A-Z < {tries} | tail -1'
    )
    builder = WorkflowBuilder(name="commands")
    builder.task("plain", "tools.shell.run", args=["echo a | tr a b > c"])
    command = "sh -c 'echo \"$1\" | tr a-z A-Z' sh {{who}}"
    builder.task("upper", "tools.shell.run", args=[command])
    builder.task(
        "shell",
        "tools.shell.run",
        args=[f"sh -c '{script}' sh {{{{who}}}}"],
        retry_policy=RetryPolicy(max_retries=2, delay=timedelta(0)),
        result_key="said",
    )
    builder.condition(
        "same",
        condition="{{said.stdout}} == 'O NEIL; $(ID)'",
        if_true=lambda way: way.task("yes", "tools.shell.run", args=["true"]),
        if_false=lambda way: way.task("no", "tools.shell.run", args=["false"]),
    )
    with serving(root, WITH_RUNNER, WORKFLOWS__ALLOW_SHELL="yes") as served:
        client = Client(served)
        run = client.end(client.submit(str(builder.build().to_json()), {"who": "o neil; $(id)"}))
    assert run["status"] == "completed", run
    assert run["variables"]["plain"]["stdout"] == "a | tr a b > c"
    assert run["variables"]["upper"]["stdout"] == "O NEIL; $(ID)"
    assert run["variables"]["yes"]["exit_code"] == 0


def test_members_of_a_scheme_stand_in_signature_config(root: Path) -> None:
    builder = WorkflowBuilder(name="hooked")
    config = {"kind": "generic", "secret_id": "acme", "header": "X-Acme", "prefix": "sha256="}
    builder.task(
        "register",
        "tools.workflow.register_webhook",
        kwargs={"webhook_path": "acme", "signature_config": config},
        result_key="hook",
    )
    builder.task(
        "wait",
        "tools.workflow.wait_for_event",
        args=["{{hook.event_name}}"],
        result_key="called",
    )
    with serving(root, WITH_RUNNER) as served:
        command = [sys.executable, "-m", "cas", "secret", "set", "acme"]
        subprocess.run(
            command, env=served.environ, cwd=CHECKOUT, input=b"s3cret", check=True, timeout=60
        )
        client = Client(served)
        run_id = client.submit(str(builder.build().to_json()))
        url = client.variable(run_id, "hook")["webhook_url"]
        body = '{"done": true}'
        signature = hmac.new(b"s3cret", body.encode(), hashlib.sha256).hexdigest()
        signed = {"X-Acme": f"sha256={signature}", "Content-Type": "application/json"}
        assert served.ask("POST", url, body, headers=signed).status == 200
        run = client.end(run_id)
    assert run["variables"]["called"]["body"] == {"done": True}
