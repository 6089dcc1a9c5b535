"""`blobcask secret`: what a tenant shares with who calls its webhooks."""

from __future__ import annotations

from typing import BinaryIO

import click

from cas.cli.call import FIRST_TENANT, Call, counted, pass_call, read_value, table
from cas.clock import rfc3339
from cas.forms import shown_time
from cas.keys import load_keys
from cas.setting_kinds import parse_duration
from cas.store import Store
from workflows import secrets
from workflows.secrets import VALUE_BYTES_MAX, Secrets, old_until

_tenant_option = click.option(
    "--tenant", default=FIRST_TENANT, show_default=True, help="Whose they are."
)


@click.group()
def secret() -> None:
    """Secrets that webhooks are signed with; kept encrypted by ROOT/keys/secrets."""


def _secrets(call: Call, store: Store, tenant: str) -> Secrets:
    ring = load_keys(call.settings).secrets
    return Secrets(store.catalog, ring, tenant_id=tenant, actor=call.actor, request_id="")


@secret.command(name="set")
@click.argument("name")
@_tenant_option
@click.option(
    "--from",
    "source",
    type=click.File("rb"),
    default="-",
    help="A file that holds it; by default standard input.",
)
@click.option(
    "--keep-old",
    metavar="DURATION",
    help="How long the one that is replaced stays good, as in 24h; by default no longer.",
)
@pass_call
def set_secret(call: Call, name: str, tenant: str, source: BinaryIO, keep_old: str | None) -> None:
    """Keep a secret under NAME, in place of the one that is there.

    With --keep-old both are good for that time, while the other side changes from one to the
    other; to end it sooner, set the new one again without. A secret that leaked is replaced
    without it. Each line is a secret that is good. It is never an argument, which others could
    read in the process list.
    """
    keep_old_us = None if keep_old is None else read_value("--keep-old", parse_duration, keep_old)
    value = source.read(VALUE_BYTES_MAX + 1)
    with call.open(make=True) as store:
        own = _secrets(call, store, tenant)
        kept = own.put(name, value.rstrip(b"\r\n"), keep_old_us=keep_old_us)
        until = shown_time(old_until(kept, store.about_now_us()))
    form = {"tenant_id": tenant, "secret_id": kept.secret_id, "old_until": until}
    call.answer(form, [kept.secret_id])


@secret.command(name="list")
@_tenant_option
@pass_call
def list_secrets(call: Call, tenant: str) -> None:
    """List the names of a tenant's secrets, and never what they are; of those that were set
    anew with --keep-old also until when the old one is good."""
    with call.open() as store:
        found = _secrets(call, store, tenant).list()
        now_us = store.about_now_us()
    forms = [
        {
            "secret_id": kept.secret_id,
            "created_at": rfc3339(kept.created_at),
            "created_by": kept.created_by,
            "old_until": shown_time(old_until(kept, now_us)),
        }
        for kept in found
    ]
    rows = [tuple("-" if shown is None else shown for shown in form.values()) for form in forms]
    call.answer({"secrets": forms}, table(("SECRET", "SET", "BY", "OLD GOOD UNTIL"), rows))


@secret.command(name="rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@_tenant_option
@pass_call
def remove_secrets(call: Call, names: tuple[str, ...], tenant: str) -> None:
    """Forget secrets: calls that are signed with them are refused from now on."""
    with call.open() as store:
        own = _secrets(call, store, tenant)
        for name in names:
            own.remove(name)
    call.answer({"removed": list(names)}, names)


@secret.command()
@pass_call
def reseal(call: Call) -> None:
    """Encrypt the secrets of all tenants with the newest key of ROOT/keys/secrets.

    To change the key: append a line to that file, restart server, runner and replicator, run
    this, and take the old line out.
    """
    with call.open() as store:
        count = secrets.reseal(store.catalog, load_keys(call.settings).secrets)
    call.answer({"resealed": count}, [f"{counted(count, 'secret')} resealed"])
