"""`/readyz`: traffic only where it can be served, and what is wrong is named."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import falcon.testing
import pytest
from highway_dsl import WorkflowBuilder

from cas import runner
from cas.alone import Alone
from cas.background import PLACE, Heartbeat, TargetState
from cas.beats import SILENT_US_MAX, write_beat
from cas.clock import DAY_US, SECOND_US
from cas.config import Settings, StoreSettings
from cas.durable import Disk
from cas.errors import CatalogFailed, IndexDamaged, StoreUnready
from cas.keys import load_keys
from cas.probe import Probe
from cas.replicas import register
from cas.store import Store
from gateway.app import create_app
from gateway.pool import Pool
from replicator.heartbeat import write_heartbeat
from tests.clocks import KEEP_US, HandClock
from tests.gateway.served import Served, serving, until
from workflows.definitions import Definition
from workflows.runs import Runs


class SwitchedDisk(Disk):
    """A disk whose syncs a test can make fail, or hang."""

    def __init__(self) -> None:
        self.fails = False
        self.goes = threading.Event()
        self.goes.set()

    def sync_data(self, fd: int) -> None:
        self.goes.wait()
        if self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().sync_data(fd)


@pytest.fixture
def disk() -> SwitchedDisk:
    return SwitchedDisk()


@pytest.fixture
def store(root: Path, disk: SwitchedDisk, clock: HandClock) -> Iterator[Store]:
    with Store.open(root, clock=clock, disk=disk) as opened:
        yield opened


# For a disk that is busy, and not one that hangs.
PATIENCE_S = 60.0


def asked(
    store: Store,
    settings: Settings | None = None,
    *,
    peer: str = "127.0.0.1",
    patience_s: float = PATIENCE_S,
) -> tuple[Any, list[str]]:
    """What /readyz of an app on this store answers, and how often it wanted to reopen."""
    reopened: list[str] = []
    settings = settings or Settings(store=StoreSettings(root=store.root))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("gateway.health.Probe", partial(Probe, patience_s=patience_s))
        app = create_app(store, settings, load_keys(settings), lambda: reopened.append("now"))
    client = falcon.testing.TestClient(app)
    return client.simulate_get("/readyz", remote_addr=peer), reopened


def test_a_server_that_runs_is_ready(served: Served) -> None:
    def ready() -> bool:  # not while a commit takes seconds on a busy disk
        answer = served.ask("GET", "/readyz")
        return (answer.status, answer.form["status"]) == (200, "ready")

    until(ready)
    assert served.ask("GET", "/healthz").form == {"status": "ok"}
    until(lambda: served.ask("HEAD", "/readyz").status == 200)


def test_asking_does_not_grow_the_journal(store: Store) -> None:
    probe = Probe(store, every_s=0, patience_s=PATIENCE_S)
    before = store.catalog.position()
    for _ in range(20):
        probe.check()
    assert store.catalog.position() == before


def test_a_disk_below_the_watermark_is_not_ready(root: Path) -> None:
    with serving(root, STORE__MIN_FREE="1000TiB") as server:
        answers = []

        def low() -> bool:
            answers.append(server.ask("GET", "/readyz"))
            return "min_free" in answers[-1].form["detail"]

        until(low)
        assert (answers[-1].status, answers[-1].code) == (503, "not_ready")
        assert server.ask("GET", "/healthz").status == 200


def test_a_disk_that_takes_no_bytes_is_not_ready(store: Store, disk: SwitchedDisk) -> None:
    probe = Probe(store, every_s=0, patience_s=PATIENCE_S)
    probe.check()
    disk.fails = True
    with pytest.raises(StoreUnready, match="Input/output error"):
        probe.check()
    disk.fails = False
    probe.check()


def test_a_disk_that_hangs_holds_nobody(store: Store, disk: SwitchedDisk) -> None:
    probe = Probe(store, every_s=0, patience_s=0.05)
    disk.goes.clear()
    try:
        threads = threading.active_count()
        for _ in range(5):
            with pytest.raises(StoreUnready, match="has not come back"):
                probe.check()
        assert threading.active_count() <= threads + 1  # one asks, whoever waits
    finally:
        disk.goes.set()


def test_where_no_thread_can_be_made_the_next_question_asks_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = Probe(store, every_s=0, patience_s=PATIENCE_S)

    def no_more(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_more)
        with pytest.raises(StoreUnready, match="no thread"):
            probe.check()
    probe.check()


def test_a_catalog_that_stopped_is_told_and_opened_anew(store: Store, disk: SwitchedDisk) -> None:
    """Though nobody writes: a node that gets no traffic would never heal otherwise."""
    disk.fails = True
    with pytest.raises(CatalogFailed):
        store.uploads("acme", "ada").request(upload_request())
    disk.fails = False
    with pytest.raises(CatalogFailed):
        Probe(store, patience_s=PATIENCE_S).check()
    answer, reopened = asked(store)
    assert (answer.status_code, answer.json["code"]) == (503, "catalog_failed")
    assert reopened == ["now"]


def upload_request() -> Any:
    from cas.uploads import UploadRequest

    return UploadRequest(name="papers")


def test_an_index_that_is_not_trusted_any_more_is_opened_anew(store: Store) -> None:
    (store.root / "catalog" / "index" / "BOOT").unlink()
    with pytest.raises(IndexDamaged):
        Probe(store, patience_s=PATIENCE_S).check()
    answer, reopened = asked(store)
    assert answer.status_code == 503
    assert reopened == ["now"]


def test_a_doubtful_clock_degrades_but_serves(store: Store, clock: HandClock) -> None:
    answer, _ = asked(store)
    assert not [what for what in answer.json["degraded"] if "clock" in what]
    clock.trusted = False
    clock.advance(400 * DAY_US)
    answer, _ = asked(store)
    assert answer.status_code == 200
    assert [what for what in answer.json["degraded"] if "400 days ahead" in what]


def test_a_background_process_that_does_not_run_degrades_but_serves(store: Store) -> None:
    answer, _ = asked(store)
    assert answer.status_code == 200
    assert [what for what in answer.json["degraded"] if "no background process" in what]


def degraded_by_runs(store: Store) -> list[str]:
    answer, _ = asked(store)
    assert answer.status_code == 200
    return [what for what in answer.json["degraded"] if "background process" not in what]


def test_workflows_that_wait_for_a_runner_degrade_but_others_are_served(
    store: Store, clock: HandClock
) -> None:
    assert degraded_by_runs(store) == []  # it may be served without workflows
    submit_run(store)
    assert degraded_by_runs(store) == ["no runner runs: workflows wait"]
    place = Alone(store.root / runner.PLACE)
    try:
        assert place.take()
        write_beat(store.root / runner.STATUS, runner.RunnerBeat(1, 0, clock.now_us()))
        assert degraded_by_runs(store) == []
        clock.advance(SILENT_US_MAX + SECOND_US)
        assert degraded_by_runs(store) == ["the runner is silent for 61 s"]
    finally:
        place.close()
    assert asked(store, peer="203.0.113.7")[0].json == {"status": "ready"}


def submit_run(store: Store) -> None:
    runs = Runs(
        store.catalog,
        tenant_id="acme",
        actor="ada",
        request_id="",
        keep_us=KEEP_US,
        events_keep_us=KEEP_US,
    )
    flow = WorkflowBuilder(name="one").task("one", "tools.storage.list")
    runs.submit(Definition.parse(flow.build().to_json()), {})


def test_a_stalled_mirror_degrades_with_the_reason_but_serves(root: Path, clock: HandClock) -> None:
    far = TargetState("far", "folder /far", probed=True, fenced="another node ships")
    with Store.open(root, clock=clock) as store:
        register(store.catalog, [("far", "folder /far")])
        place = Alone(root / PLACE)
        try:
            assert place.take()
            assert write_heartbeat(root, Heartbeat(1, 0, clock.now_us(), [], [far]))
            answer, _ = asked(store)
        finally:
            place.close()
    assert answer.json == {
        "status": "ready",
        "degraded": ["target far gets nothing from here: another node ships"],
    }


def test_a_stranger_is_told_whether_and_not_why(store: Store, disk: SwitchedDisk) -> None:
    answer, _ = asked(store, peer="203.0.113.7")
    assert (answer.status_code, answer.json) == (200, {"status": "ready"})
    disk.fails = True
    inside, _ = asked(store)
    outside, _ = asked(store, peer="203.0.113.7")
    assert (inside.status_code, outside.status_code) == (503, 503)
    assert "Input/output error" in inside.json["detail"]
    assert outside.json["detail"] == "this node should get no traffic now"
    disk.fails = False


def test_a_stranger_who_asks_has_a_stopped_catalog_opened_anew_too(
    store: Store, disk: SwitchedDisk
) -> None:
    disk.fails = True
    with pytest.raises(CatalogFailed):
        store.uploads("acme", "ada").request(upload_request())
    disk.fails = False
    answer, reopened = asked(store, peer="203.0.113.7")
    assert (answer.status_code, reopened) == (503, ["now"])


def test_a_disk_that_hangs_keeps_no_working_slot(store: Store, disk: SwitchedDisk) -> None:
    pool, told = Pool(1), SimpleQueue[object]()
    disk.goes.clear()
    try:
        pool.submit(lambda: told.put(asked(store, patience_s=2.0)[0].status_code))
        pool.submit(lambda: told.put("another"))
        assert [told.get(timeout=PATIENCE_S) for _ in range(2)] == ["another", 503]
    finally:
        disk.goes.set()
