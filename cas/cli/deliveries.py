"""Verbs on what is sent to others: deliveries (list, resend), callbacks (secret)."""

from __future__ import annotations

import click

from cas.callbacks import shown_secret, tenant_secret
from cas.cli.call import FIRST_TENANT, JSON, Call, pages, pass_call, table
from cas.clock import rfc3339
from cas.errors import NotFound
from cas.forms import shown_time
from cas.keys import load_keys
from cas.listing import Page
from cas.records import CANCELLED, DONE, FAILED, WAITING, Delivery
from cas.references import check_segment

_tenant_option = click.option(
    "--tenant", default=FIRST_TENANT, show_default=True, help="Whose they are."
)


def delivery_form(delivery: Delivery) -> JSON:
    """A delivery; times are RFC 3339. Its payload is left out: it is about the subject."""
    return {
        "delivery_id": delivery.delivery_id,
        "kind": delivery.kind,
        "subject": delivery.subject,
        "target": delivery.target,
        "status": delivery.status,
        "attempts": delivery.attempts,
        "created_at": rfc3339(delivery.created_at),
        "next_attempt_at": shown_time(delivery.next_attempt_at),
        "last_attempt_at": shown_time(delivery.last_attempt_at),
        "last_status": delivery.last_status,
        "last_error": delivery.last_error,
        "done_at": shown_time(delivery.done_at),
        "tenant_id": delivery.tenant_id,
    }


@click.group(invoke_without_command=True)
@_tenant_option
@click.option("--status", type=click.Choice([WAITING, DONE, FAILED, CANCELLED]), help="Only those.")
@click.option("--limit", default=100, show_default=True, help="How many; 0 is all.")
@click.option("--cursor", help="Where an earlier listing ended.")
@click.pass_context
def deliveries(
    ctx: click.Context, tenant: str, status: str | None, limit: int, cursor: str | None
) -> None:
    """List what was sent or is to be sent, newest first: the callbacks of uploads, and the mails
    of approvals."""
    if ctx.invoked_subcommand is not None:
        return
    call = ctx.ensure_object(Call)
    with call.open() as store:
        own = store.deliveries(tenant, call.actor)

        def page(after: str | None, count: int) -> Page[Delivery]:
            return own.list(status=status, cursor=after, limit=count)

        call.answer_pages(
            "deliveries",
            pages(page, cursor, limit),
            delivery_form,
            ("DELIVERY", "STATUS", "ATTEMPTS", "CREATED", "TARGET", "LAST ERROR"),
            lambda delivery: (
                delivery.delivery_id,
                delivery.status,
                str(delivery.attempts),
                rfc3339(delivery.created_at),
                delivery.target,
                delivery.last_error or "-",
            ),
        )


@deliveries.command()
@click.argument("delivery_ids", nargs=-1, required=True, metavar="ID...")
@click.option("--tenant", help="Whose: by default that of each delivery.")
@pass_call
def resend(call: Call, delivery_ids: tuple[str, ...], tenant: str | None) -> None:
    """Send it again at once, whatever became of it; its identifier stays the same."""
    sent: list[Delivery] = []
    with call.open() as store:
        for delivery_id in delivery_ids:
            whose = tenant
            if whose is None:
                with store.catalog.read() as snapshot:
                    found = snapshot.get(Delivery, delivery_id)
                if found is None:
                    raise NotFound("delivery", delivery_id)
                whose = found.tenant_id
            sent.append(store.deliveries(whose, call.actor).resend(delivery_id))
    rows = [(delivery.delivery_id, delivery.status, delivery.target) for delivery in sent]
    call.answer({"deliveries": [delivery_form(delivery) for delivery in sent]}, table((), rows))


@click.group()
def callbacks() -> None:
    """What receivers of callbacks need to know."""


@callbacks.command()
@_tenant_option
@pass_call
def secret(call: Call, tenant: str) -> None:
    """Print the secret that signs the callbacks of a tenant, and nothing else.

    Its receivers verify with any library of the Standard Webhooks scheme.
    """
    call.store_root  # noqa: B018  raises: a misspelt --root must not get keys of its own
    check_segment(tenant, "tenant")
    shown = shown_secret(tenant_secret(load_keys(call.settings).callbacks, tenant))
    call.answer({"tenant_id": tenant, "secret": shown}, [shown])


VERBS = (deliveries, callbacks)
