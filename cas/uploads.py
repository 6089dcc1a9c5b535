"""Uploads: a request for files from a person, its slots, and how it ends.

    pending → completed | cancelled | expired

This is the tenant's view (request, list, cancel); what the token opens is in
`cas/upload_links.py`, and what completing makes of it in `cas/completions.py`.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final
from urllib.parse import urlsplit

import msgspec

from cas.catalog import Catalog, Snapshot, Transaction
from cas.clock import SECOND_US
from cas.errors import InvalidRequest, NotFound, RecordExists, UploadClosed
from cas.events import append_event
from cas.identifiers import new_id
from cas.listing import Page, newest
from cas.once import OnceKey, once
from cas.partials import drop_partials
from cas.records import CANCELLED, PENDING, PendingUpload
from cas.references import DIRECT_RUN, check_name, check_segment
from cas.retention import Retention
from cas.upload_links import FILES_MAX, Policy, UploadLink, as_of, slots_of, upload_behind

TOKEN_CHARS = 8  # 62^8 is 2.2e14: guessing is hopeless under a limit on guesses
_TOKEN_ALPHABET = string.ascii_letters + string.digits

_PROMPT_CHARS_MAX = 4000
_TYPES_MAX = 50
_EXPIRES_IN_S_MAX = 366 * 24 * 3600


@final
@dataclass(frozen=True, slots=True)
class UploadRequest:
    """What a tenant asks a person for. `max_size_bytes` 0 is no limit but the store's."""

    name: str
    allowed_types: list[str] = field(default_factory=list)  # extensions; empty: any
    max_size_bytes: int = 0
    max_files: int = 1
    prompt: str = ""
    retention: Retention | None = None
    expires_in_s: int | None = None
    callback_url: str | None = None
    redirect_url: str | None = None
    run: str = DIRECT_RUN


@final
class Uploads:
    """The uploads of one tenant. Made by `Store.uploads`; safe for threads."""

    def __init__(
        self,
        catalog: Catalog,
        open_link: Callable[[PendingUpload, str], UploadLink],
        policy: Policy,
        *,
        tenant_id: str,
        actor: str,
        request_id: str,
        now_us: Callable[[Snapshot], int],
    ) -> None:
        self._catalog = catalog
        self._open_link = open_link
        self._policy = policy
        self._tenant_id = check_segment(tenant_id, "tenant")
        self._actor = actor
        self._request_id = request_id
        self._now_us = now_us

    def request(self, wanted: UploadRequest, key: OnceKey | None = None) -> PendingUpload:
        """Record a request and make its token; durable on return.

        Where the same `key` was used before, the upload of that time is returned as it is now,
        and none is made. Raises InvalidRequest with the field and the reason,
        InvalidName, KeyReused where the key was used for another request.
        """
        _check(wanted)
        policy = self._policy
        retention = wanted.retention or policy.default_retention
        expiry_us = (
            policy.default_expiry_us
            if wanted.expires_in_s is None
            else wanted.expires_in_s * SECOND_US
        )

        def insert(txn: Transaction) -> str:
            upload_id = new_id(txn.now_us)
            upload = PendingUpload(
                upload_id=upload_id,
                upload_token="".join(secrets.choice(_TOKEN_ALPHABET) for _ in range(TOKEN_CHARS)),
                tenant_id=self._tenant_id,
                workflow_run_id=wanted.run,
                event_name=f"upload_{upload_id}",
                name=wanted.name,
                allowed_types=[kind.lower().removeprefix(".") for kind in wanted.allowed_types],
                max_size_bytes=wanted.max_size_bytes,
                max_files=wanted.max_files,
                prompt=wanted.prompt,
                status=PENDING,
                retention_policy=retention.text,
                callback_url=wanted.callback_url,
                redirect_url=wanted.redirect_url,
                created_at=txn.now_us,
                created_by=self._actor,
                expires_at=txn.now_us + expiry_us,
                open_until=txn.now_us + expiry_us if txn.believed else None,
                undated_at=None if txn.believed else txn.now_us,
            )
            txn.insert(upload)
            return upload_id

        def insert_once(txn: Transaction) -> PendingUpload:
            upload_id, _ = once(txn, self._tenant_id, key, lambda: insert(txn))
            upload = txn.get(PendingUpload, upload_id)
            if upload is None:
                raise NotFound("upload", upload_id)
            return as_of(upload, txn.now_us)

        while True:
            try:
                return self._catalog.write(
                    insert_once, actor=self._actor, request_id=self._request_id
                )
            except RecordExists:
                continue  # the token is taken: once in 10^14 tries

    def list(
        self, *, status: str | None = None, cursor: str | None = None, limit: int = 100
    ) -> Page[PendingUpload]:
        """A page of uploads, newest first."""
        index = "tenant" if status is None else "status"
        prefix = (self._tenant_id,) if status is None else (self._tenant_id, status)
        with self._catalog.read() as snapshot:
            now_us = self._now_us(snapshot)
            page = newest(snapshot, PendingUpload, index, prefix, cursor, limit)
        shown = [as_of(upload, now_us) for upload in page.items]
        if status is not None:  # one past its time stays among the pending until the sweep
            shown = [upload for upload in shown if upload.status == status]
        return Page(shown, page.next_cursor)

    def get(self, token: str) -> UploadLink:
        """The upload behind a token, if it is the tenant's; raises NotFound."""
        with self._catalog.read() as snapshot:
            upload = upload_behind(snapshot, token)
            now_us = self._now_us(snapshot)
        if upload is None or upload.tenant_id != self._tenant_id:
            raise NotFound("upload", token)
        return self._open_link(as_of(upload, now_us), self._request_id)

    def cancel(self, token: str) -> PendingUpload:
        """Close a pending upload and let go of its slots; raises NotFound, UploadClosed."""

        def change(txn: Transaction) -> PendingUpload:
            upload = txn.find(PendingUpload, "upload_token", token)
            if upload is None or upload.tenant_id != self._tenant_id:
                raise NotFound("upload", token)
            upload = as_of(upload, txn.now_us)
            if upload.status != PENDING:
                raise UploadClosed(upload.status)
            return close_upload(txn, upload, CANCELLED, self._policy.event_keep_us)

        link = self.get(token)
        unfinished = link.partials()
        cancelled = self._catalog.write(change, actor=self._actor, request_id=self._request_id)
        link.sweep_partials(unfinished)
        return cancelled


def close_upload(
    txn: Transaction, upload: PendingUpload, status: str, keep_us: int
) -> PendingUpload:
    """End an upload without files: its slots let go of their bytes, and a workflow that waits
    for it hears that nothing will come. The event of it is kept for `keep_us`."""
    drop_partials(txn, upload.upload_id)
    for slot in slots_of(txn, upload):
        txn.delete(slot)
    upload = msgspec.structs.replace(upload, status=status, open_until=None, undated_at=None)
    txn.replace(upload)
    ended = {"status": status, "files": []}
    append_event(txn, upload.tenant_id, upload.event_name, ended, keep_us=keep_us)
    return upload


def _check(wanted: UploadRequest) -> None:
    check_name(wanted.name)
    check_segment(wanted.run, "run")
    if not 1 <= wanted.max_files <= FILES_MAX:
        raise InvalidRequest("max_files", f"1 to {FILES_MAX}")
    if wanted.max_size_bytes < 0:
        raise InvalidRequest("max_size_mb", "0 (no limit) or more")
    if len(wanted.prompt) > _PROMPT_CHARS_MAX:
        raise InvalidRequest("prompt", f"at most {_PROMPT_CHARS_MAX} characters")
    if wanted.expires_in_s is not None and not 1 <= wanted.expires_in_s <= _EXPIRES_IN_S_MAX:
        raise InvalidRequest("expires_in", f"1 to {_EXPIRES_IN_S_MAX} seconds")
    if len(wanted.allowed_types) > _TYPES_MAX:
        raise InvalidRequest("allowed_types", f"at most {_TYPES_MAX} entries")
    for kind in wanted.allowed_types:
        bare = kind.lower().removeprefix(".")
        if not (bare.isascii() and bare.isalnum() and len(bare) <= 16):
            raise InvalidRequest(
                "allowed_types", f"extensions such as pdf or jpg, not {kind[:64]!r}"
            )
    for name, url in (
        ("callback_url", wanted.callback_url),
        ("redirect_url", wanted.redirect_url),
    ):
        if url is not None:
            check_url(name, url)


def check_url(field: str, url: str) -> None:
    """Pass an address that people or programs are sent to; raises InvalidRequest, which names
    the field."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
        parts.port  # noqa: B018  raises when it is no number up to 65535
    except ValueError:
        host = None
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not host or len(url) > 2000:
        raise InvalidRequest(field, "a URL is http or https, with a host")
    # Browsers drop line breaks and take a backslash for a slash: they would go elsewhere than
    # it was read to go here.
    if not url.isprintable() or " " in url or "\\" in url:
        raise InvalidRequest(field, "a URL has no spaces, controls or backslashes")
    if parts.username is not None:
        # It would be shown to whoever sees the upload, and sent to wherever the URL leads.
        raise InvalidRequest(field, "a URL has no user and no password")
