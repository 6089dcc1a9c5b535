"""`blobcask bench` as a person calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.cli import bench


def test_one_workload_prints_its_row_and_writes_json(root: Path) -> None:
    out = root / "rows.json"
    arguments = ["lookup", "--quick", "--json", str(out), "--folder", str(root)]
    result = CliRunner().invoke(bench, arguments)
    assert result.exit_code == 0, result.output
    assert "lookup of a reference" in result.output
    (row,) = json.loads(out.read_text())["rows"]
    assert row["workload"] == "lookup"
    assert row["figure"] > 0
    assert [path.name for path in root.iterdir()] == ["rows.json"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["put_many", "commits", "waking", "put_http", "memory"])
def test_workloads_run_quickly(root: Path, name: str) -> None:
    result = CliRunner().invoke(bench, [name, "--quick", "--folder", str(root)])
    assert result.exit_code == 0, result.output


def test_an_unknown_workload_is_refused_with_the_known_ones(root: Path) -> None:
    result = CliRunner().invoke(bench, ["nonsense"])
    assert result.exit_code == 2
    assert "put_unique" in result.output
