"""Rows of results: each number beside its limit, the ratio, and the verdict."""

from __future__ import annotations

import os
import platform
from typing import Any, Literal, final

import msgspec
from rich.table import Table

Verdict = Literal["PASS", "MISS", ""]


@final
class Quantity(msgspec.Struct, frozen=True):
    """A measured number; `samples` are what it is the median of, in the same unit."""

    value: float
    unit: str
    samples: list[float] = []

    def __str__(self) -> str:
        digits = 0 if self.value >= 1000 else 1 if self.value >= 10 else 2
        return f"{self.value:,.{digits}f} {self.unit}"


@final
class Target(msgspec.Struct, frozen=True):
    """What is asked of a row: `figure` at least, or at most, `bound`."""

    bound: float
    at_most: bool = False
    unit: str = "x"

    def met_by(self, figure: float) -> bool:
        return figure <= self.bound if self.at_most else figure >= self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.bound:,.10g} {self.unit}"


@final
class Row(msgspec.Struct, frozen=True):
    """One line of the table.

    `figure` is what the target speaks of: mostly how many times as fast as the limit.
    """

    workload: str
    what: str
    ours: Quantity
    figure: float
    limit: Quantity | None = None
    limit_name: str = ""
    target: Target | None = None
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        if self.target is None:
            return ""
        return "PASS" if self.target.met_by(self.figure) else "MISS"


@final
class Report(msgspec.Struct, frozen=True):
    """All rows of one run, and what they were measured on."""

    rows: list[Row]
    quick: bool
    machine: dict[str, Any] = msgspec.field(
        default_factory=lambda: {
            "cpus": len(os.sched_getaffinity(0)),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "load": os.getloadavg()[0],
        }
    )

    def json(self) -> bytes:
        rows = [
            {
                **msgspec.to_builtins(row),
                # Small sizes measure other things than the targets speak of.
                "verdict": "" if self.quick else row.verdict,
            }
            for row in self.rows
        ]
        form = {"quick": self.quick, "machine": self.machine, "rows": rows}
        return msgspec.json.format(msgspec.json.encode(form), indent=2)

    def table(self) -> Table:
        title = "blobcask bench, quick: sizes too small to judge" if self.quick else None
        table = Table(title=title)
        for name in ("what", "limit", "here", "limit's", "figure", "target", ""):
            right = name in ("here", "limit's", "figure", "target")
            table.add_column(name, justify="right" if right else "left")
        for row in self.rows:
            figure = f"{row.figure:,.2f} x" if row.limit else str(row.ours)
            colour = {"PASS": "[green]PASS", "MISS": "[red]MISS", "": ""}
            table.add_row(
                row.what + (f"\n[dim]{row.note}" if row.note else ""),
                row.limit_name,
                str(row.ours),
                str(row.limit or ""),
                figure,
                str(row.target or ""),
                "" if self.quick else colour[row.verdict],
            )
        return table
