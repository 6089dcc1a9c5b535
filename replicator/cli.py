"""`blobcask replicate`: run, once, probe, status, and what `*_cli` beside this have."""

from __future__ import annotations

import click
from msgspec import to_builtins

from cas.background import Heartbeat, background_of
from cas.cli.call import JSON, Call, counted, pass_call, size, table
from cas.cli.exits import WrongFound
from cas.clock import SECOND_US
from cas.deliveries import Backlog, backlog
from cas.errors import NotFound
from cas.forms import shown_time
from cas.mirrored import Mirrored, mirrored_of, shown_age
from cas.replicas import targets
from cas.restored import last_drill
from replicator.forget_cli import forget
from replicator.places import place_of
from replicator.targets_cli import claim, fetch, moved
from replicator.verify_cli import backfill, verify


@click.group()
def replicate() -> None:
    """Work in the background: send callbacks and mails, end what is over, collect, scrub.

    `blobcask serve` runs this by itself, unless told not to.
    """


@replicate.command()
@click.option("--with-parent", type=int, hidden=True, help="The PID of a parent to end with.")
@pass_call
def run(call: Call, with_parent: int | None) -> None:
    """Run until stopped. One at a time works on a ROOT; a second one waits for its turn."""
    # Late, so that `status` starts without asyncio and the HTTP client.
    from cas.parent import die_with
    from replicator.log import install
    from replicator.runner import Runner

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
@click.argument("name")
@click.option("--thorough", is_flag=True, help="Also ask what takes some 12 MiB to find out.")
@pass_call
def probe(call: Call, name: str, thorough: bool) -> None:
    """Find out what target NAME honours, and have the mirror follow that.

    Stores small objects under probe/ there and removes them. Done by itself when a target is
    first reached; again by hand where its server has become another one. The mirror follows
    within a minute.
    """
    from cas.replicas import keep_profile
    from replicator.opening import open_target
    from replicator.probe import probe as ask
    from replicator.probe import words

    target = open_target(place_of(call, name))
    try:
        profile = ask(target, thorough=thorough)
        place = target.place
    finally:
        target.close()
    kept = any(configured.name == name for configured in call.settings.targets)
    if kept:
        with call.open() as store:
            try:
                keep_profile(store.catalog, name, profile.to_json())
            except NotFound:  # never mirrored to yet: it is probed again when that begins
                kept = False
    form = {"target": name, "place": place, "kept": kept, "profile": to_builtins(profile)}
    call.answer(form, [f"{name}: {place}", *words(profile)])


@replicate.command()
@pass_call
def status(call: Call) -> None:
    """Show how the jobs are, what waits to be sent, and how far each target has come.

    Not 0 when something stands still.
    """
    with call.open() as store:
        with store.catalog.read() as snapshot:
            waiting = backlog(snapshot, store.now_us(snapshot))
            drills = {
                target.name: last_drill(snapshot, target.name) for target in targets(snapshot)
            }
        background = background_of(store.root, store.clock.now_us())
        mirrored = mirrored_of(store, background)
        trouble = background.trouble()
        trouble += [why for target in mirrored for why in target.stalled]
        if clock := store.clock_trouble():
            trouble.append(f"nothing is tried again and nothing expires: {clock}")
    beat = background.beat
    form = _form(background.runs, beat, waiting, trouble)
    form["targets"] = [
        _target_form(target) | {"last_successful_drill": drills.get(target.name)}
        for target in mirrored
    ]
    lines = _lines(beat, waiting)
    if mirrored:
        lines += ["", *_target_lines(mirrored)]
    lines += [f"Last successful drill with {name}: {at}." for name, at in drills.items() if at]
    call.answer(form, lines)
    for what in trouble:
        call.say(f"Trouble: {what}")
    if trouble:
        raise WrongFound


def _target_form(target: Mirrored) -> JSON:
    state = target.state
    return {
        "name": target.name,
        "place": target.place,
        "waiting_rows": target.backlog.rows,
        "waiting_bytes": target.backlog.size_bytes,
        "oldest_seconds": target.backlog.oldest_us // SECOND_US,
        "rows_per_second": round(state.rows_per_s, 3) if state else 0.0,
        "bytes_per_second": round(state.bytes_per_s) if state else 0,
        "catch_up_seconds": None if target.catch_up_s is None else round(target.catch_up_s),
        "metadata_behind_seconds": state.behind_us // SECOND_US if state else None,
        "shipped_at": shown_time(state.shipped_at or None) if state else None,
        "canary_seconds": state.canary_us // SECOND_US if state and state.canary_worked else None,
        "canary_error": state.canary_error if state else "",
        "reached": bool(state and state.probed),
        "fenced": state.fenced if state else "",
        "down": state.down if state else "",
        "last_error": state.last_error if state else "",
        "stalled": list(target.stalled),
    }


def _target_lines(mirrored: list[Mirrored]) -> list[str]:
    headings = ("TARGET", "WAITING", "OLDEST", "RATE", "DONE IN", "METADATA", "CANARY", "ERROR")
    rows = [_target_row(target) for target in mirrored]
    return [
        *table(headings, rows),
        *(f"{target.name} is {target.place or 'not known yet'}." for target in mirrored),
    ]


def _target_row(target: Mirrored) -> tuple[str, ...]:
    state, waiting = target.state, target.backlog
    done_in = "-" if target.catch_up_s is None else shown_age(int(target.catch_up_s * SECOND_US))
    told = [f"{waiting.rows:,} ({size(waiting.size_bytes)})", shown_age(waiting.oldest_us)]
    if state is None:
        return (target.name, *told, "-", "-", "-", "-", "no process has reached it yet")
    return (
        target.name,
        *told,
        f"{state.rows_per_s:.1f}/s {size(int(state.bytes_per_s))}/s",
        done_in,
        f"{shown_age(state.behind_us)} behind" if state.shipped_seq else "none",
        f"{shown_age(state.canary_us)} ago" if state.canary_worked else "none yet",
        state.fenced or state.down or state.last_error or state.canary_error or "-",
    )


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
    told = f"{counted(waiting.waiting, 'message')} to send{oldest}; {waiting.failed} failed."
    return [*lines, told]


replicate.add_command(claim)
replicate.add_command(fetch)
replicate.add_command(moved)
replicate.add_command(verify)
replicate.add_command(forget)
replicate.add_command(backfill)
