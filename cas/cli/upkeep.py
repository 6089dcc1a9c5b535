"""Verbs that keep a store well: sweep collect scrub rebuild recount checkpoint doctor."""

from __future__ import annotations

import time
from collections import Counter

import click
import msgspec

from cas.cli.call import Call, counted, dry_run_option, pass_call, read_value, size, table
from cas.cli.exits import WrongFound
from cas.dating import Dated, date_all
from cas.doctor import examine
from cas.errors import Conflict
from cas.forgetting import Due
from cas.quotas import recount_usage
from cas.rebuild import rebuild as rebuild_index
from cas.restored import waits_for_acceptance
from cas.scrub import Scrub
from cas.setting_kinds import parse_duration, parse_size
from cas.store import Store
from cas.sweep import execute_sweep, plan_sweep
from cas.totals import recount_totals


def _refuse_wrong_clock(store: Store) -> None:
    """Nothing is removed by a clock that is not to be believed (invariant 10), nor before a
    state of an earlier time is accepted."""
    with store.catalog.read() as snapshot:
        trouble = waits_for_acceptance(snapshot)
    trouble = trouble or store.clock_trouble()
    if trouble:
        raise Conflict(f"nothing was removed: {trouble}")


@click.command()
@dry_run_option
@click.option("--accept-clock", is_flag=True, help="The clock is right, however far it leads.")
@pass_call
def sweep(call: Call, dry_run: bool, accept_clock: bool) -> None:
    """End the files, uploads, events and records of workflows, of all tenants, whose time is over.

    Their bytes go with `collect`; those of unfinished resumable uploads go at once. Refuses
    while the clock is not to be believed, until it is accepted once with --accept-clock.
    """
    references: list[str] = []
    uploads: list[str] = []
    partials: list[str] = []
    ended_files = ended_uploads = ended_partials = events = leftovers = 0
    workflows = Counter(Due().counts())
    with call.open() as store:
        if accept_clock and not dry_run:
            store.accept_clock()
        dated = Dated() if dry_run else date_all(store.catalog)
        _refuse_wrong_clock(store)
        while True:
            with store.catalog.read() as snapshot:
                plan = plan_sweep(
                    snapshot,
                    store.now_us(snapshot),
                    partial_files=store.partial_files,
                    keep_us=store.settings.events.keep,
                )
            references += plan.references
            uploads += plan.upload_ids
            partials += plan.partial_ids
            if dry_run:
                events, leftovers = len(plan.event_ids), len(plan.leftovers)
                workflows.update(plan.workflows.counts())
            if dry_run or not plan:
                break
            swept = execute_sweep(store.catalog, plan, partial_files=store.partial_files)
            ended_files += swept.files
            ended_uploads += swept.uploads
            ended_partials += swept.partials
            events += swept.events
            leftovers += swept.leftovers
            workflows.update(msgspec.to_builtins(swept.workflows))
    if dry_run:
        ended_files, ended_uploads, ended_partials = len(references), len(uploads), len(partials)
    form = {
        "files": ended_files,
        "uploads": ended_uploads,
        "partials": ended_partials,
        "events": events,
        "leftovers": leftovers,
        **workflows,
        "dated": msgspec.to_builtins(dated),
        "references": references,
        "upload_ids": uploads,
        "partial_ids": partials,
        "dry_run": dry_run,
    }
    call.answer(form, [*references, *uploads, *partials])
    done = "would be ended" if dry_run else "ended"
    if dated:
        call.say(f"{counted(dated.files, 'file')} that waited for the clock now have their end.")
    call.say(f"{counted(ended_files, 'file')} and {counted(ended_uploads, 'upload')} {done}.")
    if ended_partials or leftovers:
        unfinished = counted(ended_partials, "unfinished upload")
        call.say(f"{unfinished} and {counted(leftovers, 'leftover file')} {done}.")
    said = {
        "event": events,
        "workflow": workflows["runs"],
        "approval": workflows["approvals"],
        "webhook": workflows["webhooks"],
        "wait": workflows["waits"],
    }
    if any(said.values()):
        parts = [counted(count, noun) for noun, count in said.items() if count]
        call.say(f"{', '.join(parts)} {done}.")


@click.command()
@dry_run_option
@pass_call
def collect(call: Call, dry_run: bool) -> None:
    """Remove the bytes that no file needs and whose grace is over."""
    digests: list[str] = []
    blobs = size_bytes = 0
    with call.open() as store:
        _refuse_wrong_clock(store)
        with call.progress("collect") as bar:
            while True:
                with store.catalog.read() as snapshot:
                    plan = store.collector.plan(snapshot, store.now_us(snapshot))
                digests += [digest.hex() for digest in plan.digests]
                if dry_run:
                    blobs, size_bytes = len(plan.digests), plan.size_bytes
                    break
                if not plan.digests:
                    break
                collected = store.collector.execute(plan)
                blobs += collected.blobs
                size_bytes += collected.size_bytes
                bar.at(size_bytes)
    form = {"blobs": blobs, "size_bytes": size_bytes, "digests": digests, "dry_run": dry_run}
    call.answer(form, digests)
    done = "would be removed" if dry_run else "removed"
    call.say(f"{counted(blobs, 'blob')} {done}, {size(size_bytes)}.")


@click.command()
@dry_run_option
@click.option("--time-limit", help="Stop after so long, as in 30m; the next scrub goes on there.")
@click.option("--rate", help="Read no more than this a second, as in 50MiB.")
@pass_call
def scrub(call: Call, dry_run: bool, time_limit: str | None, rate: str | None) -> None:
    """Hash what is stored again, longest unverified first; set damage aside.

    Removes orphans and what crashes left behind once they are older than the grace, and
    audits the reference counts. With --dry-run all is checked and nothing changed.
    """
    limit_s = (
        None if time_limit is None else read_value("--time-limit", parse_duration, time_limit) / 1e6
    )
    bytes_per_s = 0 if rate is None else read_value("--rate", parse_size, rate)
    with call.open() as store, call.progress("scrub") as bar:
        run = Scrub(store, bytes_per_s=bytes_per_s, dry_run=dry_run, progress=bar.at)
        deadline = None if limit_s is None else time.monotonic() + limit_s
        while run.step() and (deadline is None or time.monotonic() < deadline):
            pass
    report = run.report
    call.answer(report.form(), report.lines())
    if not report.well:
        raise WrongFound


@click.command()
@pass_call
def rebuild(call: Call) -> None:
    """Make the index anew from checkpoint and journal. Needs the store alone."""
    with call.progress("rebuild") as bar:
        made = rebuild_index(call.store_root, progress=bar.at)
    state = made.position.state.hex()
    call.answer(
        {
            "ops": made.ops,
            "build_seconds": round(made.build_s, 3),
            "proof_seconds": round(made.proof_s, 3),
            "ops_per_second": made.ops_per_s,
            "seq": made.position.seq,
            "state": state,
        },
        [
            f"{made.ops:,} ops in {made.build_s:.1f} s, {made.ops_per_s:,} a second",
            f"frame {made.position.seq}, state {state}, proved in {made.proof_s:.1f} s",
        ],
    )


@click.command()
@pass_call
def recount(call: Call) -> None:
    """Count anew what tenants store, and all totals, where the doctor found them wrong."""
    with call.open() as store:
        wrong = recount_usage(store.catalog) + recount_totals(store.catalog)
    call.answer({"mended": wrong}, [f"{counted(wrong, 'sum')} had a wrong count"])


@click.command()
@pass_call
def checkpoint(call: Call) -> None:
    """Write the whole catalog beside the journal, and prune what two checkpoints cover."""
    with call.open() as store, call.progress("checkpoint", size=False):
        position = store.catalog.checkpoint()
    form = {
        "epoch": position.epoch,
        "seq": position.seq,
        "chain": position.chain.hex(),
        "state": position.state.hex(),
    }
    call.answer(form, [f"checkpoint at frame {position.seq} of epoch {position.epoch}"])


@click.command()
@click.option("--read-data", is_flag=True, help="Hash every stored blob, too.")
@pass_call
def doctor(call: Call, read_data: bool) -> None:
    """Check every invariant that can be checked here; changes nothing.

    Prints what it finds and how to mend it. Others may go on using the store.
    """
    with call.progress("doctor", size=read_data) as bar:
        findings = list(
            examine(call.store_root, call.settings, read_data=read_data, progress=bar.at)
        )
    rows = [
        (
            finding.severity,
            f"invariant {finding.invariant}" if finding.invariant else "",
            finding.what,
            finding.mend,
        )
        for finding in findings
    ]
    form = {"findings": [msgspec.to_builtins(finding) for finding in findings]}
    call.answer(form, table(("SEVERITY", "", "WHAT", "HOW TO MEND"), rows) if rows else [])
    wrong = sum(finding.wrong for finding in findings)
    call.say(f"{counted(wrong, 'thing')} wrong." if wrong else "Nothing is wrong.")
    if wrong:
        raise WrongFound


VERBS = (sweep, collect, scrub, rebuild, recount, checkpoint, doctor)
