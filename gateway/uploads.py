"""Uploads: asking for files, looking at the request, completing and cancelling it.

Asking, listing and cancelling need a bearer token of the tenant. Looking and completing
need the upload's own token, and nothing else (invariant 9).
"""

from __future__ import annotations

from typing import Final, final

import falcon
import msgspec

from cas.clock import rfc3339
from cas.completions import ResumePayload
from cas.config import MIB
from cas.errors import (
    BlobUnavailable,
    FilesRefused,
    InvalidName,
    InvalidRequest,
    InvalidRetention,
    KeyReused,
    NotFound,
    QuotaExceeded,
    UploadClosed,
)
from cas.records import CANCELLED, COMPLETED, EXPIRED, PENDING, Delivery, PendingUpload
from cas.references import DIRECT_RUN
from cas.retention import parse_retention
from cas.upload_links import UploadLink
from cas.uploads import UploadRequest, Uploads
from gateway import forms, idempotency
from gateway.auth import MANAGE_UPLOADS, VIEW_UPLOADS, Caller, Tokens
from gateway.body import BodyTooSlow, BodyTruncated, read_small, refuse_encodings
from gateway.door import Door
from gateway.errors import PermissionMissing, UploadCompleted
from gateway.links import Links
from gateway.operations import Parameter, Reply, Right, operation

REQUEST_BYTES_MAX: Final = 64 * 1024


class RequestForm(msgspec.Struct, forbid_unknown_fields=True):
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
    asked = forms.read(body, RequestForm)
    if not 0 <= asked.max_size_mb <= 2**40:
        raise InvalidRequest("max_size_mb", "a number from 0, which is no limit")
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

    def __init__(self, door: Door, tokens: Tokens, links: Links) -> None:
        self._door = door
        self._tokens = tokens
        self._links = links

    @operation(
        Right.BEARER,
        name="requestUpload",
        body=RequestForm,
        parameters=[idempotency.PARAMETER],
        replies={201: Reply("The link, and a signed URL for each slot.", forms.RequestedForm)},
        refuses=[
            InvalidRequest,
            KeyReused,
            InvalidName,
            InvalidRetention,
            PermissionMissing,
            BodyTruncated,
            BodyTooSlow,
        ],
    )
    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Ask a person for files.

        The upload's page and its signed URLs need no login: whoever has them may send.
        """
        caller = self._tokens.caller(req)
        caller.need(MANAGE_UPLOADS)
        refuse_encodings(req.env)
        body = read_small(req.env, REQUEST_BYTES_MAX)
        wanted = read_request(body)
        key = idempotency.once_key(req, "uploads", body)
        upload = self._uploads(caller, req).request(wanted, key)
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

    @operation(
        Right.BEARER,
        name="listUploads",
        parameters=[
            Parameter("status", "Only uploads in this state.", forms.Status),
            forms.CURSOR,
            forms.LIMIT,
        ],
        replies={200: Reply("A page of them.", forms.UploadsForm)},
        refuses=[InvalidRequest, PermissionMissing],
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """List one's own uploads, newest first.

        What opens them (`upload_token`, `upload_url`) is null without `manage_uploads`.
        """
        caller = self._tokens.caller(req)
        caller.need(VIEW_UPLOADS)
        status = req.get_param("status")
        if status not in (None, PENDING, COMPLETED, CANCELLED, EXPIRED):
            raise InvalidRequest("status", "pending, completed, cancelled or expired")
        page = self._uploads(caller, req).list(
            status=status,
            cursor=forms.cursor(req),
            limit=forms.page_limit(req),
        )
        uploads = self._forms(req, caller, page.items)
        forms.answer(resp, {"uploads": uploads, "next_cursor": page.next_cursor})

    @operation(
        Right.BEARER,
        name="getUpload",
        replies={200: Reply("The upload.", forms.LinkedUploadForm)},
        refuses=[NotFound],
    )
    def on_get_one(self, req: falcon.Request, resp: falcon.Response, token: str) -> None:
        """Show one of one's own uploads, as the listing does."""
        caller = self._tokens.caller(req)
        caller.need(VIEW_UPLOADS, to_see=VIEW_UPLOADS)
        upload = self._uploads(caller, req).get(token).upload
        forms.answer(resp, self._forms(req, caller, [upload])[0])

    @operation(
        Right.BEARER,
        name="cancelUpload",
        replies={200: Reply("The upload, cancelled.", forms.LinkedUploadForm)},
        refuses=[NotFound, PermissionMissing, UploadClosed],
    )
    def on_post_cancel(self, req: falcon.Request, resp: falcon.Response, token: str) -> None:
        """Close a pending upload; what was sent is let go of."""
        caller = self._tokens.caller(req)
        caller.need(MANAGE_UPLOADS, to_see=VIEW_UPLOADS)
        cancelled = self._uploads(caller, req).cancel(token)
        forms.answer(resp, self._forms(req, caller, [cancelled])[0])

    def _forms(
        self, req: falcon.Request, caller: Caller, uploads: list[PendingUpload]
    ) -> list[forms.LinkedUploadForm]:
        called = [
            upload.upload_id
            for upload in uploads
            if upload.callback_url is not None and upload.status == COMPLETED
        ]
        sent: dict[str, Delivery] = {}
        if called:
            sent = self._door.deliveries(caller, req.context.request_id).newest(called)
        # The token is the right to upload and to complete: not for those who may only view.
        opening = caller.may(MANAGE_UPLOADS)
        return [
            {
                **forms.pending_upload(upload, opening=opening),
                "upload_url": self._links.upload_page(req, upload.upload_token)
                if opening
                else None,
                "callback": forms.callback(sent[upload.upload_id])
                if upload.upload_id in sent
                else None,
            }
            for upload in uploads
        ]

    def _uploads(self, caller: Caller, req: falcon.Request) -> Uploads:
        return self._door.uploads(caller, req.context.request_id)


@final
class UploadLinkResource:
    """`/api/v1/uploads/{token}/…` for whoever has the link."""

    def __init__(self, door: Door, links: Links) -> None:
        self._door = door
        self._links = links

    @operation(
        Right.LINK,
        name="getUploadInfo",
        replies={200: Reply("How it stands.", forms.InfoForm)},
        refuses=[NotFound],
    )
    def on_get_info(self, req: falcon.Request, resp: falcon.Response, token: str) -> None:
        """Tell the constraints, how it stands, and URLs that are fresh at each call."""
        link = self._door.upload_link(req, token)
        upload = link.upload
        form: forms.InfoForm = {
            "upload_id": upload.upload_id,
            **forms.upload_shown(upload),
            "presigned_urls": [],
            "files": [],
            "partials": [],
            "tus_url": None,
            "uploaded_at": None,
        }
        if upload.status == PENDING:
            form["presigned_urls"] = self._links.slots(req, upload)
            form["files"] = [
                forms.shown_slot(file, self._links.slot(req, upload, file.file_index, "DELETE"))
                for file in link.slots()
            ]
            base = self._links.base(req)
            form["tus_url"] = base + forms.tus_path(token)
            form["partials"] = [forms.partial(each, base, token) for each in link.partials()]
        elif upload.status == COMPLETED:
            done = forms.completion(link.completion())
            form["files"] = forms.shown_files(done)
            form["uploaded_at"] = done["uploaded_at"]
        forms.answer(resp, form)

    @operation(
        Right.LINK,
        name="completeUpload",
        replies={200: Reply("What the waiting workflow resumes with.", ResumePayload)},
        refuses=[NotFound, UploadClosed, FilesRefused, QuotaExceeded, BlobUnavailable],
    )
    def on_post_complete(self, req: falcon.Request, resp: falcon.Response, token: str) -> None:
        """End the upload: its files are judged by their content and stored.

        The first to complete wins, with all slots that are filled then; every later one is
        refused with 409 and told the same files.
        """
        link = self._door.upload_link(req, token)
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
