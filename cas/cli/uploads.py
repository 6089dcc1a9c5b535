"""Verbs on uploads: request-upload uploads."""

from __future__ import annotations

import click

from cas.cli.call import Call, pages, pass_call, read_value, shown, size, table, tenant_option
from cas.cli.forms import slot_form, upload_form
from cas.clock import SECOND_US, rfc3339
from cas.listing import Page
from cas.records import CANCELLED, COMPLETED, EXPIRED, PENDING, PendingUpload
from cas.references import DIRECT_RUN
from cas.retention import parse_retention
from cas.setting_kinds import parse_duration, parse_size
from cas.uploads import UploadRequest


@click.command("request-upload")
@click.argument("name")
@tenant_option
@click.option("--run", default=DIRECT_RUN, show_default=True, help="The workflow run it is of.")
@click.option(
    "--type", "types", multiple=True, help="An allowed extension, such as pdf; several are fine."
)
@click.option("--max-size", default="0B", show_default=True, help="Of one file; 0B: no limit.")
@click.option("--max-files", default=1, show_default=True, help="How many files at most.")
@click.option("--prompt", default="", help="What the page says to the person.")
@click.option("--retention", help="days:N, hours:N, until:RFC3339 or forever.")
@click.option("--expires-in", help="How long the link works, as in 24h.")
@click.option("--callback-url", help="Where to tell that the upload is completed.")
@click.option("--redirect-url", help="Where the page sends the person then.")
@pass_call
def request_upload(
    call: Call,
    name: str,
    tenant: str | None,
    run: str,
    types: tuple[str, ...],
    max_size: str,
    max_files: int,
    prompt: str,
    retention: str | None,
    expires_in: str | None,
    callback_url: str | None,
    redirect_url: str | None,
) -> None:
    """Ask a person for files; prints the link of the upload page."""
    wanted = UploadRequest(
        name=name,
        allowed_types=list(types),
        max_size_bytes=read_value("--max-size", parse_size, max_size),
        max_files=max_files,
        prompt=prompt,
        retention=None if retention is None else parse_retention(retention),
        expires_in_s=None
        if expires_in is None
        else read_value("--expires-in", parse_duration, expires_in) // SECOND_US,
        callback_url=callback_url,
        redirect_url=redirect_url,
        run=run,
    )
    with call.view(make=True) as store:
        upload = call.uploads(store, tenant).request(wanted)
    url = call.page_url(upload)
    call.answer(upload_form(upload, url), [url or f"/u/{upload.upload_token}"])


@click.command()
@click.argument("token", required=False)
@tenant_option
@click.option(
    "--status",
    type=click.Choice([PENDING, COMPLETED, CANCELLED, EXPIRED]),
    help="Only uploads in this state.",
)
@click.option("--limit", default=100, show_default=True, help="How many; 0 is all.")
@click.option("--cursor", help="Where an earlier listing ended.")
@click.option("--cancel", is_flag=True, help="Close the pending upload TOKEN.")
@pass_call
def uploads(
    call: Call,
    token: str | None,
    tenant: str | None,
    status: str | None,
    limit: int,
    cursor: str | None,
    cancel: bool,
) -> None:
    """List uploads, newest first; with a TOKEN, show that one and its slots."""
    if cancel and token is None:
        raise click.UsageError("--cancel needs the TOKEN of the upload")
    with call.view() as store:
        own = call.uploads(store, tenant)
        if token is None:

            def page(after: str | None, count: int) -> Page[PendingUpload]:
                return own.list(status=status, cursor=after, limit=count)

            call.answer_pages(
                "uploads",
                pages(page, cursor, limit),
                lambda upload: upload_form(upload, call.page_url(upload)),
                ("TOKEN", "STATUS", "CREATED", "EXPIRES", "NAME"),
                lambda upload: (
                    upload.upload_token or "-",
                    upload.status,
                    rfc3339(upload.created_at),
                    rfc3339(upload.expires_at),
                    upload.name,
                ),
            )
            return
        link = own.get(token)
        upload = own.cancel(token) if cancel else link.upload
        slots = [slot_form(slot) for slot in link.slots()]
    form = upload_form(upload, call.page_url(upload))
    rows = [(key, shown(value)) for key, value in form.items()]
    rows += [
        (f"slot {slot['index']}", f"{slot['filename']}, {size(slot['size_bytes'])}")
        for slot in slots
    ]
    call.answer({**form, "slots": slots}, table((), rows))


VERBS = (request_upload, uploads)
