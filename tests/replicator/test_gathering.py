"""What a restore reads of a history at a target that is not whole, or goes on too far."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import pytest

from cas.errors import NotFound
from cas.store import Store
from replicator import gathering as gathering_module
from replicator.archive import Archive
from replicator.fence import read_head
from replicator.gathering import HistoryBroken
from replicator.restoring import Options
from tests.clocks import HandClock
from tests.replicator.shippers import (
    Interposed,
    Shipping,
    folder_target,
    names,
    restored,
    shipping,
)

MINUTE_US = 60_000_000


def put_each_minute(node: Shipping, count: int) -> list[tuple[int, dict[str, Any]]]:
    """Ships after each put; returns a time after each, with what was there then."""
    found = []
    for number in range(count):
        node.clock.advance(MINUTE_US)
        node.put(b"%d" % number, str(number))
        node.ship_all()
        found.append((node.clock.now_us() + MINUTE_US // 2, names(node.store)))
    return found


def two_epochs(
    root: Path, place: Path, new: Path, clock: HandClock
) -> tuple[list[tuple[int, dict[str, Any]]], list[tuple[int, dict[str, Any]]]]:
    """A node, and one restored from it; what was there when, in the one and in the other."""
    with shipping(root, place, clock) as node:
        first = put_each_minute(node, 5)
    clock.advance(MINUTE_US)
    restored(new, place, clock)
    with shipping(new, place, clock) as node:
        second = put_each_minute(node, 4)
    return first, second


def objects(place: Path, epoch: int) -> list[Path]:
    return sorted((place / "journal").rglob(f"{epoch}-*.log"))


def checkpoint(place: Path, epoch: int) -> Path:
    (found,) = (place / "checkpoints").rglob(f"{epoch}-*.zst")
    return found


def spoilt(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def state_of(root: Path, clock: HandClock) -> dict[str, Any]:
    with Store.open(root, clock=clock) as store:
        return names(store)


# --- the newest state


@pytest.mark.parametrize("harm", [spoilt, Path.unlink], ids=["damaged", "gone"])
def test_an_epoch_whose_checkpoint_is_lost_is_told_and_no_older_one_serves_in_silence(
    root: Path, place: Path, new: Path, clock: HandClock, harm: Any
) -> None:
    first, _ = two_epochs(root, place, new, clock)
    harm(checkpoint(place, 2))
    third = new.parent / "third"
    with pytest.raises(HistoryBroken, match="epoch 2 cannot be reached: lost is all after 2026"):
        restored(third, place, clock)
    made = restored(third, place, clock, Options(accept_loss=True))
    assert "epoch 2 cannot be reached" in made.lost
    assert state_of(third, clock) == first[-1][1]


def test_of_what_is_left_a_later_epoch_counts_for_more_than_a_longer_one(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        first = put_each_minute(node, 5)
    past = new.parent / "past"
    restored(past, place, clock, Options(at_us=first[0][0]))
    with shipping(past, place, clock) as node:
        (second,) = put_each_minute(node, 1)
        put_each_minute(node, 1)
    objects(place, 2)[-1].unlink()
    restored(new, place, clock, Options(accept_loss=True))
    assert state_of(new, clock) == second[1]


# --- a state of the past


def test_any_time_between_two_shipments_can_be_restored(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    first, second = two_epochs(root, place, new, clock)
    for number, (at_us, promised) in enumerate(first + second):
        past = new.parent / f"past-{number}"
        made = restored(past, place, clock, Options(at_us=at_us, claims=False))
        assert made.lost == ""
        assert made.state_of_us <= at_us
        assert state_of(past, clock) == promised


def test_in_an_older_epoch_a_missing_object_is_told(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    first, _ = two_epochs(root, place, new, clock)
    objects(place, 1)[2].unlink()
    third = new.parent / "third"
    with pytest.raises(HistoryBroken, match="an object is missing: lost is all after"):
        restored(third, place, clock, Options(at_us=first[-1][0]))
    restored(third, place, clock, Options(at_us=first[0][0]))  # it lies before that
    assert state_of(third, clock) == first[0][1]


def test_in_an_older_epoch_a_missing_end_is_told(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    first, _ = two_epochs(root, place, new, clock)
    objects(place, 1)[-1].unlink()
    third = new.parent / "third"
    with pytest.raises(HistoryBroken, match="an object is missing"):
        restored(third, place, clock, Options(at_us=first[-1][0]))


def test_a_missing_object_is_told_where_the_next_epoch_began_before_it(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        first = put_each_minute(node, 5)
    past = new.parent / "past"
    clock.advance(MINUTE_US)
    restored(past, place, clock, Options(at_us=first[0][0]))
    objects(place, 1)[3].unlink()
    with pytest.raises(HistoryBroken, match="an object is missing"):
        restored(new, place, clock, Options(at_us=first[-1][0]))


@pytest.mark.parametrize("harm", [spoilt, Path.unlink], ids=["damaged", "gone"])
def test_a_time_in_an_epoch_whose_checkpoint_is_lost_is_not_answered_by_an_older_one(
    root: Path, place: Path, new: Path, clock: HandClock, harm: Any
) -> None:
    _, second = two_epochs(root, place, new, clock)
    harm(checkpoint(place, 2))
    third = new.parent / "third"
    with pytest.raises(HistoryBroken):
        restored(third, place, clock, Options(at_us=second[1][0]))


def test_what_a_restore_left_that_came_to_nothing_is_no_state_of_the_past(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    class Killed(BaseException):
        pass

    def die(key: str) -> None:
        if key == "HEAD.json":
            raise Killed

    with shipping(root, place, clock) as node:
        put_each_minute(node, 2)
        target: Any = Interposed(folder_target(place), die)
        with pytest.raises(Killed):
            restored(new, place, clock, target=target)
        at_us, promised = put_each_minute(node, 2)[-1]
        clock.advance(MINUTE_US)
        put_each_minute(node, 1)
    assert checkpoint(place, 2).exists()
    restored(new.parent / "third", place, clock)
    past = new.parent / "past"
    made = restored(past, place, clock, Options(at_us=at_us))
    assert (made.lost, state_of(past, clock)) == ("", promised)


@final
class Counting:
    """A target that counts what is read, and passes all on."""

    def __init__(self, place: Path) -> None:
        self._target = folder_target(place)
        self.journal = 0

    def get(self, key: str, **more: Any) -> Any:
        self.journal += key.startswith("journal/")
        return self._target.get(key, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def test_for_a_time_of_the_past_what_came_long_after_is_not_fetched(
    root: Path, place: Path, new: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering_module, "_LOOKED_AT_ONCE", 2)
    with shipping(root, place, clock) as node:
        found = put_each_minute(node, 12)
    target = Counting(place)
    at_us, promised = found[2]
    restored(new, place, clock, Options(at_us=at_us, claims=False), target=target)
    assert target.journal == 4
    assert state_of(new, clock) == promised


# --- a restore that is refused at its end


def test_a_restore_that_another_node_overtook_leaves_no_checkpoint(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        put_each_minute(node, 2)
        raced: list[str] = []

        def overtake(key: str) -> None:
            if key == "HEAD.json" and not raced:
                raced.append(key)
                put_each_minute(node, 1)

        target: Any = Interposed(folder_target(place), overtake)
        with pytest.raises(Exception, match="another node changed"):
            restored(new, place, clock, target=target)
        head = read_head(folder_target(place)).head
        assert head is not None
        archive = Archive(folder_target(place), head.store_id)
        assert [state.epoch for state in archive.states()] == []
        put_each_minute(node, 1)
        promised = names(node.store)
    restored(new, place, clock)
    assert state_of(new, clock) == promised


def test_a_restore_that_another_restore_overtook_leaves_that_one_its_checkpoint(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        put_each_minute(node, 2)
        promised = names(node.store)
    other = new.parent / "other"

    def be_second(key: str) -> None:
        if key == "HEAD.json" and not other.exists():
            restored(other, place, clock)  # at the same time, so of the very same bytes

    target: Any = Interposed(folder_target(place), be_second)
    with pytest.raises(Exception, match="another node changed"):
        restored(new, place, clock, target=target)
    assert checkpoint(place, 2).exists()
    restored(new.parent / "third", place, clock)
    assert state_of(new.parent / "third", clock) == promised


def test_a_time_before_what_is_kept_is_told(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    first, _ = two_epochs(root, place, new, clock)
    for path in objects(place, 1):
        path.unlink()
    with pytest.raises(NotFound, match="reaches back"):
        restored(new.parent / "third", place, clock, Options(at_us=first[0][0]))
