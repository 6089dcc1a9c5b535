"""`blobcask bench`: measure, and show each number beside its limit."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from bench.measure import workspace
from bench.report import Report, Row
from bench.scale import FULL, QUICK, Bench
from bench.workloads import WORKLOADS


@click.command(epilog=f"Workloads: {', '.join(WORKLOADS)}.")
@click.argument("names", nargs=-1, metavar="[NAME]...", type=click.Choice(list(WORKLOADS)))
@click.option("--quick", is_flag=True, help="Small sizes, within a minute; judges nothing.")
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the rows with all samples to this file too.",
)
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="On the disk to be measured, with 40 GiB free; default: the temporary folder.",
)
def bench(names: tuple[str, ...], quick: bool, json_path: Path | None, folder: Path | None) -> None:
    """Measure the workloads NAME, or all of them, and print the table.

    Each number stands beside its limit, measured by turns in the same run, on a machine
    that should do nothing else meanwhile. The store of the settings is not touched.
    """
    scale = QUICK if quick else FULL
    rows: list[Row] = []
    progress = Console(stderr=True)
    with workspace(folder) as space, progress.status("…") as status:
        for name in names or WORKLOADS:
            status.update(f"{name} ({len(rows)} rows so far)")
            own = space / name
            own.mkdir()
            rows += WORKLOADS[name](Bench(own.absolute(), scale))
    report = Report(rows, quick)
    if json_path is not None:
        json_path.write_bytes(report.json() + b"\n")
    Console().print(report.table())
