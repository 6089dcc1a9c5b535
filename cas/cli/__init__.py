"""The command `blobcask`: its root group. One module here for each family of verbs.

    call      what all verbs share: settings, answers, progress
    exits     exit codes, one per class of error
    files     put get cat ls stat rm hold
    uploads   request-upload uploads
    deliveries  deliveries (resend), callbacks (secret)
    upkeep    sweep collect scrub rebuild recount checkpoint doctor
    journal   journal verify, journal tail
    receipts  receipt verify, receipt keys

The verbs of `files` and `uploads` ask a server just as well (--server, --token).

Verbs of the packages above `cas` are entry points of the group `blobcask.commands`, loaded
when called, so that `blobcask ls` imports no server. Every verb takes --config, --root,
--server, --token and --json, before or after its name; it finds them in `ctx.obj`, a `Call`.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, NoReturn, final

import click

from cas import __version__
from cas.cli import deliveries, files, journal, receipts, upkeep, uploads
from cas.cli.call import Call
from cas.cli.exits import BROKEN_PIPE, INTERRUPTED, exit_code, exit_table

_GROUP = "blobcask.commands"


def _set(ctx: click.Context, option: click.Parameter, value: Any) -> None:
    if value:  # given here; else it may have been given before the verb
        setattr(ctx.ensure_object(Call), str(option.name), value)


def _shared_options() -> list[click.Option]:
    path = click.Path(path_type=Path)
    return [
        click.Option(
            ["--config"],
            type=path,
            envvar="BLOBCASK_CONFIG",
            show_envvar=True,
            help="The settings file; without one, the defaults.",
            expose_value=False,
            callback=_set,
        ),
        click.Option(
            ["--root"],
            type=path,
            help="The folder of the store, in place of [store] root.",
            expose_value=False,
            callback=_set,
        ),
        click.Option(
            ["--server"],
            envvar="BLOBCASK_SERVER",
            show_envvar=True,
            metavar="URL",
            help="A server to ask, in place of a ROOT here.",
            expose_value=False,
            callback=_set,
        ),
        click.Option(
            ["--token", "bearer"],
            envvar="BLOBCASK_TOKEN",
            show_envvar=True,
            help="The bearer token for --server; others can read it in the process list.",
            expose_value=False,
            callback=_set,
        ),
        click.Option(
            ["--json"],
            is_flag=True,
            help="Answer with one JSON document.",
            expose_value=False,
            callback=_set,
        ),
    ]


def _share_options(command: click.Command) -> click.Command:
    """Give a verb, and the verbs below it, the shared options it does not have."""
    own = {name for parameter in command.params for name in parameter.opts}
    command.params += [option for option in _shared_options() if not own & set(option.opts)]
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            _share_options(inner)
    return command


@final
class Verbs(click.Group):
    """The root group: loads verbs lazily and turns errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(entry.name for entry in _entries())})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        found = super().get_command(ctx, name)
        if found is not None:
            return found
        entry = next((entry for entry in _entries() if entry.name == name), None)
        if entry is None:
            return None
        command = _load(entry)
        self.add_command(command, name)
        return command

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        super().add_command(_share_options(cmd), name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # here, where a reader that went away can still be told
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(INTERRUPTED)
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                _leave_pipe(ctx)
            code = exit_code(error)
            if code is None:
                raise
            _tell(ctx.ensure_object(Call), error, code)
            ctx.exit(code)
        return result


def _entries() -> Iterator[EntryPoint]:
    yield from entry_points(group=_GROUP)


def _load(entry: EntryPoint) -> click.Command:
    try:
        command = entry.load()
    except ImportError as error:
        reason = f"not installed: {error}"

        @click.command(help=f"({reason})", context_settings={"ignore_unknown_options": True})
        @click.argument("arguments", nargs=-1)
        def absent(arguments: tuple[str, ...]) -> None:
            raise click.UsageError(reason)

        return absent
    assert isinstance(command, click.Command)
    return command


def _leave_pipe(ctx: click.Context) -> NoReturn:
    # What is still buffered would be written, and fail again, when Python ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    ctx.exit(BROKEN_PIPE)


def _tell(call: Call, error: Exception, code: int) -> None:
    text = str(error) or type(error).__name__
    if call.json:
        form = {"error": type(error).__name__, "message": text, "exit_code": code}
        click.echo(json.dumps(form, ensure_ascii=False), err=True)
    else:
        click.echo(f"Error: {text}", err=True)


@click.command(cls=Verbs, epilog=exit_table(), params=_shared_options())
@click.version_option(__version__, prog_name="blobcask")
@click.pass_context
def main(ctx: click.Context) -> None:
    """A content-addressed blob store: files by reference, upload links, no lost bytes."""
    ctx.ensure_object(Call)


for _family in (files, uploads, deliveries, receipts, upkeep, journal):
    for _verb in _family.VERBS:
        main.add_command(_verb)
