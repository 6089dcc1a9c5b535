"""Scope: what a step's templates read, and how much of it."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cas.clock import DAY_US
from cas.errors import InvalidWorkflow
from tests.workflows.running import ACTOR, TENANT, Bench, bench, scratch
from workflows.definitions import JOIN, Definition, Task
from workflows.engine import scope
from workflows.engine.plan import Plan
from workflows.engine.scope import READING_AT_ONCE, Scope
from workflows.engine.spots import Spot
from workflows.run_log import RunLog
from workflows.templates import Rendering

LARGE = msgspec.Raw(b"[" + b",".join([b"[]"] * 1_000_000) + b"]")  # of 3 MB


@pytest.fixture(scope="module")
def shared() -> Iterator[Bench]:
    with scratch() as folder, bench(Path(folder)) as made:
        yield made


def seen(made: Bench, inputs: dict[str, Any] | None = None, **results: Any) -> Scope:
    """What a step sees when others came to these results, in one after the other's place."""
    tasks = {name: Task(name, JOIN, []) for name in results}
    definition = Definition("d", {**tasks, "last": Task("last", JOIN, list(results))})
    run = made.workflows.runs(TENANT, ACTOR).submit(definition, inputs or {}).run_id
    log = RunLog(made.store.catalog, run, DAY_US, DAY_US)
    log.start()
    for name, result in results.items():
        log.begin(name)
        log.finish(name, "", result)
    return Scope(Plan(definition), log, Spot(run, "last"))


def test_a_step_reads_only_so_much(shared: Bench) -> None:
    known = seen(shared, small=[1], large=LARGE)
    with known, pytest.raises(InvalidWorkflow, match=f"'large': its {len(LARGE)} bytes take some"):
        known["large"]
    with known:
        assert known["small"] == [1]


def test_what_is_read_together_has_the_limit(shared: Bench) -> None:
    part = msgspec.Raw(b"[" + b",".join([b"[]"] * 100_000) + b"]")  # some 15 MB as objects
    known = seen(shared, a=part, b=part, c=part)
    with known:
        assert known["a"] == known["b"]
        with pytest.raises(InvalidWorkflow, match="'c'"):
            known["c"]
        assert len(known["a"]) == 100_000, "it was read before, and counts once"
    with known:
        assert len(known["c"]) == 100_000, "what was read before was let go of"


def test_what_is_only_asked_for_is_not_read(shared: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    known = seen(shared, {"here": 1}, large=LARGE)
    monkeypatch.setattr(RunLog, "result", lambda *_: pytest.fail("it was read"))
    with known:
        asked = "{{large is defined and not gone is defined and gone is undefined}}"
        assert Rendering(known).text(asked) is True
        assert Rendering(known).text("{{large is undefined or here is undefined}}") is False


def test_afterwards_nothing_of_it_is_kept(shared: Bench) -> None:
    known = seen(shared, {"words": ["x"] * 100_000}, a=["y"] * 300_000)
    with known:
        assert Rendering(known).text("{{a[0]}}{{words[0]}}") == "yx"
    tracemalloc.start()
    try:
        with known:
            assert Rendering(known).text("{{a[0]}}{{words[0]}}") == "yx"
            held_bytes, _ = tracemalloc.get_traced_memory()
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept_bytes < held_bytes / 10


def test_the_run_is_known_unless_something_else_has_its_name(shared: Bench) -> None:
    with seen(shared) as known:
        run_id = known["run_id"]
        assert shared.view(run_id).run.run_id == run_id
        assert "run_id" in set(known)
    with seen(shared, {"run_id": 7}) as known:
        assert known["run_id"] == 7
    with seen(shared, {"run_id": 7}, run_id=8) as known:
        assert known["run_id"] == 8


def test_a_long_text_is_as_long_as_it_is(shared: Bench) -> None:
    told = '[{"a": 1, "b": [2]}, "ü"], \\ ' * 50_000  # JSON within a text is no structure
    with seen(shared, told=told, told2=[told, told]) as known:
        assert known["told"] == told
        assert known["told2"] == [told, told]


def test_only_a_few_read_at_a_time(shared: Bench) -> None:
    known = [seen(shared, a=number) for number in range(READING_AT_ONCE + 1)]
    last = threading.Thread(target=lambda: known[-1].__enter__().__exit__())
    for one in known[:-1]:
        one.__enter__()
    last.start()
    assert not scope._places.acquire(blocking=False), "it waits"
    known[0].__exit__()
    last.join(60)
    assert not last.is_alive()
    for one in known[1:-1]:
        one.__exit__()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2**63) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=50)
@given(value=VALUES)
@example(value="0\x80")
@example(value="0\u0100")
@example(value="\U0001f4a9")
def test_what_it_takes_is_never_underestimated(value: Any) -> None:
    raw = msgspec.json.encode([value] * 200)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        found = msgspec.json.decode(raw)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 200
    assert after - before <= scope._object_bytes(raw) + 1024
