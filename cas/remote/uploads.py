"""Requests for files at a server, and the links that answer them."""

from __future__ import annotations

from base64 import b64encode
from pathlib import PurePath
from typing import Final, final
from urllib.parse import quote, urlsplit

import httpx
import msgspec

from cas.errors import Conflict, DigestMismatch, NotFound, ServerRefused, UploadClosed
from cas.hashing import Source
from cas.listing import Page
from cas.once import OnceKey
from cas.records import COMPLETED, PENDING, PendingUpload, UploadFile
from cas.remote import values
from cas.remote.bodies import Outgoing, Progress
from cas.remote.idempotency import once_header
from cas.remote.wire import JSON, Wire
from cas.uploads import UploadRequest

RESUMABLE_BYTES: Final = 64 << 20  # from here on a lost connection must not cost everything
_STRETCH_BYTES: Final = 64 << 20  # of one PATCH
_TUS: Final = {"Tus-Resumable": "1.0.0"}


@final
class RemoteUploads:
    """The uploads of the token's tenant. Safe for threads."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def request(self, wanted: UploadRequest, key: OnceKey | None = None) -> PendingUpload:
        """Record a request; its link is `url(upload)`. With a `key` that was used before (in
        the last 24 hours) it is the upload of that time, as it is now.

        A lost answer is asked for again, and makes no second link.
        Raises InvalidRequest, AccessDenied, KeyReused where the key was used for another one.
        """
        return RemoteLink(self._wire, self.asked(wanted, key)["upload_token"]).upload

    def asked(self, wanted: UploadRequest, key: OnceKey | None = None) -> JSON:
        """`request`, and the answer as the API gives it: with the address of the page, and
        signed URLs for the slots."""
        asked = {
            "name": wanted.name,
            "allowed_types": wanted.allowed_types,
            "max_size_mb": wanted.max_size_bytes / (1 << 20),
            "max_files": wanted.max_files,
            "prompt": wanted.prompt,
            "retention_policy": None if wanted.retention is None else wanted.retention.text,
            "expires_in": wanted.expires_in_s,
            "callback_url": wanted.callback_url,
            "redirect_url": wanted.redirect_url,
            "run": wanted.run,
        }
        headers = once_header(key)
        return self._wire.form("POST", "/api/v1/uploads", form=asked, headers=headers)

    def list(
        self, *, status: str | None = None, cursor: str | None = None, limit: int = 100
    ) -> Page[PendingUpload]:
        """A page of uploads, newest first."""
        params = {"status": status, "cursor": cursor, "limit": limit}
        form = self._wire.form("GET", "/api/v1/uploads", params=params)
        found = [values.pending_upload(upload) for upload in form["uploads"]]
        return Page(found, form["next_cursor"])

    def get(self, token: str) -> RemoteLink:
        """The upload behind a token, if it is the tenant's; raises NotFound."""
        link = RemoteLink(self._wire, token)
        link.upload  # noqa: B018  raises where it is not the tenant's
        return link

    def cancel(self, token: str) -> PendingUpload:
        """Close a pending upload; raises NotFound, UploadClosed."""
        return values.pending_upload(self._wire.form("POST", f"{_path(token)}/cancel"))

    def url(self, upload: PendingUpload) -> str:
        """The address of its upload page; "" where its token was not told."""
        return "" if not upload.upload_token else self._wire.url(f"/u/{upload.upload_token}")


@final
class RemoteLink:
    """One upload, opened by its token. Safe for threads that fill different slots."""

    def __init__(self, wire: Wire, token: str) -> None:
        self._wire = wire
        self._token = token

    @property
    def upload(self) -> PendingUpload:
        """The upload as its tenant sees it now; needs the tenant's bearer token."""
        found = values.pending_upload(self._wire.form("GET", _path(self._token)))
        # Who may only view is not told the token, which is in his hands here.
        return msgspec.structs.replace(found, upload_token=self._token)

    def info(self) -> JSON:
        """Constraints, state, filled slots and fresh signed URLs, as the API tells them."""
        return self._wire.form("GET", f"{_path(self._token)}/info")

    def slots(self) -> list[UploadFile]:
        """The filled slots of a pending upload, in the order of their index."""
        info = self.info()
        if info["status"] == COMPLETED:  # `files` are then the stored ones
            return []
        return [values.upload_file(info["upload_id"], file) for file in info["files"]]

    def put(
        self,
        index: int,
        source: Source,
        *,
        filename: str | None = None,
        content_type: str | None = None,
        progress: Progress | None = None,
    ) -> UploadFile:
        """Fill slot `index`, or replace what is in it; durable there on return.

        From 64 MiB on, a source that can be sought goes resumably: it goes on where an
        earlier call, of another process too, left off. Raises as `UploadLink.put`.
        """
        body = Outgoing(source, progress)
        named = filename or PurePath(getattr(source, "name", "file")).name
        try:
            return self.send(index, body, filename=named, content_type=content_type)
        finally:
            body.close()

    def send(
        self, index: int, body: Outgoing, *, filename: str, content_type: str | None
    ) -> UploadFile:
        """`put` for a body that is open."""
        if body.repeatable and (body.size_bytes or 0) >= RESUMABLE_BYTES:
            slot = self._send_resumably(index, body, filename, content_type)
        else:
            slot = self._send_whole(index, body, filename, content_type)
        assert slot.checksum_sha256 is not None
        try:
            body.check(slot.checksum_sha256)
        except DigestMismatch:
            # The file changed since an earlier call sent its beginning, or the way did it: what
            # nobody sent must not be completed.
            self.empty(index)
            raise
        return slot

    def empty(self, index: int) -> None:
        """Take the file out of slot `index`; nothing happens to an empty one."""
        found = [slot for slot in self.info()["files"] if slot.get("index") == index]
        for slot in found:
            url = urlsplit(slot["delete_url"])
            self._wire.ask("DELETE", f"{_path(self._token)}/files/{index}?{url.query}")

    def complete(self) -> JSON:
        """End the upload: the resume payload, of the first completion if there was one.

        Raises FilesRefused, UploadClosed when it was cancelled or expired.
        """
        try:
            return self._wire.form("POST", f"{_path(self._token)}/complete")
        except Conflict:
            info = self.info()  # a lost answer, or another's completion
            if info["status"] != COMPLETED:
                raise
            return {"files": info["files"], "uploaded_at": info["uploaded_at"]}

    def _send_whole(
        self, index: int, body: Outgoing, filename: str, content_type: str | None
    ) -> UploadFile:
        info = self.info()
        if info["status"] != PENDING:
            raise UploadClosed(info["status"])
        if not 0 <= index < len(info["presigned_urls"]):
            raise NotFound("slot", str(index))
        # The address may have been made for other eyes (a proxy's); its query is what counts.
        query = urlsplit(info["presigned_urls"][index]).query
        form = self._wire.form(
            "PUT",
            f"{_path(self._token)}/files/{index}?{query}&filename={quote(filename, safe='')}",
            headers={**body.headers, **({"Content-Type": content_type} if content_type else {})},
            body=body.chunks,
            repeatable=body.repeatable,
        )
        return values.upload_file(info["upload_id"], form)

    def _send_resumably(
        self, index: int, body: Outgoing, filename: str, content_type: str | None
    ) -> UploadFile:
        assert body.size_bytes is not None
        path = self._begun(index, body.size_bytes, filename) or self._begin(
            index, body.size_bytes, filename, content_type
        )
        offset = self._wire.persist(lambda: self._offset(path))
        while offset < body.size_bytes:
            offset = self._wire.persist(lambda: self._stretch(path, body))
        for _ in body.chunks(body.size_bytes):  # hashes what an earlier process sent
            pass
        for slot in self.slots():
            if slot.file_index == index:
                return slot
        raise UploadClosed(self.info()["status"])  # by somebody else, in this moment

    def _begun(self, index: int, size_bytes: int, filename: str) -> str | None:
        """Where an interrupted upload of the same file goes on."""
        for partial in self.info().get("partials", []):
            same = (partial["index"], partial["size_bytes"], partial["filename"])
            if same == (index, size_bytes, filename):
                return f"{_path(self._token)}/tus/{partial['partial_id']}"
        return None

    def _begin(self, index: int, size_bytes: int, filename: str, content_type: str | None) -> str:
        metadata = {"index": str(index), "filename": filename}
        if content_type:
            metadata["filetype"] = content_type
        answer = self._wire.ask(
            "POST",
            f"{_path(self._token)}/tus/",
            headers={**_TUS, "Upload-Length": str(size_bytes), "Upload-Metadata": _pairs(metadata)},
        )
        return f"{_path(self._token)}/tus/{answer.headers['location'].rpartition('/')[2]}"

    def _offset(self, path: str) -> int:
        return int(self._wire.ask("HEAD", path, headers=_TUS).headers["upload-offset"])

    def _stretch(self, path: str, body: Outgoing) -> int:
        """Send one stretch from where the server stands; the new offset."""
        offset = self._offset(path)
        assert body.size_bytes is not None
        stop = min(offset + _STRETCH_BYTES, body.size_bytes)
        if offset == stop:
            return offset
        headers = {
            **_TUS,
            "Upload-Offset": str(offset),
            "Content-Type": "application/offset+octet-stream",
            "Content-Length": str(stop - offset),
        }
        try:
            chunks = body.chunks(offset, stop)
            answer = self._wire.once("PATCH", path, headers=headers, content=chunks)
        except ServerRefused as refused:
            if refused.code != "offset_mismatch":
                raise
            # An earlier connection's bytes arrived after the offset was asked for.
            raise httpx.ReadError("the server stands elsewhere") from None
        return int(answer.headers["upload-offset"])


def _path(token: str) -> str:
    return f"/api/v1/uploads/{quote(token, safe='')}"


def _pairs(metadata: dict[str, str]) -> str:
    return ",".join(
        f"{key} {b64encode(value.encode()).decode()}" for key, value in metadata.items()
    )
