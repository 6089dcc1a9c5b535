"""A workflow that waits for files: whenever they come, or do not, it ends as it should
(invariant 13)."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from highway_dsl import WorkflowBuilder

from cas.records import CANCELLED, COMPLETED, FAILED, WAITING
from cas.sweep import execute_sweep, plan_sweep
from tests.workflows.running import ACTOR, TENANT, Bench, bench, scratch, until
from workflows.engine.runner import Runner

WAIT = "tools.workflow.wait_for_event"


@pytest.fixture
def work() -> Iterator[Bench]:
    from pathlib import Path

    with scratch() as folder, bench(Path(folder) / "store") as made:
        yield made


def asking(timeout_s: int | None = 600) -> WorkflowBuilder:
    builder = WorkflowBuilder(name="asking")
    builder.task(
        "ask", "tools.storage.request_upload", kwargs={"name": "papers"}, result_key="asked"
    )
    kwargs = {"event_name": "{{asked.event_name}}", "timeout_seconds": timeout_s}
    builder.task("wait", WAIT, kwargs=kwargs, result_key="sent")
    return builder


def upload(work: Bench, run: str) -> str:
    """The token of the upload that a run has asked for."""
    until(lambda: "asked" in work.view(run).variables, "it asks")
    return str(work.view(run).variables["asked"]["upload_token"])


def complete(work: Bench, token: str, text: bytes = b"some words") -> None:
    link = work.store.upload_link(token)
    link.put(0, text, filename="a.txt")
    link.complete()


def names(work: Bench, run: str) -> list[str]:
    return [file["filename"] for file in work.view(run).variables["sent"]["files"]]


def test_an_upload_that_is_completed_before_the_wait_is_found(work: Bench) -> None:
    """The step between asking and waiting holds the run until the files are there."""
    here = threading.Event()
    work.registry.add("t.hold", lambda calling: here.wait(60))
    builder = WorkflowBuilder(name="early")
    builder.task("ask", "tools.storage.request_upload", kwargs={"name": "x"}, result_key="asked")
    builder.task("hold", "t.hold")
    builder.task("wait", WAIT, kwargs={"event_name": "{{asked.event_name}}"}, result_key="sent")
    work.start()
    run = work.submit(builder)
    complete(work, upload(work, run))
    here.set()
    assert work.ended(run).run.status == COMPLETED
    assert names(work, run) == ["a.txt"]


def test_an_upload_that_is_completed_during_the_wait_wakes_the_run(work: Bench) -> None:
    work.start()
    run = work.submit(asking())
    token = upload(work, run)
    work.until_status(run, "wait", WAITING)
    complete(work, token)
    assert work.ended(run).run.status == COMPLETED
    assert names(work, run) == ["a.txt"]


@pytest.mark.parametrize("place", ["called", "subscribed", "suspending"])
def test_an_upload_that_is_completed_while_the_step_falls_asleep_is_not_missed(
    work: Bench, place: str
) -> None:
    """The runner stands still at the place until the upload is completed."""
    stood, go = threading.Event(), threading.Event()

    def at(here: str) -> None:
        if here == place and not stood.is_set():
            # Of the steps only the second one comes to wait.
            if place == "called" and "asked" not in work.view(run).variables:
                return
            stood.set()
            assert go.wait(60)

    run = work.submit(asking())
    runner = Runner(work.store, work.workflows, registry=work.registry, at=at)
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        token = upload(work, run)
        assert stood.wait(60)
        complete(work, token)
        go.set()
        until(lambda: work.view(run).run.status == COMPLETED, "it wakes")
    finally:
        go.set()
        runner.stop()
        thread.join()
    assert names(work, run) == ["a.txt"]


def test_who_comes_after_the_time_finds_a_run_that_has_ended_and_a_closed_link(
    work: Bench,
) -> None:
    """The wait times out, the run fails, and its link is closed with it: nobody shall send
    files that nobody waits for."""
    work.start()
    run = work.submit(asking(timeout_s=1))
    token = upload(work, run)
    ended = work.ended(run)
    assert ended.run.status == FAILED
    assert "timed out" in ended.run.error
    assert work.store.upload_link(token).upload.status == CANCELLED


def test_a_late_upload_is_there_for_a_run_that_goes_on_after_its_time(work: Bench) -> None:
    """A wait that is over may be tolerated; the files that come later are stored all the same,
    and a later wait of the run gets them."""
    builder = asking(timeout_s=1)
    builder.task("anyway", "t.say", args=["in any case"], trigger_rule="all_done")
    builder.task("again", WAIT, kwargs={"event_name": "{{asked.event_name}}"}, result_key="late")
    work.start()
    run = work.submit(builder)
    token = upload(work, run)
    work.until_status(run, "wait", FAILED)
    work.until_status(run, "again", WAITING)
    complete(work, token)
    assert work.ended(run).run.status == COMPLETED
    assert [file["filename"] for file in work.view(run).variables["late"]["files"]] == ["a.txt"]


def test_two_runs_that_wait_for_one_upload_both_get_it(work: Bench) -> None:
    work.start()
    asked = work.submit(asking())
    token = upload(work, asked)
    event = work.view(asked).variables["asked"]["event_name"]
    builder = WorkflowBuilder(name="other")
    builder.task("wait", WAIT, kwargs={"event_name": "{{event}}"}, result_key="sent")
    other = work.submit(builder, event=event)
    for run in (asked, other):
        work.until_status(run, "wait", WAITING)
    complete(work, token)
    for run in (asked, other):
        assert work.ended(run).run.status == COMPLETED
        assert names(work, run) == ["a.txt"]


def test_a_second_wait_with_the_same_key_fails_and_says_so(work: Bench) -> None:
    builder = WorkflowBuilder(name="paying")
    kwargs = {"event_name": "paid", "correlation_key": "{{order}}"}
    builder.task("wait", WAIT, kwargs=kwargs, result_key="paid")
    work.start()
    first = work.submit(builder, order="order-7")
    work.until_status(first, "wait", WAITING)
    second = work.ended(work.submit(builder, order="order-7"))
    assert second.run.status == FAILED
    assert "waited for already" in second.run.error
    work.events.emit("paid", {"amount": 5}, "order-7")
    assert work.ended(first).variables["paid"] == {"amount": 5}


def test_a_cancelled_upload_ends_the_wait_with_the_reason(work: Bench) -> None:
    work.start()
    run = work.submit(asking())
    token = upload(work, run)
    work.until_status(run, "wait", WAITING)
    work.store.uploads(TENANT, ACTOR).cancel(token)
    ended = work.ended(run)
    assert ended.run.status == FAILED
    assert "cancelled" in ended.run.error


def test_an_upload_that_expires_ends_the_wait_with_the_reason(work: Bench) -> None:
    builder = WorkflowBuilder(name="asking")
    kwargs = {"name": "papers", "expires_in": 1}
    builder.task("ask", "tools.storage.request_upload", kwargs=kwargs, result_key="asked")
    builder.task("wait", WAIT, kwargs={"event_name": "{{asked.event_name}}"})
    work.start()
    run = work.submit(builder)
    work.until_status(run, "wait", WAITING)

    def swept() -> bool:
        with work.store.catalog.read() as snapshot:
            plan = plan_sweep(snapshot, work.store.now_us(snapshot), keep_us=10**12)
        return execute_sweep(work.store.catalog, plan).uploads == 1

    until(swept, "the upload expires")
    ended = work.ended(run)
    assert ended.run.status == FAILED
    assert "expired" in ended.run.error
