"""The heartbeat file, and the right to be the one background process of a ROOT."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cas.alone import Alone
from cas.background import PLACE, Heartbeat, JobState, background_of
from cas.beats import SILENT_US_MAX
from replicator.heartbeat import write_heartbeat

BEAT = Heartbeat(1, 2, 3, [JobState("sweep", 60.0, last_error="ä\n")])


def test_a_heartbeat_is_read_as_it_was_written(root: Path) -> None:
    assert background_of(root, 0).beat is None
    assert write_heartbeat(root, BEAT)
    assert write_heartbeat(root, BEAT)
    assert background_of(root, 0).beat == BEAT
    assert os.listdir(root) == ["replicator.status"]


def test_the_gateway_reads_what_is_written(root: Path) -> None:
    job = JobState("sweep", 60.0, failures=3, last_error="the disk")
    assert write_heartbeat(root, Heartbeat(1, 2, 3_000_000, [job]))
    seen = background_of(root, 5_000_000)
    assert (seen.runs, seen.silent_us) == (False, 2_000_000)
    assert seen.failing == ("sweep failed 3 times in a row",)


def test_a_step_that_never_ends_and_a_silent_process_are_told(root: Path) -> None:
    place = Alone(root / PLACE)
    assert place.take()
    try:
        assert write_heartbeat(root, Heartbeat(1, 0, 0, [JobState("sweep", 60.0, begun_at=0)]))
        assert background_of(root, SILENT_US_MAX).trouble() == []
        assert "silent" in background_of(root, SILENT_US_MAX + 1).trouble()[0]
        hour_us = 3_600_000_000
        assert write_heartbeat(
            root, Heartbeat(1, 0, hour_us, [JobState("sweep", 60.0, begun_at=0)])
        )
        (trouble,) = background_of(root, hour_us).trouble()
        assert trouble == "the background job sweep is in one step for 3600 s"
    finally:
        place.close()


def test_whoever_looks_keeps_no_process_from_its_place(root: Path) -> None:
    """A look that took the lock for a moment would make a process that starts give up."""
    stop = threading.Event()
    seen: set[bool] = set()

    def look() -> None:
        while not stop.is_set():
            seen.add(background_of(root, 0).runs)

    Alone(root / PLACE).close()
    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(1_000):
            place = Alone(root / PLACE)
            try:
                assert place.take()
            finally:
                place.close()
    finally:
        stop.set()
        for looker in lookers:
            looker.join()
    assert False in seen


def test_what_a_killed_process_left_is_written_over(root: Path) -> None:
    (root / "replicator.new").write_text("half")
    assert write_heartbeat(root, BEAT)
    assert background_of(root, 0).beat == BEAT
    (root / "replicator.status").write_text("half")
    assert background_of(root, 0).beat is None


def test_a_heartbeat_that_cannot_be_written_is_logged_and_no_error(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not write_heartbeat(root / "nowhere", BEAT)
    assert "no heartbeat" in caplog.text


def test_one_process_at_a_time_has_the_place_and_its_death_frees_it(root: Path) -> None:
    assert not background_of(root, 0).runs
    program = (
        "import sys; from pathlib import Path; from cas.alone import Alone;"
        "alone = Alone(Path(sys.argv[1])); assert alone.take(); print('taken', flush=True);"
        "sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(root / PLACE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "taken\n"
    mine = Alone(root / PLACE)
    try:
        assert background_of(root, 0).runs
        assert not mine.take()
        assert mine.holder() == str(other.pid)
        other.kill()
        other.communicate()
        assert not background_of(root, 0).runs
        assert mine.take()
        assert mine.holder() == str(os.getpid())
    finally:
        other.kill()
        other.communicate()
        mine.close()
    assert not background_of(root, 0).runs
