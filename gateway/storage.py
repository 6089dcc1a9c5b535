"""Stored files: `/api/v1/storage` and `/api/v1/storage/{ref}[/meta|/url|/hold]`."""

from __future__ import annotations

import re
from typing import Final, final

import falcon

from cas.config import MIB, Settings
from cas.errors import InvalidReference
from cas.files import Files
from cas.references import DIRECT_RUN, Reference, check_name, check_segment, parse_reference
from cas.retention import parse_retention
from cas.store import Store
from gateway import forms
from gateway.auth import MANAGE_STORAGE, VIEW_STORAGE, Caller, Tokens
from gateway.body import body_of, refuse_encodings
from gateway.digests import digest_field, promised_digest
from gateway.downloads import Sender
from gateway.links import DOWNLOAD_LIFETIME_S_MAX, Links

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

    def __init__(self, store: Store, tokens: Tokens, settings: Settings) -> None:
        self._store = store
        self._tokens = tokens
        self._limit_bytes = settings.uploads.max_file_size_mb * MIB  # 0: no limit

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Store a raw body; durable on return (invariant 4)."""
        caller = self._tokens.caller(req)
        caller.need(MANAGE_STORAGE)
        refuse_encodings(req.env)
        filename = req.get_param("filename")
        if filename is not None:
            check_name(filename)
        policy = req.get_param("retention_policy")
        body = body_of(req.env)
        file = self._store.files(caller.tenant_id, caller.actor, req.context.request_id).put(
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

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        caller = self._tokens.caller(req)
        caller.need(VIEW_STORAGE)
        run, name = req.get_param("run"), req.get_param("name")
        page = self._store.files(caller.tenant_id, caller.actor, req.context.request_id).list(
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
        self, store: Store, tokens: Tokens, links: Links, sender: Sender, settings: Settings
    ) -> None:
        self._store = store
        self._tokens = tokens
        self._links = links
        self._sender = sender
        self._scheme = settings.references.scheme
        self._store_name = settings.store.name

    def on_get(self, req: falcon.Request, resp: falcon.Response, rest: str) -> None:
        files, reference, verb = self._open(req, rest, VIEW_STORAGE, ("", "meta", "url"))
        file = files.stat(reference)
        if verb == "":
            self._sender.send(req, resp, file)
        elif verb == "meta":
            forms.answer(resp, forms.internal(file, self._store_name))
        else:
            lifetime_s = forms.whole_number(
                req, "expires_in", self._links.lifetime_s, 1, DOWNLOAD_LIFETIME_S_MAX
            )
            url = self._links.download(req, file, lifetime_s)
            forms.answer(resp, {"url": url, "expires_in": lifetime_s})

    on_head = on_get

    def on_delete(self, req: falcon.Request, resp: falcon.Response, rest: str) -> None:
        """Delete the file, or with /hold lift its legal hold."""
        files, reference, verb = self._open(req, rest, MANAGE_STORAGE, ("", "hold"))
        if verb == "hold":
            forms.answer(resp, forms.stored_file(files.hold(reference, False)))
        else:
            files.delete(reference)
            resp.status = 204

    def on_put(self, req: falcon.Request, resp: falcon.Response, rest: str) -> None:
        """Set a legal hold."""
        files, reference, _ = self._open(req, rest, MANAGE_STORAGE, ("hold",))
        forms.answer(resp, forms.stored_file(files.hold(reference, True)))

    def _open(
        self, req: falcon.Request, rest: str, permission: str, verbs: tuple[str, ...]
    ) -> tuple[Files, Reference, str]:
        """The caller's own files, and what of them is meant: nothing else can be reached."""
        caller: Caller = self._tokens.caller(req)
        caller.need(permission, to_see=VIEW_STORAGE)
        reference, verb = parse_path(rest, self._scheme)
        if verb not in verbs:
            raise falcon.HTTPRouteNotFound()
        files = self._store.files(caller.tenant_id, caller.actor, req.context.request_id)
        return files, reference, verb
