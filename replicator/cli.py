"""`blobcask replicate`: run, once, status."""

from __future__ import annotations

import click

from cas.background import Heartbeat, background_of
from cas.cli.call import JSON, Call, counted, pass_call, table
from cas.cli.exits import WrongFound
from cas.cli.forms import shown_time
from cas.clock import SECOND_US
from cas.deliveries import Backlog, backlog


@click.group()
def replicate() -> None:
    """Work in the background: send callbacks, end what is over, collect bytes, scrub.

    `blobcask serve` runs this by itself, unless told not to.
    """


@replicate.command()
@click.option("--with-parent", type=int, hidden=True, help="The PID of a parent to end with.")
@pass_call
def run(call: Call, with_parent: int | None) -> None:
    """Run until stopped. One at a time works on a ROOT; a second one waits for its turn."""
    # Late, so that `status` starts without asyncio and the HTTP client.
    from replicator.log import install
    from replicator.runner import Runner, die_with

    if with_parent is not None:
        die_with(with_parent)
    call.store_root  # noqa: B018  raises: a misspelt --root must not become a store
    install(call.settings.log)
    Runner(call.settings, call.say).run()


@replicate.command()
@pass_call
def once(call: Call) -> None:
    """Do all that is due now, and end; for a timer in place of a process.

    All but the scrub, for which `blobcask scrub` is. Refuses while another one runs on this
    ROOT.
    """
    from replicator.log import install
    from replicator.runner import Runner

    call.store_root  # noqa: B018
    install(call.settings.log)
    if not Runner(call.settings, call.say).once():
        raise WrongFound


@replicate.command()
@pass_call
def status(call: Call) -> None:
    """Show how the jobs are and what waits to be sent; not 0 when something stands still."""
    with call.open() as store:
        with store.catalog.read() as snapshot:
            waiting = backlog(snapshot, store.now_us(snapshot))
        background = background_of(store.root, store.clock.now_us())
        trouble = background.trouble()
        if clock := store.clock_trouble():
            trouble.append(f"no callback is tried again and nothing expires: {clock}")
    beat = background.beat
    call.answer(_form(background.runs, beat, waiting, trouble), _lines(beat, waiting))
    for what in trouble:
        call.say(f"Trouble: {what}")
    if trouble:
        raise WrongFound


def _form(running: bool, beat: Heartbeat | None, waiting: Backlog, trouble: list[str]) -> JSON:
    return {
        "running": running,
        "pid": beat.pid if beat and running else None,
        "started_at": shown_time(beat.started_at) if beat else None,
        "heartbeat_at": shown_time(beat.at) if beat else None,
        "jobs": [
            {
                "name": job.name,
                "interval_seconds": job.interval_s,
                "last_run_at": shown_time(job.ended_at),
                "last_worked_at": shown_time(job.worked_at),
                "failures": job.failures,
                "last_error": job.last_error,
            }
            for job in (beat.jobs if beat else [])
        ],
        "deliveries": {
            "waiting": waiting.waiting,
            "failed": waiting.failed,
            "oldest_seconds": waiting.oldest_us // SECOND_US,
        },
        "trouble": trouble,
    }


def _lines(beat: Heartbeat | None, waiting: Backlog) -> list[str]:
    rows = [
        (job.name, shown_time(job.ended_at) or "-", str(job.failures), job.last_error or "-")
        for job in (beat.jobs if beat else [])
    ]
    lines = list(table(("JOB", "LAST RUN", "FAILURES", "LAST ERROR"), rows)) if rows else []
    oldest = f", the oldest for {waiting.oldest_us // SECOND_US} s" if waiting.waiting else ""
    told = f"{counted(waiting.waiting, 'callback')} to send{oldest}; {waiting.failed} failed."
    return [*lines, told]
