"""The summarization while everything is killed, again and again, at random moments.

Gateway, runner and replicator die together by SIGKILL and are started again on the same
address, while whoever uploads and decides goes on with one request after the other. Only what
a kill cut off is tried again: an answer other than the right one fails the test. What happened
is counted by those outside: the language model's server and the mail server, which outlive
every kill.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, final
from urllib.parse import urlsplit

import pytest

from cas.once import step_key
from cas.records import ENDED, Step
from tests.end_to_end.mailbox import Mailbox
from tests.end_to_end.runs import Client, acceptance, steps_in
from tests.gateway.served import COMPLETE, Served, serving
from tests.workflows.llm_server import Asked, LlmServer
from tests.workflows.papers import papers

pytestmark = pytest.mark.slow

PAPERS = papers()

EDITOR = "editor@example.org"
PATIENCE_S = 120.0


def definition() -> str:
    """The acceptance workflow, whose digest an editor approves before anybody gets its URL."""
    form = json.loads(acceptance())
    tasks = form["tasks"]
    tasks["ask_editor"] = {
        **tasks["store_summary"],
        "task_id": "ask_editor",
        "function": "tools.workflow.request_approval",
        "kwargs": {
            "approval_key": "publish",
            "title": "Publish {{stored_file.name}}?",
            "addressees": [EDITOR],
        },
        "dependencies": ["store_summary"],
        "result_key": "decision",
    }
    tasks["get_public_url"]["dependencies"] = ["ask_editor"]
    return json.dumps(form)


@final
class Mortal:
    """A server that is killed and started again on the same address."""

    def __init__(self, root: Path, settings: dict[str, str]) -> None:
        self.root = root
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        port = self._listener.getsockname()[1]
        self._settings = {"GATEWAY__PUBLIC_URL": f"http://127.0.0.1:{port}", **settings}
        self._running = ExitStack()
        self.served = self._start()
        self.admin = self.served.admin
        self.deaths = 0

    def _start(self) -> Served:
        up = serving(self.root, COMPLETE, self._listener, **self._settings)
        return self._running.enter_context(up)

    def die(self) -> None:
        """All its processes at once, as when the machine's power goes."""
        for pid in [self.served.process.pid, *_below(self.served.process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self._running.close()
        self.deaths += 1
        self.served = self._start()

    def close(self) -> None:
        self._running.close()
        self._listener.close()


def _below(pid: int) -> list[int]:
    """The children of a process, and theirs."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [found for child in map(int, children) for found in (child, *_below(child))]


@final
class Person:
    """Does what a run waits for, one small request after the other; the server may die.

    With `cuts` it has the server die once, while it sends a paper.
    """

    def __init__(
        self, mortal: Mortal, mailbox: Mailbox, run_id: str, *, cuts: bool = False
    ) -> None:
        self._cuts = cuts
        self._mortal = mortal
        self._mailbox = mailbox
        self._run_id = run_id
        self.run: dict[str, Any] = {}
        self.cut: Counter[str] = Counter()  # what was under way when the server died
        self._doing = ""

    def go_on(self) -> bool:
        """Try the next thing; whether the run has ended."""
        client = Client(self._mortal.served, self._mortal.admin)
        try:
            self._doing = "look"
            self.run = client.run(self._run_id)
            if self.run["status"] in ENDED:
                return True
            for step in self.run["steps"]:
                if step["status"] == "waiting":
                    self._help(client, step)
        except (OSError, HTTPException):
            self.cut[self._doing] += 1
        return False

    def _help(self, client: Client, step: dict[str, Any]) -> None:
        """Do it, unless it is done: the answer to that may have been cut off."""
        if step["step"] == "wait_for_pdfs":
            token = self.run["variables"]["upload_request"]["upload_token"]
            if client.info(token)["status"] == "pending":
                self._doing = "upload"
                if self._cuts:
                    self._cuts = False
                    self._send_half(client.info(token)["presigned_urls"][0])
                client.send(token, [(paper.filename, paper.data) for paper in PAPERS])
                self._doing = "complete"
                client.complete(token)
        elif step["step"] == "ask_editor":
            if step["shown"] is None:  # it was decided while the run was read
                return
            (links,) = step["shown"]["links"]
            found = [mail for mail in self._mailbox.mails if links["approve_url"] in mail.text]
            if not found:  # the mail with it is still on its way
                return
            approval = client.served.ask(
                "GET", f"/api/v1/approvals/{step['shown']['approval_id']}", token=client.token
            )
            assert approval.status == 200, approval.body
            if approval.form["status"] == "pending":
                self._doing = "decide"
                parts = urlsplit(links["approve_url"])
                answer = client.served.ask(
                    "POST", f"{parts.path}?{parts.query}", headers={"Accept": "application/json"}
                )
                assert answer.status == 200, answer.body

    def _send_half(self, url: str) -> None:
        """By a connection whose worker has answered before: it is no other's when that dies."""
        parts, paper = urlsplit(url), PAPERS[0]
        half = len(paper.data) // 2
        connection = HTTPConnection("127.0.0.1", self._mortal.served.port, timeout=PATIENCE_S)
        with closing(connection):
            connection.request("GET", "/healthz")
            connection.getresponse().read()
            connection.putrequest(
                "PUT", f"{parts.path}?{parts.query}&filename={PAPERS[0].filename}"
            )
            connection.putheader("Content-Type", "application/pdf")
            connection.putheader("Content-Length", str(len(paper.data)))
            connection.endheaders(paper.data[:half])
            self._mortal.die()
            connection.send(paper.data[half:])
            answered = connection.getresponse().status
        raise AssertionError(f"what had died answered {answered}")


@contextmanager
def killable(root: Path, llm: LlmServer, mailbox: Mailbox) -> Iterator[Mortal]:
    mortal = Mortal(
        root,
        {
            "LLM__BASE_URL": llm.url,
            "WORKFLOWS__ALLOW_SHELL": "yes",
            "MAIL__HOST": "127.0.0.1",
            "MAIL__PORT": str(mailbox.port),
            "MAIL__SECURITY": "none",
            "MAIL__SENDER": "blobcask@example.org",
        },
    )
    try:
        yield mortal
    finally:
        mortal.close()


def run_through(
    mortal: Mortal,
    mailbox: Mailbox,
    chance: random.Random,
    within_s: float = 0.0,
    *,
    cuts: bool = False,
) -> Person:
    """One run, with a kill or two somewhere in its first `within_s` seconds; 0: with none."""
    client = Client(mortal.served, mortal.admin)
    run_id = client.submit(definition(), key=f"run-{chance.random()}")
    began = time.monotonic()
    many = chance.choice((1, 1, 2)) if within_s else 0
    kills = sorted(chance.uniform(0, within_s) for _ in range(many))
    person = Person(mortal, mailbox, run_id, cuts=cuts)
    over = threading.Event()

    def kill() -> None:
        for kill_s in kills:
            if over.wait(max(0.0, began + kill_s - time.monotonic())):
                return
            mortal.die()

    with ThreadPoolExecutor(1) as killer:
        killing = killer.submit(kill)
        try:
            while not person.go_on():
                passed_s = time.monotonic() - began
                assert passed_s < PATIENCE_S, json.dumps(person.run, indent=1)
        finally:
            over.set()
        killing.result()
    return person


def judge(mortal: Mortal, run: dict[str, Any], asked: list[Asked], mailbox: Mailbox) -> None:
    assert run["status"] == "completed", run
    client = Client(mortal.served, mortal.admin)
    # One upload link.
    uploads = client.served.ask("GET", "/api/v1/uploads?limit=1000", token=client.token).form
    own = [one for one in uploads["uploads"] if one["workflow_run_id"] == run["run_id"]]
    assert [one["status"] for one in own] == ["completed"]
    # One combined file.
    files = client.served.ask(
        "GET", f"/api/v1/storage?run={run['run_id']}&name=research_digest", token=client.token
    ).form["files"]
    assert [file["storage_ref"] for file in files] == [
        run["variables"]["stored_file"]["storage_ref"]
    ]
    # No summary was asked for again once its step had finished.
    ended = {key_of(step): step.ended_at or 0 for step in steps_in(mortal.root, run["run_id"])}
    assert len({one.key for one in asked}) == 4, "three papers and their digest"
    for one in asked:
        assert one.at_s * 1_000_000 <= ended[one.key], (
            "it was asked for again after it had finished"
        )
    # One link for the editor, however often the mail with it was sent.
    mails = [
        mail for mail in mailbox.mails if run["variables"]["decision"]["approval_id"] in mail.text
    ]
    assert len({mail.message_id for mail in mails}) == 1
    assert {mail.recipient for mail in mails} == {EDITOR}


def key_of(step: Step) -> str:
    """The Idempotency-Key with which a step asks the language model."""
    name = f"{step.step_id}#{step.iteration}" if step.iteration else step.step_id
    key = step_key(step.run_id, name, "llm.call")
    return hashlib.sha256(f"default/{key.scope}/{key.name}".encode()).hexdigest()


def storm(root: Path, runs: int, seed: int) -> Counter[str]:
    """So many runs that were killed, and one more whose kill cuts a request off for certain."""
    chance = random.Random(seed)
    counts: Counter[str] = Counter()
    with LlmServer() as llm, Mailbox() as mailbox, killable(root, llm, mailbox) as mortal:
        within_s = 0.0  # what the quickest run takes that nobody kills
        while True:
            cuts = counts["killed"] >= runs
            began, before, deaths = time.monotonic(), len(llm.asked), mortal.deaths
            person = run_through(mortal, mailbox, chance, 0.0 if cuts else within_s, cuts=cuts)
            if mortal.deaths == deaths:
                took_s = time.monotonic() - began
                within_s = min(within_s or took_s, took_s)
            judge(mortal, person.run, llm.asked[before:], mailbox)
            counts["runs"] += 1
            counts["cut"] += person.cut.total()
            counts += Counter({f"cut {what}": times for what, times in person.cut.items()})
            counts["killed"] += mortal.deaths > deaths
            if cuts:
                break
            assert counts["runs"] <= 10 * runs, f"the kills come too late: {counts}"
        counts["deaths"] = mortal.deaths
        counts["asked"] = len(llm.asked)
        counts["mails"] = len(mailbox.mails)
        addressed = {mail.message_id for mail in mailbox.mails}
        assert len(addressed) == counts["runs"], "one approval for each run"
    return counts


@pytest.mark.timeout(1800)
def test_killed_runs_complete_with_nothing_done_twice(root: Path) -> None:
    counts = storm(root, 2, seed=1)
    assert counts["killed"] >= 3
    assert counts["cut upload"]


@pytest.mark.soak
def test_fifty_killed_runs(root: Path) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)  # noqa: T201  to tell what a failure was
    counts = storm(root, 50, seed)
    print(dict(counts))  # noqa: T201  what the kills met
    assert counts["killed"] >= 50
