"""A node that ships to a folder when a test says so, and what its client knows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, final

from cas.catalog.local import LocalCatalog
from cas.config import ReplicatorSettings, Settings, TargetSettings
from cas.doctor import examine_store
from cas.records import StoredFile
from cas.references import Reference, parse_reference
from cas.replicas import Done, due, register, settle
from cas.retention import parse_retention
from cas.store import Store
from replicator.folder import FolderTarget
from replicator.link import Link
from replicator.probe import Profile
from replicator.restoring import Options, Restored, restore
from replicator.shipping import Shipped, Shipper
from replicator.targets import ObjectStat, Target, object_key
from tests.clocks import HandClock

NAME: Final = "away"
PROFILE: Final = Profile(conditional=True)
LOOSE: Final = Profile(conditional=False)  # of a server that knows no conditions


def folder_target(place: Path) -> FolderTarget:
    return FolderTarget(NAME, place)


@final
class Shipping:
    """One ROOT and its target. `names` tells what a client was promised."""

    def __init__(
        self,
        root: Path,
        place: Path,
        clock: HandClock,
        *,
        profile: Profile = PROFILE,
        settings: Settings | None = None,
        target: Target | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.place = place
        self.clock = clock
        self.target = target or folder_target(place)
        self.profile = profile
        self.store = Store.open(root, self.settings, clock=clock)
        register(self.store.catalog, [(NAME, self.target.place)])
        where = TargetSettings(NAME, "folder", place)
        self.link = Link(self.target, where, profile)
        self.shipper = Shipper(self.store, self.link, profile)

    @property
    def catalog(self) -> LocalCatalog:
        return self.store.catalog

    def put(self, content: bytes, name: str = "a.txt", **more: Any) -> StoredFile:
        self.clock.advance(1_000_000)
        return self.store.files("t1", "test").put(content, name=name, **more)

    def copy_blobs(self) -> None:
        """Do what the mirror does."""
        with self.catalog.read() as snapshot:
            rows = due(snapshot, NAME, self.store.now_us(snapshot), 10_000)
        for row in rows:
            with self.store.blobs.path(row.digest).open("rb") as file:
                self.target.put(object_key(row.digest), file, row.size_bytes)
        settle(self.catalog, [Done(row) for row in rows])

    def ship(self) -> Shipped:
        """Ship all there is."""
        while (shipped := self.shipper.step()).more:
            pass
        while self.shipper.compact(self.clock.now_us()):
            pass
        return shipped

    def ship_all(self) -> Shipped:
        self.copy_blobs()
        return self.ship()

    def close(self) -> None:
        self.store.close()


@contextmanager
def shipping(root: Path, place: Path, clock: HandClock, **more: Any) -> Any:
    node = Shipping(root, place, clock, **more)
    try:
        yield node
    finally:
        node.close()


def names(store: Store) -> dict[str, tuple[str, str, str, bool]]:
    """What a client is promised: reference → digest, retention, name, hold."""
    return {
        file.storage_ref: (
            file.checksum_sha256.hex(),
            file.retention_policy,
            file.name,
            file.hold,
        )
        for file in store.files("t1", "test").list(limit=1000).items
    }


def contents(place: Path, below: str = "") -> dict[str, bytes]:
    """Every object at a folder target below a prefix, but HEAD."""
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in sorted((place / below).rglob("*"))
        if path.is_file() and path.name != "HEAD.json" and not path.name.startswith(".")
    }


def wrong(store: Store) -> list[str]:
    """What the doctor finds wrong."""
    return [finding.what for finding in examine_store(store, read_data=True) if finding.wrong]


def copied(root: Path, to: Path) -> Path:
    """ROOT as `cp -a` copies it."""
    shutil.copytree(root, to, symlinks=True)
    return to


def with_history(history_us: int) -> Settings:
    """Settings that keep so much history at targets."""
    return Settings(replicator=ReplicatorSettings(history=history_us))  # type: ignore[arg-type]


@final
class Interposed:
    """A target that calls a test before it puts an object, and passes all else on."""

    def __init__(self, target: Target, before: Callable[[str], bytes | None]) -> None:
        """`before(key)` may raise, or return other bytes to be put."""
        self._target = target
        self._before = before

    def put(self, key: str, body: Any, size_bytes: int, **more: Any) -> str:
        data = self._before(key)
        if data is not None:
            import io

            body, size_bytes, more = io.BytesIO(data), len(data), {}
        return self._target.put(key, body, size_bytes, **more)

    def stat(self, key: str) -> ObjectStat:
        return self._target.stat(key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def restored(
    root: Path,
    place: Path,
    clock: HandClock,
    options: Options | None = None,
    *,
    target: Target | None = None,
    settings: Settings | None = None,
    **more: Any,
) -> Restored:
    """A node at `root`, lazily made from what is at `place`."""
    return restore(
        root,
        settings or Settings(),
        target or folder_target(place),
        PROFILE,
        options or Options(),
        say=print,
        clock=clock,
        **more,
    )


def reference(file: StoredFile) -> Reference:
    return parse_reference(file.storage_ref)


def filled(node: Shipping) -> dict[str, tuple[str, str, str, bool]]:
    """Some of everything; returns what the client was promised."""
    node.put(b"plain")
    node.put(b"forever", "b.pdf", retention=parse_retention("forever"))
    held = node.put(b"held", "c.txt")
    files = node.store.files("t1", "test")
    files.hold(reference(held), True)
    node.put(b"plain", "again.txt", run="run-2")
    gone = node.put(b"deleted")
    files.delete(reference(gone))
    node.put(b"x" * 300_000, "large.bin")
    return names(node.store)
