"""Stored files: `/api/v1/storage` and `/api/v1/storage/{ref}[/stat|/meta|/url|/hold]`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Final, final

import falcon
import msgspec

from cas.config import MIB, Settings
from cas.errors import (
    DigestMismatch,
    Held,
    InvalidDigest,
    InvalidName,
    InvalidReference,
    InvalidRequest,
    InvalidRetention,
    NotFound,
    QuotaExceeded,
    SizeMismatch,
)
from cas.files import Files
from cas.links import DOWNLOAD_LIFETIME_S_MAX
from cas.references import DIRECT_RUN, Reference, check_name, check_segment, parse_reference
from cas.retention import parse_retention
from gateway import forms
from gateway.auth import MANAGE_STORAGE, VIEW_STORAGE, Caller, Tokens
from gateway.body import BodyTooSlow, BodyTruncated, body_of, refuse_encodings
from gateway.digests import digest_field, promised_digest
from gateway.door import Door
from gateway.downloads import CONDITIONS, SENDING_REFUSES, SENT, Sender
from gateway.errors import PermissionMissing
from gateway.links import Links
from gateway.operations import ANY_BYTES, Parameter, Reply, Right, operation

Answer = Callable[[falcon.Request, falcon.Response, Files, Reference], None]
_LIFETIME_S = Annotated[int, msgspec.Meta(ge=1, le=DOWNLOAD_LIFETIME_S_MAX)]

# Everything up to SHA256.EXT is the reference, what follows is the verb. Percent-encoding
# is gone by now; of the slashes after the scheme, proxies that merge them leave one.
_PATH: Final = re.compile(
    r"(?:(?P<scheme>[a-z][a-z0-9+.-]*):/{1,2})?"
    r"(?P<ref>[^/]+/[^/]+/[^/]+/[0-9a-f]{64}\.[a-z0-9]{1,16})(?:/(?P<verb>[a-z]+))?",
    re.ASCII,
)


def parse_path(rest: str, scheme: str) -> tuple[Reference, str]:
    """The reference and the verb (or "") after `/api/v1/storage/`; raises InvalidReference."""
    match = _PATH.fullmatch(rest)
    if match is None or match["scheme"] not in (None, scheme):
        raise InvalidReference(rest, f"not {scheme}://FAMILY/TENANT/RUN/SHA256.EXT")
    return parse_reference(match["ref"], scheme), match["verb"] or ""


@final
class StorageResource:
    """`/api/v1/storage`"""

    def __init__(self, door: Door, tokens: Tokens, settings: Settings) -> None:
        self._door = door
        self._tokens = tokens
        self._limit_bytes = settings.uploads.max_file_size_mb * MIB  # 0: no limit

    @operation(
        Right.BEARER,
        name="storeFile",
        body=ANY_BYTES,
        parameters=[
            Parameter("name", "What it is called; by default as `filename`."),
            Parameter("filename", "What it is saved as, and its extension."),
            Parameter("run", "The workflow run it is of."),
            Parameter("retention_policy", "`days:N`, `hours:N`, `until:RFC3339` or `forever`."),
            forms.CONTENT_DIGEST,
        ],
        replies={201: Reply("The file, stored durably.", forms.FileForm, forms.REPR_DIGEST)},
        refuses=[
            PermissionMissing,
            InvalidName,
            InvalidRetention,
            InvalidDigest,
            InvalidRequest,
            BodyTruncated,
            BodyTooSlow,
            DigestMismatch,
            SizeMismatch,
            QuotaExceeded,
        ],
    )
    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Store the bytes of the body.

        The same bytes in the same run are the same file. Durable when it is answered.
        """
        caller = self._tokens.caller(req)
        caller.need(MANAGE_STORAGE)
        refuse_encodings(req.env)
        filename = req.get_param("filename")
        if filename is not None:
            check_name(filename)
        policy = req.get_param("retention_policy")
        body = body_of(req.env)
        file = self._door.files(caller, req.context.request_id).put(
            body,
            name=check_name(req.get_param("name") or filename or "unnamed"),
            run=req.get_param("run") or DIRECT_RUN,
            filename=filename,
            content_type=forms.media_type(req),
            retention=None if policy is None else parse_retention(policy),
            promised_size=body.length_bytes,
            promised_digest=promised_digest(req),
            limit_bytes=self._limit_bytes,
        )
        forms.answer(resp, forms.stored_file(file), 201)
        resp.location = f"/api/v1/storage/{file.storage_ref.partition('://')[2]}"
        resp.set_header("Repr-Digest", digest_field(file.checksum_sha256))

    @operation(
        Right.BEARER,
        name="listFiles",
        parameters=[
            Parameter("run", "Only files of this workflow run."),
            Parameter("name", "Only files of this name."),
            forms.CURSOR,
            forms.LIMIT,
        ],
        replies={200: Reply("A page of them.", forms.FilesForm)},
        refuses=[InvalidRequest, InvalidName, PermissionMissing],
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """List one's own files, newest first."""
        caller = self._tokens.caller(req)
        caller.need(VIEW_STORAGE)
        run, name = req.get_param("run"), req.get_param("name")
        page = self._door.files(caller, req.context.request_id).list(
            run=None if run is None else check_segment(run, "run"),
            name=None if name is None else check_name(name),
            cursor=forms.cursor(req),
            limit=forms.page_limit(req),
        )
        files = [forms.stored_file(file) for file in page.items]
        forms.answer(resp, {"files": files, "next_cursor": page.next_cursor})


@final
class StoredFileResource:
    """`/api/v1/storage/{ref}` and its verbs; `rest` is all that follows the prefix."""

    def __init__(
        self, door: Door, tokens: Tokens, links: Links, sender: Sender, settings: Settings
    ) -> None:
        self._door = door
        self._tokens = tokens
        self._links = links
        self._sender = sender
        self._scheme = settings.references.scheme
        self._store_name = settings.store.name

    def on_get(self, req: falcon.Request, resp: falcon.Response, rest: str) -> None:
        self._answer(req, resp, rest, VIEW_STORAGE)

    def on_delete(self, req: falcon.Request, resp: falcon.Response, rest: str) -> None:
        self._answer(req, resp, rest, MANAGE_STORAGE)

    def on_put(self, req: falcon.Request, resp: falcon.Response, rest: str) -> None:
        self._answer(req, resp, rest, MANAGE_STORAGE)

    def documented(self) -> Mapping[tuple[str, str], Answer]:
        """The responders by method and path, for the router cannot tell the verbs apart."""
        return {
            (method, f"/{{ref}}/{verb}".rstrip("/")): responder
            for (method, verb), responder in self._verbs().items()
        }

    def _verbs(self) -> Mapping[tuple[str, str], Answer]:
        return {
            ("get", ""): self.read,
            ("get", "stat"): self.stat,
            ("get", "meta"): self.meta,
            ("get", "url"): self.url,
            ("delete", ""): self.delete,
            ("put", "hold"): self.hold,
            ("delete", "hold"): self.lift_hold,
        }

    def _answer(
        self, req: falcon.Request, resp: falcon.Response, rest: str, permission: str
    ) -> None:
        """Find what is meant among the caller's own files: nothing else can be reached."""
        caller: Caller = self._tokens.caller(req)
        caller.need(permission, to_see=VIEW_STORAGE)
        reference, verb = parse_path(rest, self._scheme)
        method = "get" if req.method == "HEAD" else req.method.lower()
        responder = self._verbs().get((method, verb))
        if responder is None:
            raise falcon.HTTPRouteNotFound()
        responder(req, resp, self._door.files(caller, req.context.request_id), reference)

    @operation(
        Right.BEARER,
        name="readFile",
        parameters=CONDITIONS,
        replies=SENT,
        refuses=[NotFound, InvalidReference, PermissionMissing, *SENDING_REFUSES],
    )
    def read(
        self, req: falcon.Request, resp: falcon.Response, files: Files, reference: Reference
    ) -> None:
        """Read the bytes, all or a range of them."""
        self._sender.send(req, resp, files.stat(reference))

    @operation(
        Right.BEARER,
        name="getFile",
        replies={200: Reply("The record.", forms.FileForm)},
        refuses=[NotFound, InvalidReference, PermissionMissing],
    )
    def stat(
        self, _req: falcon.Request, resp: falcon.Response, files: Files, reference: Reference
    ) -> None:
        """Show the record of a file, as the listing does."""
        forms.answer(resp, forms.stored_file(files.stat(reference)))

    @operation(
        Right.BEARER,
        name="getFileMeta",
        replies={200: Reply("The record and the place of the bytes.", forms.InternalForm)},
        refuses=[NotFound, InvalidReference, PermissionMissing],
    )
    def meta(
        self, _req: falcon.Request, resp: falcon.Response, files: Files, reference: Reference
    ) -> None:
        """Show where the bytes of a file are."""
        forms.answer(resp, forms.internal(files.stat(reference), self._store_name))

    @operation(
        Right.BEARER,
        name="getFileUrl",
        parameters=[Parameter("expires_in", "Seconds it shall work.", _LIFETIME_S)],
        replies={200: Reply("The URL.", forms.UrlForm)},
        refuses=[NotFound, InvalidReference, InvalidRequest, PermissionMissing],
    )
    def url(
        self, req: falcon.Request, resp: falcon.Response, files: Files, reference: Reference
    ) -> None:
        """Make a signed URL that downloads a file without a login."""
        file = files.stat(reference)
        lifetime_s = forms.whole_number(
            req, "expires_in", self._links.lifetime_s, 1, DOWNLOAD_LIFETIME_S_MAX
        )
        url = self._links.download(req, file, lifetime_s)
        forms.answer(resp, {"url": url, "expires_in": lifetime_s})

    @operation(
        Right.BEARER,
        name="deleteFile",
        replies={204: Reply("It is gone.")},
        refuses=[NotFound, InvalidReference, PermissionMissing, Held],
    )
    def delete(
        self, _req: falcon.Request, resp: falcon.Response, files: Files, reference: Reference
    ) -> None:
        """Delete a file; its bytes go when nothing names them and the grace is over."""
        files.delete(reference)
        resp.status = 204

    @operation(
        Right.BEARER,
        name="holdFile",
        replies={200: Reply("The record, held.", forms.FileForm)},
        refuses=[NotFound, InvalidReference, PermissionMissing],
    )
    def hold(
        self, _req: falcon.Request, resp: falcon.Response, files: Files, reference: Reference
    ) -> None:
        """Set a legal hold: while it is set, nothing deletes the file."""
        forms.answer(resp, forms.stored_file(files.hold(reference, True)))

    @operation(
        Right.BEARER,
        name="liftHold",
        replies={200: Reply("The record, not held.", forms.FileForm)},
        refuses=[NotFound, InvalidReference, PermissionMissing],
    )
    def lift_hold(
        self, _req: falcon.Request, resp: falcon.Response, files: Files, reference: Reference
    ) -> None:
        """Lift a legal hold."""
        forms.answer(resp, forms.stored_file(files.hold(reference, False)))
