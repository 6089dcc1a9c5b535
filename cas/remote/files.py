"""A tenant's files at a server: the verbs of `cas.files.Files`."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any, Final, final
from urllib.parse import quote

import httpx

from cas.digest import Digest
from cas.errors import AccessDenied, BlobcaskError, BlobDamaged
from cas.files import PutItem
from cas.hashing import Source
from cas.listing import Page
from cas.records import StoredFile
from cas.references import DIRECT_RUN, Reference
from cas.remote import values
from cas.remote.bodies import Outgoing, Progress
from cas.remote.uploads import RESUMABLE_BYTES, RemoteLink, RemoteUploads
from cas.remote.wire import Wire
from cas.retention import Retention
from cas.uploads import UploadRequest

_AT_ONCE: Final = 8  # of put_many: enough to share the server's syncs


@final
class RemoteFiles:
    """The files of the token's tenant. Safe for threads."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def put(
        self,
        source: Source,
        *,
        name: str,
        run: str = DIRECT_RUN,
        filename: str | None = None,
        content_type: str | None = None,
        retention: Retention | None = None,
        progress: Progress | None = None,
    ) -> StoredFile:
        """Send a source to its end; bytes and record are durable there on return.

        The same bytes again are the same file, so a lost answer is asked for again. From
        64 MiB on, a source that can be sought and has a filename goes as a resumable upload of
        one slot, and a cut connection costs no more than the last stretch. The file is then
        made by that upload: `created_by` names it, and the content type is what the bytes say,
        where they say anything. A token without `manage_uploads` sends it whole.

        Raises what `Files.put` raises, AccessDenied, ServerUnreachable.
        """
        body = Outgoing(source, progress)
        try:
            if (
                filename is not None
                and body.repeatable
                and (body.size_bytes or 0) >= RESUMABLE_BYTES
            ):
                wanted = UploadRequest(name=name, retention=retention, run=run)
                try:
                    upload = RemoteUploads(self._wire).request(wanted)
                except AccessDenied:
                    pass
                else:
                    return self._put_resumably(upload.upload_token, body, filename, content_type)
            return self._put_whole(body, name, run, filename, content_type, retention)
        finally:
            body.close()

    def _put_whole(
        self,
        body: Outgoing,
        name: str,
        run: str,
        filename: str | None,
        content_type: str | None,
        retention: Retention | None,
    ) -> StoredFile:
        form = self._wire.form(
            "POST",
            "/api/v1/storage",
            params={
                "name": name,
                "run": run,
                "filename": filename,
                "retention_policy": None if retention is None else retention.text,
            },
            headers={**body.headers, **({"Content-Type": content_type} if content_type else {})},
            body=body.chunks,
            repeatable=body.repeatable,
        )
        file = values.stored_file(form)
        body.check(file.checksum_sha256)
        return file

    def _put_resumably(
        self, token: str, body: Outgoing, filename: str, content_type: str | None
    ) -> StoredFile:
        link = RemoteLink(self._wire, token)
        try:
            link.send(0, body, filename=filename, content_type=content_type)
            [form] = link.complete()["files"]
        except BaseException:
            # Nobody else knows its token: it would only hold space until it expires.
            with suppress(BlobcaskError):
                RemoteUploads(self._wire).cancel(token)
            raise
        return self._stat(form["storage_ref"])

    def put_many(
        self,
        items: Iterable[PutItem],
        *,
        run: str = DIRECT_RUN,
        retention: Retention | None = None,
    ) -> list[StoredFile]:
        """Send many files, some at a time; records come in the order of the items.

        An error raises when those under way have ended; earlier files are stored then.
        """

        def put(item: PutItem) -> StoredFile:
            return self.put(
                item.source,
                name=item.name,
                run=run,
                filename=item.filename,
                content_type=item.content_type,
                retention=retention,
            )

        iterator = iter(items)
        files: list[StoredFile] = []
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            while chunk := list(itertools.islice(iterator, _AT_ONCE * 4)):
                files += threads.map(put, chunk)
        return files

    def stat(self, reference: Reference) -> StoredFile:
        """The record; raises NotFound."""
        return self._stat(str(reference))

    def reader(self, reference: Reference) -> tuple[StoredFile, io.RawIOBase]:
        """The record and a stream of the bytes, the caller's to close.

        The stream goes on where it was cut when a connection is lost, and raises BlobDamaged
        at its end when the bytes have another SHA-256.
        """
        file = self.stat(reference)
        return file, _Reader(self._wire, _path(str(reference)), file)

    def list(
        self,
        *,
        run: str | None = None,
        name: str | None = None,
        cursor: str | None = None,
        limit: int = 100,
    ) -> Page[StoredFile]:
        """A page of files, newest first."""
        params = {"run": run, "name": name, "cursor": cursor, "limit": limit}
        form = self._wire.form("GET", "/api/v1/storage", params=params)
        return Page([values.stored_file(file) for file in form["files"]], form["next_cursor"])

    def delete(self, reference: Reference) -> None:
        """Forget the file; raises NotFound, Held."""
        self._wire.ask("DELETE", _path(str(reference)))

    def hold(self, reference: Reference, on: bool) -> StoredFile:
        """Set or lift the legal hold."""
        form = self._wire.form("PUT" if on else "DELETE", f"{_path(str(reference))}/hold")
        return values.stored_file(form)

    def url(self, reference: Reference, expires_in_s: int | None = None) -> str:
        """A signed URL that downloads the file without a login."""
        path = f"{_path(str(reference))}/url"
        form = self._wire.form("GET", path, params={"expires_in": expires_in_s})
        return str(form["url"])

    def _stat(self, reference: str) -> StoredFile:
        return values.stored_file(self._wire.form("GET", f"{_path(reference)}/stat"))


def _path(reference: str) -> str:
    return f"/api/v1/storage/{quote(reference.partition('://')[2], safe='/')}"


@final
class _Reader(io.RawIOBase):
    """The bytes of a file over as many connections as it takes."""

    def __init__(self, wire: Wire, path: str, file: StoredFile) -> None:
        self._wire = wire
        self._path = path
        self._file = file
        self._sha256 = hashlib.sha256()
        self._done_bytes = 0
        self._rest = b""
        self._held = ExitStack()
        self._chunks: Iterator[bytes] | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)
        if not self._rest:
            self._rest = self._wire.persist(self._more)
        count = min(len(view), len(self._rest))
        view[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        self._held.close()
        super().close()

    def _more(self) -> bytes:
        """The next chunk, b"" at the end; after an error the next call connects anew."""
        if self._done_bytes == self._file.size_bytes:
            return self._ended()
        try:
            if self._chunks is None:
                self._chunks = self._connect()
            chunk = next(self._chunks, b"")
            if not chunk:
                raise httpx.ReadError("the answer ended too early")
        except BaseException:
            self._held.close()
            self._chunks = None
            raise
        self._sha256.update(chunk)
        self._done_bytes += len(chunk)
        return chunk

    def _connect(self) -> Iterator[bytes]:
        digest = self._file.checksum_sha256.hex()
        headers = {"Accept-Encoding": "identity"}
        if self._done_bytes:
            headers |= {"Range": f"bytes={self._done_bytes}-", "If-Range": f'"{digest}"'}
        answer = self._held.enter_context(self._wire.stream(self._path, headers))
        if self._done_bytes and answer.status_code != 206:
            raise BlobDamaged(digest, "the server has other bytes now")
        return answer.iter_raw()

    def _ended(self) -> bytes:
        digest = Digest(self._sha256.digest())
        if digest != self._file.checksum_sha256:
            raise BlobDamaged(self._file.checksum_sha256.hex(), "its bytes have another digest")
        return b""
