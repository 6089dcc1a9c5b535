"""The store: one ROOT, opened by this process. Where all parts of `cas` are wired."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Self, final

from cas.adoption import Adoption
from cas.blobs import BlobFiles, Measured
from cas.catalog import Snapshot, Transaction
from cas.catalog.local import CatalogSettings, LocalCatalog
from cas.catalog.recovery import has_journal
from cas.clock import DAY_US, HOUR_US, SLACK_US, Clock, SystemClock, advance, believable, rfc3339
from cas.config import Settings
from cas.deliveries import Deliveries
from cas.durable import DISK, Disk
from cas.elsewhere import Elsewhere
from cas.errors import NotFound, UnsuitableRoot
from cas.files import Files
from cas.format import check_format, upgrade
from cas.garbage import Collector
from cas.opening import Opener
from cas.partial_files import PartialFiles
from cas.quotas import Quota
from cas.recency import Recency
from cas.records import Mark, PendingUpload, StoredFile
from cas.retention import parse_retention
from cas.upload_links import Policy, UploadLink, as_of, upload_behind
from cas.uploads import Uploads

_LOOK_AGAIN_US = 250_000
STORE_ID = "store_id"  # the mark that names this store for ever


@final
class Store:
    """Everything of one ROOT. Open it after fork, once per process; threads share it."""

    def __init__(
        self,
        root: Path,
        settings: Settings,
        clock: Clock,
        disk: Disk,
        catalog: LocalCatalog,
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.root = root
        self.settings = settings
        self.clock = clock
        self.disk = disk
        self.catalog = catalog
        self._looked_at_us = self._last_frame_us = 0
        self.blobs = BlobFiles(root, disk, settings.store.min_free)
        self.collector = Collector(root, catalog, self.blobs, settings.store.grace)
        self.partial_files = PartialFiles(root, disk)
        self.elsewhere = Elsewhere(root, waiting)
        self.recency = Recency(clock, on=bool(settings.cache.max_size))
        self.opener = Opener(catalog, self.blobs, self.recency, self.elsewhere)
        self.adoption = Adoption(
            catalog,
            self.blobs,
            self.collector,
            trust_verified_for_us=settings.store.trust_verified_for,
            now_us=self.now_us,
            confirm=self._confirm if settings.uploads.storage_type == "s3" else None,
        )
        self._policy = Policy(
            parse_retention(f"days:{settings.uploads.default_retention_days}"),
            settings.uploads.default_expiry_hours * HOUR_US,
            settings.uploads.max_file_size_mb << 20,
            settings.references.scheme,
            settings.uploads.partial_expiry,
            settings.events.keep,
            Quota(settings.limits.quota_files, settings.limits.quota_bytes),
        )

    @classmethod
    def open(
        cls,
        root: Path,
        settings: Settings | None = None,
        *,
        clock: Clock | None = None,
        disk: Disk = DISK,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Store:
        """Open the store at `root`, making it when the folder is absent or empty. `waiting`
        surrounds each wait for the background process, as in `Elsewhere`.

        Raises UnsuitableRoot (a newer format, a network filesystem, a folder that holds
        something else), StoreBusy, JournalDamaged.
        """
        settings = settings or Settings()
        clock = clock or SystemClock()
        root = root.absolute()
        check_format(root, disk)
        blobs = BlobFiles(root, disk)
        blobs.create()
        if not has_journal(root) and blobs.has_blobs():
            # A fresh catalog would make all of them orphans, and the scrub would remove them.
            raise UnsuitableRoot(root, "it holds blobs, but their catalog is gone; restore it")
        catalog = LocalCatalog(
            root,
            CatalogSettings(
                checkpoint_bytes=settings.catalog.checkpoint_every,
                journal_keep_us=settings.catalog.journal_keep,
                clock_gap_us_max=settings.sweeper.max_clock_gap,
                min_free_bytes=settings.store.min_free,
            ),
            clock=clock,
            disk=disk,
        )
        store = cls(root, settings, clock, disk, catalog, waiting)
        try:
            upgrade(root, catalog, disk, catalog.ballast)
            store.store_id()
        except BaseException:
            store.close()
            raise
        return store

    def store_id(self) -> str:
        """The identifier this store got when it was made."""

        def name_it(txn: Transaction) -> str:
            mark = txn.get(Mark, STORE_ID)
            if mark is None:
                mark = Mark(STORE_ID, str(uuid.uuid4()))
                txn.insert(mark)
            return mark.value

        with self.catalog.read() as snapshot:
            mark = snapshot.get(Mark, STORE_ID)
        return mark.value if mark else self.catalog.write(name_it, actor="store")

    # --- views: every query of a request goes through one of these (invariant 9)

    def files(self, tenant_id: str, actor: str, request_id: str = "") -> Files:
        """The files of one tenant; raises InvalidName for an impossible tenant."""
        return Files(
            self.catalog,
            self.blobs,
            self.adoption,
            self.opener,
            tenant_id=tenant_id,
            actor=actor,
            request_id=request_id,
            scheme=self._policy.scheme,
            default_retention=self._policy.default_retention,
            limit_bytes=self._policy.limit_bytes,
            quota=self._policy.quota,
            now_us=self.now_us,
        )

    def uploads(self, tenant_id: str, actor: str, request_id: str = "") -> Uploads:
        """The uploads of one tenant; raises InvalidName for an impossible tenant."""
        return Uploads(
            self.catalog,
            self._link,
            self._policy,
            tenant_id=tenant_id,
            actor=actor,
            request_id=request_id,
            now_us=self.now_us,
        )

    def deliveries(self, tenant_id: str, actor: str, request_id: str = "") -> Deliveries:
        """What is sent for one tenant; raises InvalidName for an impossible tenant."""
        return Deliveries(self.catalog, tenant_id=tenant_id, actor=actor, request_id=request_id)

    def upload_link(self, token: str, request_id: str = "") -> UploadLink:
        """What an upload token opens; raises NotFound."""
        with self.catalog.read() as snapshot:
            upload = upload_behind(snapshot, token)
            now_us = self.now_us(snapshot)
        if upload is None:
            raise NotFound("upload", token)
        return self._link(as_of(upload, now_us), request_id)

    def file_by_id(self, file_id: str) -> StoredFile:
        """The file of a signed URL, whose signature is the right; raises NotFound."""
        with self.catalog.read() as snapshot:
            file = snapshot.get(StoredFile, file_id)
            now_us = self.now_us(snapshot)
        if file is None or (
            file.expires_at is not None and file.expires_at <= now_us and not file.hold
        ):
            raise NotFound("file", file_id)
        return file

    # --- time

    def now_us(self, snapshot: Snapshot) -> int:
        """Catalog time as this snapshot may see it: never before its last frame."""
        return advance(self.clock, snapshot.position.at_us, self.settings.sweeper.max_clock_gap)

    def about_now_us(self) -> int:
        """Catalog time by the newest frame that this process looked at in the last quarter of
        a second: for what is judged at each request, and to the second."""
        now_us = self.clock.now_us()
        if not 0 <= now_us - self._looked_at_us < _LOOK_AGAIN_US:
            with self.catalog.read() as snapshot:
                self._last_frame_us = snapshot.position.at_us
            self._looked_at_us = now_us
        return advance(self.clock, self._last_frame_us, self.settings.sweeper.max_clock_gap)

    def clock_trouble(self) -> str:
        """Why nothing may be swept now (invariant 10), in words; "" when the clock is right."""
        with self.catalog.read() as snapshot:
            last_us = snapshot.position.at_us
        now_us = self.clock.now_us()
        gap_us = self.settings.sweeper.max_clock_gap
        if now_us < last_us - SLACK_US:
            return f"the clock is {(last_us - now_us) // 1_000_000} s behind the last write"
        if believable(now_us, last_us, gap_us, synchronised=False) or self.clock.synchronised():
            return ""
        return (
            f"the clock is {(now_us - last_us) // DAY_US} days ahead of the last write and "
            "not synchronised"
        )

    def accept_clock(self) -> None:
        """Take the clock's time for right, however far it leads (invariant 10); durable."""

        def accept(txn: Transaction) -> None:
            mark = Mark("clock_accepted", rfc3339(self.clock.now_us()))
            found = txn.get(Mark, mark.name)
            if found is None:
                txn.insert(mark)
            elif found != mark:
                txn.replace(mark)

        self.catalog.accept_clock()
        self.catalog.write(accept, actor="operator")

    def close(self) -> None:
        """Decide what waits and let go of ROOT. Closing twice is fine."""
        self.blobs.close()
        self.catalog.close()
        self.blobs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _confirm(self, measured: Measured, anew: bool) -> None:
        self.elsewhere.confirm(measured.digest, measured.size_bytes, anew=anew)

    def _link(self, upload: PendingUpload, request_id: str) -> UploadLink:
        return UploadLink(
            self.catalog,
            self.blobs,
            self.adoption,
            self._policy,
            upload,
            request_id=request_id,
            partial_files=self.partial_files,
            opener=self.opener,
            now_us=self.now_us,
        )
