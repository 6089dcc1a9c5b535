"""The verbs that an embedded store and a remote one share, so that one program serves both.

`cas.store.Store` and `cas.remote.RemoteStore` are both a StoreView. What differs stays with
each: upkeep and the catalog are the embedded store's, progress and URLs the remote one's.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from cas.files import PutItem
from cas.hashing import Source
from cas.listing import Page
from cas.records import PendingUpload, StoredFile, UploadFile
from cas.references import Reference
from cas.retention import Retention
from cas.uploads import UploadRequest


class FilesView(Protocol):
    """The files of one tenant; see `cas.files.Files` for what each verb promises."""

    def put(
        self,
        source: Source,
        *,
        name: str,
        run: str = ...,
        filename: str | None = ...,
        content_type: str | None = ...,
        retention: Retention | None = ...,
    ) -> StoredFile: ...

    def put_many(
        self, items: Iterable[PutItem], *, run: str = ..., retention: Retention | None = ...
    ) -> list[StoredFile]: ...

    def stat(self, reference: Reference) -> StoredFile: ...

    def reader(self, reference: Reference) -> tuple[StoredFile, io.RawIOBase]: ...

    def delete(self, reference: Reference) -> None: ...

    def hold(self, reference: Reference, on: bool) -> StoredFile: ...

    def list(
        self,
        *,
        run: str | None = ...,
        name: str | None = ...,
        cursor: str | None = ...,
        limit: int = ...,
    ) -> Page[StoredFile]: ...


class LinkView(Protocol):
    """One upload of one tenant."""

    @property
    def upload(self) -> PendingUpload: ...

    def slots(self) -> Sequence[UploadFile]: ...


class UploadsView(Protocol):
    """The uploads of one tenant; see `cas.uploads.Uploads`."""

    def request(self, wanted: UploadRequest) -> PendingUpload: ...

    def get(self, token: str) -> LinkView: ...

    def cancel(self, token: str) -> PendingUpload: ...

    def list(
        self, *, status: str | None = ..., cursor: str | None = ..., limit: int = ...
    ) -> Page[PendingUpload]: ...


class StoreView(AbstractContextManager["StoreView"], Protocol):
    """A store, wherever it is."""

    def files(self, tenant_id: str, actor: str) -> FilesView: ...

    def uploads(self, tenant_id: str, actor: str) -> UploadsView: ...

    def close(self) -> None: ...
