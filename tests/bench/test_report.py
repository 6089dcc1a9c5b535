"""The verdict of a row, the table and its JSON."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from bench.report import Quantity, Report, Row, Target


def row(figure: float, target: Target | None) -> Row:
    return Row("some", "some work", Quantity(5, "MB/s", [4.0, 5.0, 6.0]), figure, target=target)


@pytest.mark.parametrize(
    ("figure", "target", "verdict"),
    [
        (0.9, Target(0.9), "PASS"),
        (0.89, Target(0.9), "MISS"),
        (12.0, Target(12, at_most=True, unit="µs"), "PASS"),
        (12.1, Target(12, at_most=True, unit="µs"), "MISS"),
        (5.0, None, ""),
    ],
)
def test_the_verdict_follows_the_target(figure: float, target: Target | None, verdict: str) -> None:
    assert row(figure, target).verdict == verdict


def test_json_has_every_sample_and_the_verdict() -> None:
    form = json.loads(Report([row(1.0, Target(2))], quick=False).json())
    assert form["rows"][0]["ours"]["samples"] == [4.0, 5.0, 6.0]
    assert form["rows"][0]["verdict"] == "MISS"
    assert form["machine"]["cpus"] >= 1


def test_quick_sizes_are_not_judged() -> None:
    report = Report([row(1.0, Target(2))], quick=True)
    assert json.loads(report.json())["rows"][0]["verdict"] == ""
    out = io.StringIO()
    Console(file=out, width=120).print(report.table())
    assert "MISS" not in out.getvalue()


def test_the_table_shows_both_sides() -> None:
    shown = Row(
        "some",
        "some work",
        Quantity(1234.5, "MB/s"),
        0.95,
        Quantity(1300, "MB/s"),
        "the limit",
        Target(0.9),
    )
    out = io.StringIO()
    Console(file=out, width=120).print(Report([shown], quick=False).table())
    text = out.getvalue()
    assert "1,234 MB/s" in text
    assert "0.95 x" in text
    assert "PASS" in text
