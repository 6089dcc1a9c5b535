"""The way from a request to the store: every method takes a right and opens what it is for.

Resources are given a Door and never the Store, so that none of them can ask for anything
without saying by which right (invariant 9). `tests/test_arrows.py` holds the rest of the
gateway to it: only this module, and what serves no tenant, knows the Store.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import final

import falcon

from cas.deliveries import Deliveries
from cas.elsewhere import Fetched
from cas.errors import NotFound
from cas.files import Files
from cas.records import StoredFile
from cas.store import Store
from cas.uploads import UploadLink, Uploads
from gateway.auth import Caller
from gateway.limits import Limits
from gateway.links import Links
from gateway.logs import about


@final
class Door:
    """Safe for threads. `request_id` goes into the audit log with what is written."""

    def __init__(self, store: Store, links: Links, limits: Limits | None = None) -> None:
        """Without `limits`, whose middleware an app needs too, anybody may guess."""
        self._store = store
        self._links = links
        self._limits = limits

    # --- by a bearer token

    def files(self, caller: Caller, request_id: str) -> Files:
        """The files of the caller's tenant, and of no other."""
        about(tenant=caller.tenant_id, actor=caller.actor)
        return self._store.files(caller.tenant_id, caller.actor, request_id)

    def uploads(self, caller: Caller, request_id: str) -> Uploads:
        """The uploads of the caller's tenant, and of no other."""
        about(tenant=caller.tenant_id, actor=caller.actor)
        return self._store.uploads(caller.tenant_id, caller.actor, request_id)

    def deliveries(self, caller: Caller, request_id: str) -> Deliveries:
        """What is sent for the caller's tenant, and for no other."""
        about(tenant=caller.tenant_id, actor=caller.actor)
        return self._store.deliveries(caller.tenant_id, caller.actor, request_id)

    # --- by the token of an upload

    def upload_link(self, req: falcon.Request, token: str) -> UploadLink:
        """The one upload that the token opens; raises NotFound, TooManyRequests, TooLarge."""
        with self._looking_up(req):
            link = self._store.upload_link(token, req.context.request_id)
        self._opened(req, link)
        return link

    # --- by a signature

    def slot(self, req: falcon.Request, token: str, index: int) -> UploadLink:
        """The upload whose slot `req` is signed for.

        Raises NotFound, BadSignature, LinkExpired.
        """
        with self._looking_up(req):
            try:
                link = self._store.upload_link(token, req.context.request_id)
            except NotFound:
                self._links.check_no_slot(req, token, index)
                raise
            self._links.check_slot(req, link.upload, index)
        self._opened(req, link)
        return link

    def file(self, req: falcon.Request, file_id: str, filename: str) -> StoredFile:
        """The file that `req` is signed for; raises BadSignature, LinkExpired, NotFound."""
        with nullcontext() if self._limits is None else self._limits.verifying(req):
            self._links.check_download(req, file_id, filename)
        file = self._store.file_by_id(file_id)
        about(tenant=file.tenant_id, actor="signed URL")
        return file

    # --- by a file that one of the others opened

    def bytes_of(self, file: StoredFile) -> int | Fetched:
        """A read-only descriptor, or a stream of what comes from a target; the caller's to
        close. Raises BlobMissing, BlobDamaged, BlobElsewhere."""
        return self._store.opener.open(file.checksum_sha256, file.size_bytes)

    def named(self, file: StoredFile) -> bool:
        """Whether a proxy that opens the object by its name, within a minute, finds it."""
        return self._store.opener.named(file.checksum_sha256)

    # --- limits

    def _looking_up(self, req: falcon.Request) -> AbstractContextManager[None]:
        return nullcontext() if self._limits is None else self._limits.looking_up(req)

    def _opened(self, req: falcon.Request, link: UploadLink) -> None:
        about(tenant=link.upload.tenant_id, actor="link")
        if self._limits is not None:
            self._limits.link(req, link.upload)
