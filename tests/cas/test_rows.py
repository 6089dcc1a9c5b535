"""The states of a row at a target: every step from every condition, in all orders."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from cas import rows
from cas.digest import Digest, digest_of
from cas.records import COPYING, DELETING, DONE, WANTED, Replica

DIGEST = digest_of(b"it")
NOW = 1_000


def wanted(digest: Digest = DIGEST) -> Replica:
    return rows.wished(None, "dr", digest, 2, NOW, 1)


def done() -> Replica:
    return rows.verified(wanted(), NOW + 1, 2)


def removed(row: Replica) -> Replica:
    after = rows.released(row, NOW + 2, 3)
    assert after is not None
    return after


def test_a_new_row_is_wanted_at_once_and_counts_as_backlog() -> None:
    row = wanted()
    assert (row.state, row.queue, row.next_attempt_at, row.wanted_at) == (WANTED, "dr", NOW, NOW)
    assert not row.held


def test_a_verified_row_leaves_the_backlog_and_is_held() -> None:
    assert done().queue is None
    assert done().held


def test_what_nobody_tried_goes_with_its_blob() -> None:
    assert rows.released(wanted(), NOW, 2) is None


@pytest.mark.parametrize(
    "row",
    [
        rows.failed(wanted(), "no answer", NOW + 5),
        rows.copying(wanted()),
        rows.touched(wanted()),
        rows.lost(done(), NOW, 3),
    ],
)
def test_what_may_be_at_the_target_is_kept_until_it_is_deleted_there(row: Replica) -> None:
    after = removed(row)
    assert after.removed_at == NOW + 2
    assert after.queue is None
    assert not after.held


def test_a_blob_that_comes_back_before_the_delete_finds_its_copy() -> None:
    row = rows.wished(removed(done()), "dr", DIGEST, 2, NOW + 9, 4)
    assert row.held
    assert row.removed_at is None


def test_a_blob_that_comes_back_while_deleted_waits_for_the_end_of_the_delete() -> None:
    deleting = rows.begun(removed(done()), NOW, 4)
    back = rows.wished(deleting, "dr", DIGEST, 2, NOW + 9, 5)
    assert (back.state, back.queue, back.next_attempt_at) == (DELETING, "dr", rows.NEVER)
    assert not back.held
    again = rows.ended(back, NOW + 10, 6)
    assert again is not None
    assert (again.state, again.queue, again.next_attempt_at) == (WANTED, "dr", NOW + 10)
    assert again.wanted_at == NOW + 9
    assert rows.never_tried(again)


def test_one_that_goes_once_more_meanwhile_is_not_copied() -> None:
    back = rows.wished(rows.begun(removed(done()), NOW, 4), "dr", DIGEST, 2, NOW + 9, 5)
    gone = rows.released(back, NOW + 10, 6)
    assert gone is not None
    assert rows.ended(gone, NOW + 11, 7) is None


def test_a_delete_that_is_begun_again_is_the_same_delete() -> None:
    deleting = rows.begun(removed(done()), NOW, 4)
    assert rows.begun(deleting, NOW + 5, 9) == replace(deleting, sent_at=NOW + 5)


def test_a_delete_that_was_refused_comes_after_others_and_is_told() -> None:
    refused = rows.refused(rows.begun(removed(done()), NOW, 4), "locked", NOW + 77)
    assert (refused.state, refused.seq, refused.sent_at) == (DELETING, 4, None)
    assert (refused.removed_at, refused.attempts, refused.last_error) == (NOW + 77, 1, "locked")
    assert rows.fault(refused) == ""
    assert rows.ended(refused, NOW + 78, 5) is None


def test_a_lost_copy_is_wanted_and_work_under_way_is_not_believed() -> None:
    row = rows.lost(done(), NOW + 3, 7)
    assert (row.state, row.queue, row.seq) == (WANTED, "dr", 7)
    assert not rows.never_tried(row)
    assert rows.lost(wanted(), NOW + 3, 7) == replace(wanted(), seq=7)


def test_a_blob_that_comes_back_does_not_count_on_a_copy_that_was_lost_meanwhile() -> None:
    row = rows.lost(removed(done()), NOW, 9)
    assert (row.state, row.queue, row.removed_at) == (WANTED, None, NOW + 2)
    assert rows.wished(row, "dr", DIGEST, 2, NOW + 9, 10).queue == "dr"


def test_a_multipart_upload_that_goes_on_keeps_its_state_through_failures() -> None:
    row = rows.copying(wanted())
    assert rows.failed(row, "cut", NOW + 5).state == COPYING
    assert rows.failed(row, "cut", NOW + 5, afresh=True).state == WANTED


def test_what_an_error_says_is_kept_in_part() -> None:
    assert len(rows.failed(wanted(), "x" * 10_000, NOW).last_error) < 1_000


@pytest.mark.parametrize(
    "row",
    [
        replace(wanted(), queue=None),
        replace(wanted(), queue="other"),
        replace(wanted(), state="odd"),
        replace(done(), queue="dr"),
        replace(done(), done_at=None),
        replace(done(), removed_at=NOW),
        replace(removed(done()), queue="dr"),
        replace(wanted(), state=DELETING),
        replace(rows.begun(removed(done()), NOW, 4), queue="dr"),
    ],
)
def test_an_impossible_row_is_named(row: Replica) -> None:
    assert rows.fault(row)


STEPS = st.sampled_from("wish release verify fail afresh copy touch lose begin refuse end".split())


@given(st.lists(STEPS, max_size=30))
def test_no_order_of_steps_makes_an_impossible_row_or_a_false_done(steps: list[str]) -> None:
    """Beside the target's own truth: `there` is whether the object is."""
    row: Replica | None = None
    live = there = False
    for seq, step in enumerate(steps, start=1):
        now = NOW + seq
        if step == "wish" and not live:
            live = True
            row = rows.wished(row, "dr", DIGEST, 2, now, seq)
        elif step == "release" and live:
            live = False
            assert row is not None
            row = rows.released(row, now, seq)
            assert row is not None or not there
        elif row is None:
            continue
        elif step == "begin" and row.removed_at is not None and not live:
            row = rows.begun(row, now, seq)
            there = False
        elif step == "refuse" and row.state == DELETING:
            row = rows.refused(row, "no", now)
        elif step == "end" and row.state == DELETING:
            row = rows.ended(row, now, seq)
        elif row.removed_at is None and row.state != DELETING:
            if step == "verify":
                row, there = rows.verified(row, now, seq), True
            elif step in ("fail", "afresh") and row.state != DONE:
                row = rows.failed(row, "no", now, afresh=step == "afresh")
                there = True  # it may be, for all one knows
            elif step == "copy" and row.state != DONE:
                row = rows.copying(row)
            elif step == "touch":
                row, there = rows.touched(row), True
        if row is not None and step == "lose":
            row, there = rows.lost(row, now, seq), False
        if row is not None:
            assert rows.fault(row) == ""
            assert (row.queue is not None) <= live
            assert not row.held or (there and live)
            assert live == (row.removed_at is None) or row.state == DELETING
