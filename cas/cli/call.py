"""One call of the command: its settings, and how it answers.

On stdout stands only the answer, for people or, with --json, as one JSON document; all
else (progress, remarks, errors) goes to stderr.
"""

from __future__ import annotations

import json
import os
import pwd
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, final

import click
import msgspec

from cas.config import Settings
from cas.errors import InvalidRequest, NotFound
from cas.listing import PAGE_MAX, Page
from cas.records import PendingUpload
from cas.references import Reference, parse_reference
from cas.setting_sources import load_settings
from cas.store import Store
from cas.views import FilesView, StoreView, UploadsView

if TYPE_CHECKING:
    from cas.remote import RemoteStore

T = TypeVar("T")
JSON = dict[str, Any]

FIRST_TENANT = "default"


@final
class Call:
    """What all verbs share; click hands it to them as `ctx.obj`."""

    def __init__(self) -> None:
        self.config: Path | None = None
        self.root: Path | None = None
        self.server: str | None = None
        self.bearer = ""
        self.json = False

    @cached_property
    def settings(self) -> Settings:
        """Read at first use, so that --help needs none; raises InvalidSetting."""
        settings = load_settings(self.config, os.environ)
        if self.root is None:
            return settings
        store = msgspec.structs.replace(settings.store, root=self.root)
        return msgspec.structs.replace(settings, store=store)

    @cached_property
    def actor(self) -> str:
        """Who calls, for the audit log: `cli:` and the user of the process."""
        try:
            return f"cli:{pwd.getpwuid(os.getuid()).pw_name}"
        except KeyError:  # a container's user often has no name
            return f"cli:{os.getuid()}"

    @property
    def store_root(self) -> Path:
        """ROOT, which must hold a store; raises NotFound.

        Only verbs that put something in make a store: a misspelt --root must not.
        """
        root = self.settings.store.root
        if not (root / "VERSION").is_file():
            raise NotFound("store", str(root.absolute()))
        return root

    def open(self, *, make: bool = False) -> Store:
        """The store at ROOT; with `make` a new one where there is none. A context manager.

        Raises click.UsageError under --server: what the verb does, a server does by itself.
        """
        if self.server is not None:
            raise click.UsageError("this verb works on a ROOT, not on a --server")
        return Store.open(self.settings.store.root if make else self.store_root, self.settings)

    def view(self, *, make: bool = False) -> StoreView:
        """The store that --server names, or the one at ROOT, for verbs that serve both."""
        return self.open(make=make) if self.server is None else self.remote()

    def remote(self) -> RemoteStore:
        """The store that --server names. A context manager."""
        assert self.server is not None
        # Late: most calls need no HTTP client, and it takes longer to load than they take.
        from cas.remote import RemoteStore

        return RemoteStore(self.server, self.bearer)

    def files(self, store: StoreView, tenant: str | None) -> FilesView:
        """The files of a tenant: the given one, else the token's or the first."""
        return store.files(self._tenant(tenant), self.actor)

    def uploads(self, store: StoreView, tenant: str | None) -> UploadsView:
        """The uploads of a tenant, as `files`."""
        return store.uploads(self._tenant(tenant), self.actor)

    def _tenant(self, given: str | None) -> str:
        return given or (FIRST_TENANT if self.server is None else "")

    def page_url(self, upload: PendingUpload) -> str | None:
        """The address of an upload's page, as far as it is known here."""
        if not upload.upload_token:  # of a server, by a token that may only view
            return None
        gateway = self.settings.gateway
        base = self.server or gateway.public_url
        host, _, port = gateway.bind.rpartition(":")
        if not base:
            if gateway.bind.startswith("unix:") or host in ("0.0.0.0", "[::]") or port == "0":  # noqa: S104
                return None
            base = f"http://{gateway.bind}"
        return f"{base.rstrip('/')}/u/{upload.upload_token}"

    def reference(self, text: str) -> Reference:
        """Read a reference of this store's scheme; raises InvalidReference."""
        return parse_reference(text, self.settings.references.scheme)

    # --- the answer

    def answer(self, form: object, lines: Iterable[str]) -> None:
        """`form` as JSON, or `lines` for people."""
        if self.json:
            click.echo(_json(form))
            return
        for line in lines:
            click.echo(line)

    def answer_pages(
        self,
        noun: str,
        pages: Iterable[Page[T]],
        form: Callable[[T], JSON],
        header: Sequence[str],
        row: Callable[[T], Sequence[str]],
    ) -> None:
        """A listing of any length, page by page; the cursor of the next page at its end."""
        cursor: str | None = None
        if self.json:
            click.echo(f"{{{_json(noun)}: [", nl=False)
        first = True
        for page in pages:
            cursor = page.next_cursor
            if self.json:
                for item in page.items:
                    click.echo(("" if first else ", ") + _json(form(item)), nl=False)
                    first = False
            else:
                rows = [row(item) for item in page.items]
                for line in table(header if first else (), rows):
                    click.echo(line)
                first = False
        if self.json:
            click.echo(f'], "next_cursor": {_json(cursor)}}}')
        elif cursor is not None:
            self.say(f"There are more: --cursor {cursor}")

    def say(self, text: str) -> None:
        """A remark; not part of the answer."""
        click.echo(text, err=True)

    @contextmanager
    def progress(self, what: str, *, size: bool = True) -> Iterator[Bar]:
        """A bar on stderr while something runs, if a person watches there.

        `size` tells that bytes are counted, else things are.
        """
        if not sys.stderr.isatty():
            yield Bar(None)
            return
        # Late: most calls draw nothing, and rich takes longer to load than they take.
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        counted = (DownloadColumn(), TransferSpeedColumn()) if size else (MofNCompleteColumn(),)
        columns = (TextColumn("{task.description}"), BarColumn(), *counted, TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as drawn:
            task = drawn.add_task(what, total=None)

            def update(done: int | None, total: int | None) -> None:
                drawn.update(task, completed=done, total=total)

            yield Bar(update)


@final
class Bar:
    """How far something is. Does nothing where nobody watches."""

    def __init__(self, update: Callable[[int | None, int | None], None] | None) -> None:
        self._update = update
        self._done = 0

    @property
    def shown(self) -> bool:
        return self._update is not None

    def total(self, count: int) -> None:
        """How much there is to do in all."""
        if self._update:
            self._update(None, count)

    def advance(self, count: int) -> None:
        """So much more is done."""
        self.at(self._done + count)

    def at(self, done: int, total: int | None = None) -> None:
        """So much is done, of `total` when that is known."""
        self._done = done
        if self._update:
            self._update(done, total)


# --- how things look to people


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Aligned columns, two spaces apart."""
    lines = [[_printable(cell) for cell in row] for row in rows]
    if header:
        lines.insert(0, list(header))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        yield "  ".join(cells).rstrip()


def size(count: int) -> str:
    """Bytes for people: `0 B`, `1.5 MiB`."""
    if count < 1024:
        return f"{count} B"
    amount = float(count)
    units = iter(("KiB", "MiB", "GiB", "TiB"))
    unit = ""
    while amount >= 1024 and (larger := next(units, None)):
        amount, unit = amount / 1024, larger
    return f"{amount:.1f} {unit}"


def counted(count: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def shown(value: object) -> str:
    """A value of a record for people."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def pages(
    page: Callable[[str | None, int], Page[T]], cursor: str | None, limit: int
) -> Iterator[Page[T]]:
    """The pages of a listing of `limit` items (0: all), asked for one by one."""
    left = limit
    while True:
        found = page(cursor, min(left, PAGE_MAX) if limit else PAGE_MAX)
        yield found
        left -= len(found.items)
        cursor = found.next_cursor
        if cursor is None or (limit and left <= 0):
            return


def read_value(option: str, parse: Callable[[str], int], text: str) -> int:
    """An option's text as a duration, a size or a time; raises InvalidRequest with its name."""
    try:
        return parse(text)
    except ValueError as error:
        raise InvalidRequest(option, f"{text!r}: {error}") from None


def _printable(text: str) -> str:
    """Without what would move a terminal's cursor or split a line."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "�" for c in text)


def _json(form: object) -> str:
    return json.dumps(form, ensure_ascii=False)


# --- options that several verbs take

pass_call = click.make_pass_decorator(Call)

tenant_option = click.option(
    "--tenant", help=f"Whose: by default {FIRST_TENANT}, with --server the token's."
)
reference_tenant_option = click.option(
    "--tenant", help="Whose: by default the tenant that the reference names."
)
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Show what would be removed, and remove nothing."
)
