"""`blobcask serve`, `blobcask token` and `blobcask url`."""

from __future__ import annotations

from typing import Final

import click

from cas.cli.call import FIRST_TENANT, Call, reference_tenant_option
from cas.keys import Keys, load_keys
from cas.links import DOWNLOAD_LIFETIME_S_MAX, SignedLinks
from cas.signing import Signer
from cas.store import Store
from cas.uploads import UploadRequest
from gateway.auth import ADMIN, PERMISSIONS, Tokens
from gateway.issuers import Issuers

TOKEN_DAYS: Final = 30
_DAY_S: Final = 24 * 3600


@click.command()
@click.option(
    "--replicator/--no-replicator",
    default=True,
    show_default=True,
    help="Run `blobcask replicate run` beside it; without, run that as a service of its own.",
)
@click.option(
    "--runner/--no-runner",
    default=True,
    show_default=True,
    help="Run `blobcask workflow serve` beside it; without, run that as a service of its own.",
)
@click.pass_obj
def serve(call: Call, replicator: bool, runner: bool) -> None:
    """Run the gateway until it is stopped, and with it the work in the background and the
    workflows.

    On a new ROOT it makes the keys, and prints an admin token and a first upload link.
    """
    # Late, so that `token` and every other verb start without gunicorn and Falcon.
    from gateway.companion import Companion
    from gateway.wsgi import Server

    settings = call.settings
    root = settings.store.root
    root.mkdir(parents=True, exist_ok=True)
    keys = load_keys(settings)
    Issuers.of(settings.auth)  # a key file that is no use is one clear error here
    first: str | None = None
    # Opened and closed before any worker is forked: a ROOT that cannot be used is one clear
    # error here, and an index that must catch up does so once.
    with Store.open(root, settings) as store:
        if keys.fresh:
            click.echo(f"New store in {root}: made its keys in {root / 'keys'}.", err=True)
            first = _first_upload(store)
        now_us = _now_us(store)
    companions = []
    if replicator:
        companions.append(Companion("replicator", _words(call, "replicate", "run")))
    if runner:
        companions.append(Companion("runner", _words(call, "workflow", "serve")))

    def ready(address: str) -> None:
        base = settings.gateway.public_url or _reached_here(address)
        if not settings.gateway.public_url and base != address:
            how = f"Links of workflows begin with {base}: they open on this machine only, until "
            click.echo(f"{how}[gateway] public_url says how people reach it.", err=True)
        if base.startswith("http"):  # and no socket's path
            # For links that nobody asks for over HTTP, in mails: the port may be any free one.
            for companion in companions:
                companion.tell({"BLOBCASK_GATEWAY__PUBLIC_URL": base})
        click.echo(f"Serving {root} at {address}", err=True)
        if first is not None:
            click.echo(f"Admin token (tenant {FIRST_TENANT}, {TOKEN_DAYS} days):", err=True)
            made = _issue(keys, now_us, FIRST_TENANT, (ADMIN,), TOKEN_DAYS)
            click.echo(f"  {made}", err=True)
            click.echo("First upload link, open it in a browser:", err=True)
            click.echo(f"  {base}/u/{first}", err=True)
        else:
            how = f"blobcask token --tenant {FIRST_TENANT} --permission {ADMIN}"
            click.echo(f"A token: {how}", err=True)

    Server(settings, keys, ready, companions).run()


@click.command()
@click.option("--tenant", default=FIRST_TENANT, show_default=True, help="Whom it speaks for.")
@click.option(
    "--permission",
    "permissions",
    multiple=True,
    required=True,
    type=click.Choice(PERMISSIONS),
    help="What it allows; may be given several times.",
)
@click.option("--subject", default="cli", show_default=True, help="The actor in the audit log.")
@click.option(
    "--days",
    type=click.IntRange(1, 3650),
    default=TOKEN_DAYS,
    show_default=True,
    help="How long it is good.",
)
@click.pass_obj
def token(call: Call, tenant: str, permissions: tuple[str, ...], subject: str, days: int) -> None:
    """Print a bearer token for the HTTP API, and nothing else."""
    # The store must be there: a misspelt --root must not get keys of its own.
    with Store.open(call.store_root, call.settings) as store:
        now_us = _now_us(store)
    made = _issue(load_keys(call.settings), now_us, tenant, permissions, days, subject)
    call.answer({"token": made}, [made])


@click.command()
@click.argument("reference", metavar="REF")
@click.option(
    "--expires-in",
    type=click.IntRange(1, DOWNLOAD_LIFETIME_S_MAX),
    help="Seconds; by default [gateway] url_expiry.",
)
@reference_tenant_option
@click.pass_obj
def url(call: Call, reference: str, expires_in: int | None, tenant: str | None) -> None:
    """Print a signed URL that downloads a file without a login."""
    parsed = call.reference(reference)
    if call.server is not None:
        with call.remote() as remote:
            made = remote.files(tenant or "").url(parsed, expires_in)
        call.answer({"url": made}, [made])
        return
    gateway = call.settings.gateway
    with call.open() as store:
        file = store.files(tenant or parsed.tenant_id, call.actor).stat(parsed)
        now_us = _now_us(store)
    links = SignedLinks(Signer(load_keys(call.settings).signing), lambda: now_us, gateway)
    base = gateway.public_url or _reached_here(f"http://{gateway.bind}")
    made = links.download(base, file, expires_in or links.lifetime_s)
    call.answer({"url": made}, [made])


def _reached_here(address: str) -> str:
    """Where a program on this machine reaches what is served at `address`: one that is bound to
    all addresses has none of its own."""
    for every, loopback in (("//0.0.0.0:", "//127.0.0.1:"), ("//[::]:", "//[::1]:")):
        address = address.replace(every, loopback)
    return address


def _words(call: Call, *verb: str) -> list[str]:
    """The words that run a companion with the settings of this call."""
    words = [*verb, "--root", str(call.settings.store.root.absolute())]
    return words if call.config is None else [*words, "--config", str(call.config)]


def _now_us(store: Store) -> int:
    """Catalog time, by which the server judges what is made here (invariant 10): a clock that
    is wrong by years is wrong for neither of them."""
    with store.catalog.read() as snapshot:
        return store.now_us(snapshot)


def _issue(
    keys: Keys,
    now_us: int,
    tenant: str,
    permissions: tuple[str, ...],
    days: int,
    subject: str = "admin",
) -> str:
    return Tokens(keys.jwt, lambda: now_us).issue(tenant, subject, permissions, days * _DAY_S)


def _first_upload(store: Store) -> str:
    """A pending upload for whoever tries the server, so that a newcomer has a link at once."""
    wanted = UploadRequest(
        name="first upload",
        max_files=5,
        prompt="Try it: choose some files, watch them arrive, press Done.",
    )
    return store.uploads(FIRST_TENANT, "serve").request(wanted).upload_token
