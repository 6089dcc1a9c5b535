"""`blobcask replicate verify` and `backfill`: the targets against what is written down here."""

from __future__ import annotations

from contextlib import closing

import click

from cas.cli.call import Call, counted, pass_call
from cas.cli.exits import WrongFound
from cas.config import TargetSettings
from cas.errors import NotFound
from cas.replicas import backfill as give_rows
from cas.replicas import begin_backfill


@click.command()
@click.argument("name", required=False)
@click.option("--bytes", "by_bytes", is_flag=True, help="Read all copies back and hash them.")
@click.option("--remove-strays", is_flag=True, help="Have what no blob is known for deleted.")
@pass_call
def verify(call: Call, name: str | None, by_bytes: bool, remove_strays: bool) -> None:
    """Compare target NAME, or each one, with what is written down as copied there.

    What is absent or wrong there is copied anew by the background process; with --bytes wrong
    bytes here are set aside and healed from a target. Without --bytes the target's listing is
    compared, which costs no more than that. Not 0 when anything was wrong.
    """
    # Late, so that other verbs start without asyncio.
    from replicator.opening import open_target
    from replicator.verify import Verification

    reports = []
    with call.open() as store:
        for settings in _chosen(call, name):
            with closing(open_target(settings, known=True)) as target:
                verification = Verification(
                    store, target, by_bytes=by_bytes, remove_strays=remove_strays
                )
                reports.append(verification.report)
                with call.progress(f"verify {settings.name}") as bar:
                    while verification.step():
                        bar.at(verification.report.rows)
    call.answer(
        {"targets": [report.form() for report in reports]},
        [line for report in reports for line in report.lines()],
    )
    if not all(report.well for report in reports):
        raise WrongFound


@click.command()
@click.argument("name", required=False)
@pass_call
def backfill(call: Call, name: str | None) -> None:
    """Give every blob its row at target NAME, or at each one, so that it is copied there.

    Blobs get their rows by themselves; this is for those that a damaged or foreign catalog
    lost. Refuses a target that the background process has not seen yet.
    """
    with call.open() as store:
        names = [settings.name for settings in _chosen(call, name)]
        for each in names:
            begin_backfill(store.catalog, each)
            while give_rows(store.catalog, each):
                pass
    call.answer({"targets": names}, names)
    call.say(f"All blobs have their rows at {counted(len(names), 'target')}.")


def _chosen(call: Call, name: str | None) -> list[TargetSettings]:
    chosen = [each for each in call.settings.targets if name in (None, each.name)]
    if name is not None and not chosen:
        raise NotFound("target", name)
    return chosen
