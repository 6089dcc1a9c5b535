"""`blobcask secret`: what a tenant shares with who calls its webhooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import click

from cas.cli.call import FIRST_TENANT, Call, counted, pass_call, table
from cas.clock import rfc3339
from cas.keys import load_keys
from workflows import secrets
from workflows.secrets import VALUE_BYTES_MAX, Secrets

_tenant_option = click.option(
    "--tenant", default=FIRST_TENANT, show_default=True, help="Whose they are."
)


@click.group()
def secret() -> None:
    """Secrets that webhooks are signed with; kept encrypted by ROOT/keys/secrets."""


@contextmanager
def _secrets(call: Call, tenant: str, *, make: bool = False) -> Iterator[Secrets]:
    with call.open(make=make) as store:
        ring = load_keys(call.settings).secrets
        yield Secrets(store.catalog, ring, tenant_id=tenant, actor=call.actor, request_id="")


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
@pass_call
def set_secret(call: Call, name: str, tenant: str, source: BinaryIO) -> None:
    """Keep a secret under NAME, in place of the one that is there.

    Each line is a secret that is good: give the new one and the old one while the other side
    changes from one to the other, then the new one alone. It is never an argument, which others
    could read in the process list.
    """
    value = source.read(VALUE_BYTES_MAX + 1)
    with _secrets(call, tenant, make=True) as own:
        kept = own.put(name, value.rstrip(b"\r\n"))
    form = {"tenant_id": tenant, "secret_id": kept.secret_id}
    call.answer(form, [kept.secret_id])


@secret.command(name="list")
@_tenant_option
@pass_call
def list_secrets(call: Call, tenant: str) -> None:
    """List the names of a tenant's secrets, and never what they are."""
    with _secrets(call, tenant) as own:
        found = own.list()
    forms = [
        {
            "secret_id": kept.secret_id,
            "created_at": rfc3339(kept.created_at),
            "created_by": kept.created_by,
        }
        for kept in found
    ]
    rows = [(form["secret_id"], form["created_at"], form["created_by"]) for form in forms]
    call.answer({"secrets": forms}, table(("SECRET", "SET", "BY"), rows))


@secret.command(name="rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@_tenant_option
@pass_call
def remove_secrets(call: Call, names: tuple[str, ...], tenant: str) -> None:
    """Forget secrets: calls that are signed with them are refused from now on."""
    with _secrets(call, tenant) as own:
        for name in names:
            own.remove(name)
    call.answer({"removed": list(names)}, names)


@secret.command()
@pass_call
def reseal(call: Call) -> None:
    """Encrypt the secrets of all tenants with the newest key of ROOT/keys/secrets.

    To change the key: append a line to that file, restart the server, run this, and take the
    old line out.
    """
    with call.open() as store:
        count = secrets.reseal(store.catalog, load_keys(call.settings).secrets)
    call.answer({"resealed": count}, [f"{counted(count, 'secret')} resealed"])
