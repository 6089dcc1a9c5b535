"""Both sides by turns, each in its own folder, each timed for its own work only."""

from __future__ import annotations

from pathlib import Path

from bench.measure import Memory, Run, Samples, Side, alternate, workspace


def test_sides_take_turns_and_change_who_goes_first(root: Path) -> None:
    order: list[str] = []
    folders: set[Path] = set()

    def side(name: str) -> Side:
        def work(run: Run) -> None:
            order.append(name)
            folders.add(run.folder)
            with run.timed():
                (run.folder / "large").write_bytes(bytes(1 << 20))

        return Side(name, work)

    ours, limit = alternate(root, 3, [side("ours"), side("limit")])
    assert order == ["ours", "limit", "limit", "ours", "ours", "limit"]
    assert (ours.name, limit.name) == ("ours", "limit")
    assert all(seconds > 0 for seconds in ours.seconds + limit.seconds)
    assert len(folders) == 6
    assert not any(list(folder.iterdir()) for folder in folders)  # large files are dropped


def test_what_is_not_timed_does_not_count(root: Path) -> None:
    (samples,) = alternate(root, 2, [Side("idle", lambda run: None)])
    assert samples.seconds == [0.0, 0.0]


def test_the_median_is_of_all_samples() -> None:
    assert Samples("some", [3.0, 1.0, 2.0]).median_s == 2.0


def test_the_workspace_is_gone_afterwards(root: Path) -> None:
    with workspace(root) as folder:
        assert folder.parent == root
        (folder / "some").mkdir()
    assert not folder.exists()


def test_memory_is_read_from_the_kernel() -> None:
    memory = Memory.of()
    assert 0 < memory.own_bytes <= memory.resident_bytes <= memory.peak_bytes
