"""Verbs on receipts: receipt verify, receipt keys."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import click
import msgspec

from cas.cli.call import Bar, Call, counted, pass_call, size, table
from cas.errors import ReceiptNotProved
from cas.keys import load_keys
from cas.receipts import BYTES_MAX, Receipt, jwks_of, keys_of_jwks, public_keys, read_key, verify

_PIECE_BYTES = 1 << 20


@click.group()
def receipt() -> None:
    """Signed statements of what an upload brought."""


@receipt.command("verify")
@click.argument("document", metavar="RECEIPT", type=click.Path(path_type=Path))
@click.argument("files", metavar="[FILE]…", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--keys",
    "jwks",
    type=click.Path(path_type=Path),
    help="A saved JWKS file, as /api/v1/receipts/keys and `receipt keys` give it.",
)
@click.option("--key", help="One public key: base64 of 32 bytes.")
@pass_call
def verify_receipt(
    call: Call, document: Path, files: tuple[Path, ...], jwks: Path | None, key: str | None
) -> None:
    """Prove a receipt, and that each FILE is one that it names. Asks nobody.

    The keys are those of --keys or --key, else those of the store at --root.
    """
    with document.open("rb") as source:
        stated = verify(source.read(BYTES_MAX + 1), _trusted(call, jwks, key))
    with call.progress("receipt verify") as bar:
        bar.total(sum(path.stat().st_size for path in files))
        found = {path: _measured(path, bar) for path in files}
    _tell(call, stated, found)
    known = {(file.checksum_sha256, file.size_bytes) for file in stated.files}
    strangers = [str(path) for path, what in found.items() if what not in known]
    if strangers:
        raise ReceiptNotProved(f"not among the files of the receipt: {', '.join(strangers)}")


@receipt.command()
@pass_call
def keys(call: Call) -> None:
    """Print the public keys that prove this store's receipts, as a JWKS to be saved."""
    click.echo(json.dumps(jwks_of(_own(call)), indent=2))


def _trusted(call: Call, jwks: Path | None, key: str | None) -> list[bytes]:
    if jwks is not None and key is not None:
        raise click.UsageError("give --keys or --key, not both")
    if jwks is not None:
        return keys_of_jwks(jwks.read_bytes())
    return [read_key(key)] if key is not None else _own(call)


def _own(call: Call) -> list[bytes]:
    if call.server is not None:
        raise click.UsageError("save /api/v1/receipts/keys of the server, and give it as --keys")
    call.store_root  # noqa: B018  raises: a misspelt --root must not get keys of its own
    return public_keys(load_keys(call.settings).receipts)


def _measured(path: Path, bar: Bar) -> tuple[str, int]:
    """Digest and size of a file, read in pieces."""
    digest, size_bytes = hashlib.sha256(), 0
    with path.open("rb") as source:
        while data := source.read(_PIECE_BYTES):
            digest.update(data)
            size_bytes += len(data)
            bar.advance(len(data))
    return digest.hexdigest(), size_bytes


def _tell(call: Call, stated: Receipt, found: dict[Path, tuple[str, int]]) -> None:
    paths = {what: str(path) for path, what in found.items()}
    shown = [
        (file, paths.get((file.checksum_sha256, file.size_bytes), "")) for file in stated.files
    ]
    form = msgspec.to_builtins(stated)
    for item, (_, path) in zip(form["files"], shown, strict=True):
        item["path"] = path or None
    place = f" of {stated.issuer}" if stated.issuer else ""
    rows = [
        [file.filename, size(file.size_bytes), file.checksum_sha256, path] for file, path in shown
    ]
    lines = [
        f"Proved: {stated.name!r}, {counted(len(rows), 'file')}, completed {stated.completed_at}",
        f"upload {stated.upload_id}, store {stated.store_id}{place}",
        *table(["filename", "size", "sha256", "checked"], rows),
    ]
    call.answer(form, lines)


VERBS = (receipt,)
