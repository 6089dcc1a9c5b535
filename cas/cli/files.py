"""Verbs on files: put get cat ls stat rm hold."""

from __future__ import annotations

import hashlib
import io
import mimetypes
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import final

import click

from cas.cli.call import (
    Bar,
    Call,
    counted,
    dry_run_option,
    pages,
    pass_call,
    reference_tenant_option,
    shown,
    size,
    table,
    tenant_option,
)
from cas.cli.forms import file_form
from cas.durable import DISK
from cas.errors import BlobDamaged, Conflict, Held
from cas.files import PutItem
from cas.forms import shown_time
from cas.listing import Page
from cas.records import StoredFile
from cas.references import DIRECT_RUN, Reference, check_name, check_segment
from cas.retention import parse_retention
from cas.views import FilesView, StoreView

_STDIN = "-"
_WATCHED_BYTES = 32 << 20  # a smaller file is stored before a bar could be read
_COPY_BYTES = 1 << 20


@click.command()
@click.argument(
    "sources",
    nargs=-1,
    required=True,
    metavar="FILE…",
    type=click.Path(dir_okay=False, exists=True, allow_dash=True),
)
@tenant_option
@click.option("--run", default=DIRECT_RUN, show_default=True, help="The workflow run it is of.")
@click.option("--name", help="What it is called; by default as the file.")
@click.option("--filename", help="What it is saved as, and its extension; by default the file's.")
@click.option("--content-type", help="By default what the filename's extension says.")
@click.option("--retention", help="days:N, hours:N, until:RFC3339 or forever.")
@pass_call
def put(
    call: Call,
    sources: tuple[str, ...],
    tenant: str | None,
    run: str,
    name: str | None,
    filename: str | None,
    content_type: str | None,
    retention: str | None,
) -> None:
    """Store files, or stdin (-); prints their references when they are durable."""
    if len(sources) > 1 and (name or filename or _STDIN in sources):
        raise click.UsageError("--name, --filename and - are for a single file")
    kept = None if retention is None else parse_retention(retention)
    with call.view(make=True) as store, call.progress("put", size=len(sources) == 1) as bar:
        files = call.files(store, tenant)
        if len(sources) > 1:
            bar.total(len(sources))
            items = _watched(
                (_item(Path(source), content_type) for source in sources),
                bar,
            )
            stored = files.put_many(items, run=run, retention=kept)
        else:
            saved_as = filename or (None if sources[0] == _STDIN else Path(sources[0]).name)
            with closing(_source(sources[0], bar)) as source:
                stored = [
                    files.put(
                        source.value,
                        name=name or saved_as or "stdin",
                        run=run,
                        filename=saved_as,
                        content_type=content_type or _type_of(saved_as),
                        retention=kept,
                    )
                ]
    call.answer(
        {"files": [file_form(file) for file in stored]}, (file.storage_ref for file in stored)
    )


@final
class _Watched(io.FileIO):
    """A file that tells how far it was read."""

    bar: Bar

    def readinto(self, buffer: memoryview, /) -> int | None:  # type: ignore[override]
        count = super().readinto(buffer)
        self.bar.at(self.tell())
        return count


@final
class _Opened:
    """What `put` reads: a path (the fastest), a file that is watched, or stdin."""

    def __init__(self, value: Path | io.FileIO) -> None:
        self.value = value

    def close(self) -> None:
        if isinstance(self.value, _Watched):
            self.value.close()


def _source(source: str, bar: Bar) -> _Opened:
    if source == _STDIN:
        return _Opened(io.FileIO(sys.stdin.fileno(), closefd=False))
    path = Path(source)
    size_bytes = path.stat().st_size if path.is_file() else 0
    if not bar.shown or size_bytes < _WATCHED_BYTES:
        return _Opened(path)
    watched = _Watched(path)
    watched.bar = bar
    bar.total(size_bytes)
    return _Opened(watched)


def _item(path: Path, content_type: str | None) -> PutItem:
    return PutItem(path, path.name, path.name, content_type or _type_of(path.name))


def _type_of(filename: str | None) -> str | None:
    return mimetypes.guess_type(filename)[0] if filename else None


def _watched(items: Iterable[PutItem], bar: Bar) -> Iterator[PutItem]:
    for item in items:
        yield item
        bar.advance(1)


@click.command()
@click.argument("reference", metavar="REF")
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write it; it is there whole and verified, or not at all.",
)
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@reference_tenant_option
@pass_call
def get(call: Call, reference: str, output: Path, force: bool, tenant: str | None) -> None:
    """Copy a stored file to FILE, checking its SHA-256 on the way."""
    ref = call.reference(reference)
    with call.view() as store, call.progress("get") as bar:
        file, source = _files(call, store, ref, tenant).reader(ref)
        with source:
            _save(file, source, output, force, bar)
    call.answer({"file": file_form(file), "output": str(output)}, [str(output)])


def _save(file: StoredFile, source: io.RawIOBase, output: Path, force: bool, bar: Bar) -> None:
    """Give the bytes their name only when all are there and right."""
    temporary = DISK.temporary(output.absolute().parent)
    try:
        _copy(file, source, lambda chunk: DISK.write(temporary.fd, chunk), bar)
        os.fchmod(temporary.fd, 0o666 & ~_umask())
        DISK.sync_data(temporary.fd)
        if force:
            DISK.replace(temporary.fd, output.absolute())
        else:
            try:
                DISK.link(temporary.fd, output.absolute())
            except FileExistsError:
                raise Conflict(f"{output} is there already; --force replaces it") from None
    finally:
        DISK.discard(temporary)


@click.command()
@click.argument("reference", metavar="REF")
@reference_tenant_option
@pass_call
def cat(call: Call, reference: str, tenant: str | None) -> None:
    """Write the bytes of a stored file to stdout.

    Damage can be told only at the end, by the exit code: what comes out is not verified
    before it does. `get` writes nothing that is wrong.
    """
    ref = call.reference(reference)
    with call.view() as store:
        file, source = _files(call, store, ref, tenant).reader(ref)
        with source:
            out = sys.stdout.buffer
            _copy(file, source, out.write, Bar(None))
            out.flush()


def _copy(
    file: StoredFile, source: io.RawIOBase, write: Callable[[memoryview], object], bar: Bar
) -> None:
    """All bytes of a file, hashed while they pass; raises BlobDamaged at the end."""
    bar.total(file.size_bytes)
    sha256 = hashlib.sha256()
    buffer = memoryview(bytearray(_COPY_BYTES))
    done = 0
    while count := source.readinto(buffer):
        chunk = buffer[:count]
        sha256.update(chunk)
        write(chunk)
        done += count
        bar.at(done)
    if sha256.digest() != file.checksum_sha256:
        raise BlobDamaged(file.checksum_sha256.hex(), "its bytes have another digest")


def _files(call: Call, store: StoreView, reference: Reference, tenant: str | None) -> FilesView:
    return call.files(store, tenant or reference.tenant_id)


def _no_date(file: StoredFile) -> str:
    return "never" if file.undated_at is None else "undated"


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@click.command()
@tenant_option
@click.option("--run", help="Only files of this workflow run.")
@click.option("--name", help="Only files of this name.")
@click.option("--limit", default=100, show_default=True, help="How many; 0 is all.")
@click.option("--cursor", help="Where an earlier listing ended.")
@pass_call
def ls(
    call: Call,
    tenant: str | None,
    run: str | None,
    name: str | None,
    limit: int,
    cursor: str | None,
) -> None:
    """List files, newest first."""
    if run is not None:
        check_segment(run, "run")
    if name is not None:
        check_name(name)
    with call.view() as store:
        files = call.files(store, tenant)

        def page(after: str | None, count: int) -> Page[StoredFile]:
            return files.list(run=run, name=name, cursor=after, limit=count)

        call.answer_pages(
            "files",
            pages(page, cursor, limit),
            file_form,
            ("SIZE", "CREATED", "EXPIRES", "FILE", "REFERENCE"),
            lambda file: (
                size(file.size_bytes),
                shown_time(file.created_at) or "",
                "held" if file.hold else shown_time(file.expires_at) or _no_date(file),
                file.original_filename or file.name,
                file.storage_ref,
            ),
        )


@click.command()
@click.argument("reference", metavar="REF")
@reference_tenant_option
@pass_call
def stat(call: Call, reference: str, tenant: str | None) -> None:
    """Show the record of a file."""
    ref = call.reference(reference)
    with call.view() as store:
        file = _files(call, store, ref, tenant).stat(ref)
    form = file_form(file)
    call.answer(form, table((), ((key, shown(value)) for key, value in form.items())))


@click.command()
@click.argument("references", metavar="REF…", nargs=-1, required=True)
@reference_tenant_option
@dry_run_option
@pass_call
def rm(call: Call, references: tuple[str, ...], tenant: str | None, dry_run: bool) -> None:
    """Delete files; their bytes go when nothing names them and the grace is over.

    All are looked up first: one that is unknown or held leaves all of them as they are.
    """
    refs = [call.reference(text) for text in dict.fromkeys(references)]
    with call.view() as store:
        found = [_files(call, store, ref, tenant).stat(ref) for ref in refs]
        for file in found:
            if file.hold:
                raise Held(file.storage_ref)
        if not dry_run:
            for ref in refs:
                _files(call, store, ref, tenant).delete(ref)
    size_bytes = sum(file.size_bytes for file in found)
    names = [file.storage_ref for file in found]
    call.answer({"deleted": names, "size_bytes": size_bytes, "dry_run": dry_run}, names)
    done = "would be deleted" if dry_run else "deleted"
    call.say(f"{counted(len(found), 'file')} {done}, {size(size_bytes)}.")


@click.command()
@click.argument("reference", metavar="REF")
@click.option("--off", is_flag=True, help="Lift the hold.")
@reference_tenant_option
@pass_call
def hold(call: Call, reference: str, off: bool, tenant: str | None) -> None:
    """Put a file under a legal hold: while it is set, nothing deletes the file."""
    ref = call.reference(reference)
    with call.view() as store:
        file = _files(call, store, ref, tenant).hold(ref, not off)
    call.answer(file_form(file), [f"{file.storage_ref} {'held' if file.hold else 'not held'}"])


VERBS = (put, get, cat, ls, stat, rm, hold)
