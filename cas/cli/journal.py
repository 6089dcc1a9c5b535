"""Verbs on the journal: journal verify, journal tail."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import final

import click
import msgspec

from cas.catalog import Change, Key, Position
from cas.catalog.checkpoint import checkpoints_in, read_checkpoint
from cas.catalog.journal import segments_in
from cas.catalog.layout import LAYOUT_OF_NUMBER
from cas.catalog.recovery import Folders, verify_journal
from cas.catalog.tuples import unpack
from cas.cli.call import JSON, Bar, Call, counted, pass_call
from cas.cli.exits import WrongFound
from cas.clock import rfc3339
from cas.errors import JournalDamaged
from cas.records import DeliveryPayload, Event, Record
from cas.sealing import is_sealed
from cas.store import Store

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
@click.option(
    "--tenant",
    help="Only what touches this tenant's records. Reads all of the journal that is kept: "
    "a removal names no tenant, so it must be known whose the record was.",
)
@click.option("--follow", is_flag=True, help="Go on with what is written from now on.")
@pass_call
def tail(call: Call, after: int | None, frames: int, tenant: str | None, follow: bool) -> None:
    """Show what was written, by whom, oldest first.

    With --json each change is a line of JSON of its own.
    """
    with call.open() as store:
        seq = after if after is not None else max(store.catalog.position().seq - frames, 0)
        belongings = None
        if tenant is not None:
            with call.progress("journal tail", size=False) as bar:
                belongings = _Belongings.until(store, tenant, seq, bar)
        while True:
            for change in store.catalog.changes(seq):
                seq = change.seq
                shown = change if belongings is None else belongings.part(change)
                if belongings is None or shown.ops:
                    for line in _lines(call, shown):
                        click.echo(line)
            if not follow:
                return
            while store.catalog.position().seq == seq:
                time.sleep(_POLL_S)


@final
class _Belongings:
    """Which records are one tenant's, by what was seen of them so far.

    Blobs are nobody's: tenants share them.
    """

    def __init__(self, tenant: str) -> None:
        self._tenant = tenant
        self._keys: set[tuple[int, Key | bytes]] = set()

    @classmethod
    def until(cls, store: Store, tenant: str, seq: int, bar: Bar) -> _Belongings:
        """As they were after frame `seq`, as far as checkpoint and journal reach back."""
        found = cls(tenant)
        folders = Folders(store.root)
        if segments_in(folders.journal)[0].first_seq > 1:  # its beginning was pruned
            for checkpoint in checkpoints_in(folders.checkpoints)[:1]:
                found._see_checkpoint(folders.checkpoints / checkpoint.filename)
        for change in store.catalog.changes(0):
            if change.seq > seq:
                break
            found.part(change)
            bar.at(change.seq, seq)
        return found

    def part(self, change: Change) -> Change:
        """The change with those of its ops alone that touch the tenant's records."""
        ops = [op for op in change.ops if self._see(op[0].schema.number, op[1], op[2])]
        return msgspec.structs.replace(change, ops=ops)

    def _see(self, number: int, key: Key | bytes, record: Record | None) -> bool:
        """Whether it is the tenant's; remembers, or forgets what is removed."""
        if record is None:
            known = (number, key) in self._keys
            self._keys.discard((number, key))
            return known
        if getattr(record, "tenant_id", None) != self._tenant:
            return False
        self._keys.add((number, key))
        return True

    def _see_checkpoint(self, path: Path) -> None:
        # A damaged one, or one that was just pruned, tells as much as could be read.
        with suppress(JournalDamaged, FileNotFoundError):
            for batch in read_checkpoint(path):
                if isinstance(batch, Position):
                    continue
                for number, key, raw in batch:
                    layout = LAYOUT_OF_NUMBER[number]
                    if raw is not None and "tenant_id" in layout.kind.__struct_fields__:
                        self._see(number, key, layout.decode(raw))


def _lines(call: Call, change: Change) -> Iterator[str]:
    if call.json:
        yield json.dumps(_change_form(change), ensure_ascii=False)
        return
    head = f"{change.seq}  {rfc3339(change.at_us)}  {change.actor or '-'}"
    yield head + (f"  {change.request_id}" if change.request_id else "")
    for kind, key, record in change.ops:
        sign = "-" if record is None else "+"
        yield f"    {sign} {kind.schema.table} {_key(key, record)}"


def _key(key: Key | bytes, record: Record | None) -> str:
    """The primary key in words, the same for a record and for its removal."""
    values = record.primary_key() if record is not None else key
    parts = unpack(values) if isinstance(values, bytes) else values
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
    if isinstance(record, (Event, DeliveryPayload)) and not is_sealed(record.payload):
        form["payload"] = json.loads(record.payload)
    return form


VERBS = (journal,)
