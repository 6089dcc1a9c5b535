"""Uploads: asking for files, looking at the request, completing and cancelling it.

Asking, listing and cancelling need a bearer token of the tenant. Looking and completing
need the upload's own token, and nothing else (invariant 9).
"""

from __future__ import annotations

from typing import Final, final

import falcon
import msgspec

from cas.clock import rfc3339
from cas.config import MIB
from cas.errors import InvalidRequest, UploadClosed
from cas.records import CANCELLED, COMPLETED, EXPIRED, PENDING, PendingUpload
from cas.references import DIRECT_RUN
from cas.retention import parse_retention
from cas.store import Store
from cas.uploads import UploadLink, UploadRequest, Uploads
from gateway import forms
from gateway.auth import MANAGE_UPLOADS, VIEW_UPLOADS, Caller, Tokens
from gateway.body import read_small, refuse_encodings
from gateway.errors import UploadCompleted
from gateway.links import Links

REQUEST_BYTES_MAX: Final = 64 * 1024


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a request, with the names of requirement 1's `request_upload`."""

    name: str
    allowed_types: list[str] = []
    max_size_mb: float = 0  # 0: no limit but the server's own
    max_files: int = 1
    prompt: str = ""
    retention_policy: str | None = None
    expires_in: int | None = None  # seconds
    callback_url: str | None = None
    redirect_url: str | None = None
    run: str = DIRECT_RUN


def read_request(body: bytes) -> UploadRequest:
    """What a JSON body asks for; raises InvalidInput with the field and the reason."""
    try:
        asked = msgspec.json.decode(body, type=_Request)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest("body", str(error)) from None
    if not 0 <= asked.max_size_mb <= 2**40:
        raise InvalidRequest(asked.max_size_mb, "max_size_mb: a number from 0, which is no limit")
    retention = asked.retention_policy
    return UploadRequest(
        name=asked.name,
        allowed_types=asked.allowed_types,
        max_size_bytes=int(asked.max_size_mb * MIB),
        max_files=asked.max_files,
        prompt=asked.prompt,
        retention=None if retention is None else parse_retention(retention),
        expires_in_s=asked.expires_in,
        callback_url=asked.callback_url,
        redirect_url=asked.redirect_url,
        run=asked.run,
    )


@final
class UploadsResource:
    """`/api/v1/uploads`"""

    def __init__(self, store: Store, tokens: Tokens, links: Links) -> None:
        self._store = store
        self._tokens = tokens
        self._links = links

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        caller = self._tokens.caller(req)
        caller.need(MANAGE_UPLOADS)
        refuse_encodings(req.env)
        wanted = read_request(read_small(req.env, REQUEST_BYTES_MAX))
        upload = self._uploads(caller, req).request(wanted)
        form = {
            "upload_id": upload.upload_id,
            "upload_token": upload.upload_token,
            "upload_url": self._links.upload_page(req, upload.upload_token),
            "presigned_urls": self._links.slots(req, upload),
            "event_name": upload.event_name,
            "expires_at": rfc3339(upload.expires_at),
        }
        forms.answer(resp, form, 201)
        resp.location = f"/api/v1/uploads/{upload.upload_token}/info"

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        caller = self._tokens.caller(req)
        caller.need(VIEW_UPLOADS)
        status = req.get_param("status")
        if status not in (None, PENDING, COMPLETED, CANCELLED, EXPIRED):
            raise InvalidRequest(status, "status: pending, completed, cancelled or expired")
        page = self._uploads(caller, req).list(
            status=status,
            cursor=forms.cursor(req),
            limit=forms.page_limit(req),
        )
        uploads = [self._form(req, upload) for upload in page.items]
        forms.answer(resp, {"uploads": uploads, "next_cursor": page.next_cursor})

    def on_post_cancel(self, req: falcon.Request, resp: falcon.Response, token: str) -> None:
        caller = self._tokens.caller(req)
        caller.need(MANAGE_UPLOADS, to_see=VIEW_UPLOADS)
        cancelled = self._uploads(caller, req).cancel(token)
        forms.answer(resp, self._form(req, cancelled))

    def _form(self, req: falcon.Request, upload: PendingUpload) -> forms.JSON:
        url = self._links.upload_page(req, upload.upload_token)
        return {**forms.pending_upload(upload), "upload_url": url}

    def _uploads(self, caller: Caller, req: falcon.Request) -> Uploads:
        return self._store.uploads(caller.tenant_id, caller.actor, req.context.request_id)


@final
class UploadLinkResource:
    """`/api/v1/uploads/{token}/…` for whoever has the link."""

    def __init__(self, store: Store, links: Links) -> None:
        self._store = store
        self._links = links

    def on_get_info(self, req: falcon.Request, resp: falcon.Response, token: str) -> None:
        """The constraints, how it stands, and URLs that are fresh at each call."""
        link = self._store.upload_link(token, req.context.request_id)
        upload = link.upload
        form: forms.JSON = {
            "upload_id": upload.upload_id,
            **forms.upload_shown(upload),
            "presigned_urls": [],
            "files": [],
        }
        if upload.status == PENDING:
            form["presigned_urls"] = self._links.slots(req, upload)
            form["files"] = [
                {
                    **forms.slot(file),
                    "delete_url": self._links.slot(req, upload, file.file_index, "DELETE"),
                }
                for file in link.slots()
            ]
        elif upload.status == COMPLETED:
            form.update(forms.completion(link.completion()))
        forms.answer(resp, form)

    def on_post_complete(self, req: falcon.Request, resp: falcon.Response, token: str) -> None:
        link = self._store.upload_link(token, req.context.request_id)
        try:
            done = link.complete()
        except UploadClosed as closed:
            raise completed_instead(link, closed) from None
        forms.answer(resp, forms.completion(done))


def completed_instead(link: UploadLink, closed: UploadClosed) -> UploadClosed:
    """The same refusal, with the files where the upload was completed before."""
    if closed.state != COMPLETED:
        return closed
    return UploadCompleted(forms.completion(link.completion()))
