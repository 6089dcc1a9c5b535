"""Verbs on the journal: journal verify, journal tail."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import click
import msgspec

from cas.catalog import Change, Position
from cas.catalog.checkpoint import checkpoints_in, read_checkpoint
from cas.catalog.journal import segments_in
from cas.catalog.recovery import Folders, verify_journal
from cas.cli.call import JSON, Call, counted, pass_call
from cas.cli.exits import WrongFound
from cas.clock import rfc3339
from cas.errors import JournalDamaged
from cas.records import Event, Record

_POLL_S = 0.5  # how often --follow looks


@click.group()
def journal() -> None:
    """The append-only truth of the catalog, and its audit log."""


@journal.command()
@pass_call
def verify(call: Call) -> None:
    """Check every frame's checksum, order and hash chain, and the checkpoints.

    Takes no lock and changes nothing: run it while others use the store.
    """
    folders = Folders(call.store_root)
    last: Position | None = None
    damage: list[JournalDamaged] = []
    frames = 0
    with call.progress("journal verify", size=False) as bar:
        segments = segments_in(folders.journal)
        checkpoints = checkpoints_in(folders.checkpoints)
        bar.total(len(segments) + len(checkpoints))
        for item in verify_journal(folders):
            if isinstance(item, JournalDamaged):
                damage.append(item)
            else:
                last = item
                bar.advance(1)
        for checkpoint in checkpoints:
            try:
                for _ in read_checkpoint(folders.checkpoints / checkpoint.filename):
                    pass
            except JournalDamaged as error:
                damage.append(error)
            bar.advance(1)
    if last is not None:
        frames = last.seq - (segments[0].first_seq - 1)
    bad = [
        {"path": str(error.path), "offset": error.offset, "reason": error.reason}
        for error in damage
    ]
    form = {
        "segments": len(segments),
        "checkpoints": len(checkpoints),
        "seq": last.seq if last else None,
        "chain": last.chain.hex() if last else None,
        "damage": bad,
    }
    lines = [str(error) for error in damage]
    if last is not None:
        lines.append(
            f"{counted(len(segments), 'segment')}, {counted(frames, 'frame')}, "
            f"{counted(len(checkpoints), 'checkpoint')}; frame {last.seq} has chain "
            f"{last.chain.hex()}"
        )
    call.answer(form, lines)
    if damage:
        raise WrongFound


@journal.command()
@click.option("--after", type=int, help="Begin after this frame, in place of the last ones.")
@click.option("--frames", default=20, show_default=True, help="How many of the last frames.")
@click.option("--tenant", help="Only changes of this tenant's records (removals name no tenant).")
@click.option("--follow", is_flag=True, help="Go on with what is written from now on.")
@pass_call
def tail(call: Call, after: int | None, frames: int, tenant: str | None, follow: bool) -> None:
    """Show what was written, by whom, oldest first.

    With --json each change is a line of JSON of its own.
    """
    with call.open() as store:
        seq = after if after is not None else max(store.catalog.position().seq - frames, 0)
        while True:
            for change in store.catalog.changes(seq):
                seq = change.seq
                if tenant is None or _is_of(change, tenant):
                    for line in _lines(call, change):
                        click.echo(line)
            if not follow:
                return
            while store.catalog.position().seq == seq:
                time.sleep(_POLL_S)


def _is_of(change: Change, tenant: str) -> bool:
    return any(getattr(record, "tenant_id", None) == tenant for _, _, record in change.ops)


def _lines(call: Call, change: Change) -> Iterator[str]:
    if call.json:
        yield json.dumps(_change_form(change), ensure_ascii=False)
        return
    head = f"{change.seq}  {rfc3339(change.at_us)}  {change.actor or '-'}"
    yield head + (f"  {change.request_id}" if change.request_id else "")
    for kind, key, record in change.ops:
        sign = "-" if record is None else "+"
        yield f"    {sign} {kind.schema.table} {_key(key, record)}"


def _key(key: object, record: Record | None) -> str:
    values = key if record is None else record.primary_key()
    parts = values if isinstance(values, tuple) else (values,)
    return " ".join(part.hex() if isinstance(part, bytes) else str(part) for part in parts)


def _change_form(change: Change) -> JSON:
    return {
        "seq": change.seq,
        "at": rfc3339(change.at_us),
        "actor": change.actor,
        "request_id": change.request_id,
        "ops": [
            {
                "table": kind.schema.table,
                "key": _key(key, record),
                "record": None if record is None else _record_form(record),
            }
            for kind, key, record in change.ops
        ],
    }


def _record_form(record: Record) -> JSON:
    """The fields of a record; digests as hex, times as µs since 1970."""
    form = {
        field: value.hex() if isinstance(value, bytes) else value
        for field, value in zip(
            record.__struct_fields__, msgspec.structs.astuple(record), strict=True
        )
    }
    if isinstance(record, Event):
        form["payload"] = json.loads(record.payload)
    return form


VERBS = (journal,)
