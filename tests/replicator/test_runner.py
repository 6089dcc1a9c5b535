"""The process as a whole: what a single run says of itself, its heartbeat, and its end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cas.background import Heartbeat
from cas.config import ReplicatorSettings, Settings, StoreSettings, TargetSettings
from cas.errors import CatalogFailed
from cas.keys import load_keys
from cas.store import Store
from replicator.folder import FolderTarget
from replicator.jobs import Jobs
from replicator.links import opened_links
from replicator.runner import Runner

STOPPED_S = 60.0  # a run that does not end by itself fails its test after this


@pytest.fixture
def settings(root: Path) -> Settings:
    far = TargetSettings("far", "folder", root / "far")
    return Settings(
        store=StoreSettings(root=root / "store"),
        replicator=ReplicatorSettings(targets=("far",)),
        targets=(far,),
    )


def put_some(settings: Settings) -> None:
    with Store.open(settings.store.root, settings) as store:
        for number in range(3):
            store.files("t1", "tests").put(b"%d" % number, name=f"n{number}")


def test_a_run_that_leaves_copies_to_be_made_is_not_well_and_says_why(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_some(settings)
    honest = FolderTarget.put

    def put(target: FolderTarget, key: str, *args: Any, **more: Any) -> str:
        return "stored" if key.startswith("objects/") else honest(target, key, *args, **more)

    monkeypatch.setattr(FolderTarget, "put", put)
    told: list[str] = []
    assert not Runner(settings, told.append).once()
    assert told[-1].startswith("3 copies are still to be made at far: ")
    assert "not there" in told[-1]


def test_a_run_at_a_target_of_another_node_is_not_well_and_says_why(
    root: Path, settings: Settings
) -> None:
    put_some(settings)
    assert Runner(settings, lambda _: None).once()
    other = Settings(
        store=StoreSettings(root=root / "other"),
        replicator=settings.replicator,
        targets=settings.targets,
    )
    put_some(other)
    told: list[str] = []
    assert not Runner(other, told.append).once()
    assert told[0].startswith("Nothing was written to target far: ")


@contextmanager
def stopped_in_the_end() -> Iterator[None]:
    timer = threading.Timer(STOPPED_S, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def test_a_heartbeat_that_fails_is_told_and_the_next_one_is_made(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put_some(settings)
    monkeypatch.setattr("replicator.runner._FIRST_BEAT_S", 0.0)
    monkeypatch.setattr("replicator.runner.BEAT_S", 0.0)
    made: list[int] = []

    def write(_root: Path, beat: Heartbeat) -> bool:
        made.append(beat.pid)
        if len(made) < 3:
            raise ValueError("a fault of ours")
        os.kill(beat.pid, signal.SIGTERM)
        return True

    monkeypatch.setattr("replicator.runner.write_heartbeat", write)
    with stopped_in_the_end(), caplog.at_level(logging.ERROR):
        Runner(settings, lambda _: None).run()
    assert len(made) >= 3
    assert "a fault of ours" in caplog.text


def test_a_store_that_must_be_opened_anew_ends_the_process_whoever_notices(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_some(settings)

    def write(_root: Path, _beat: Heartbeat) -> bool:
        raise CatalogFailed("a sync failed")

    monkeypatch.setattr("replicator.runner.write_heartbeat", write)
    with stopped_in_the_end(), pytest.raises(CatalogFailed):
        Runner(settings, lambda _: None).run()


def test_the_end_lets_go_of_readers_before_those_that_wait_for_fetches(settings: Settings) -> None:
    """The mirror may wait for bytes that are fetched; the fetches end with the socket."""

    async def names() -> list[str]:
        with Store.open(settings.store.root, settings) as store, opened_links(store) as links:
            jobs = Jobs(store, load_keys(settings), links).lasting()
            try:
                return [type(job).__name__ for job in jobs]
            finally:
                for job in jobs:
                    await job.close()

    found = asyncio.run(names())
    assert found.index("Answering") < found.index("Mirror") < found.index("Heal")
