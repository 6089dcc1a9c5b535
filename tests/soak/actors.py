"""The processes of the soak: `python -m tests.soak.actors ROLE ROOT NAME SEED`.

An actor works until its standard input ends, and says each thing it was promised as one
line on standard output, after the store's answer and never before:

    + FILE_ID DIGEST    stored
    - FILE_ID           a deletion is about to be asked for; whether it happens is open
    x FILE_ID           deleted
    e COUNT             so many events happened
"""

from __future__ import annotations

import io
import os
import random
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import final

from cas.config import Duration, Settings, Size, StoreSettings
from cas.digest import digest_of
from cas.errors import FilesRefused, NotFound, UploadClosed
from cas.files import Files, PutItem
from cas.records import StoredFile
from cas.references import parse_reference
from cas.retention import FOREVER, parse_retention
from cas.scrub import Scrub
from cas.store import Store
from cas.sweep import execute_sweep, plan_sweep
from cas.uploads import UploadRequest
from tests.clocks import KEEP_US

CONTENTS = 48  # few, so that writers meet each other, the condemned and the just collected
TENANTS = ("north", "south", "west")
SETTINGS = Settings(store=StoreSettings(grace=Duration(20_000), min_free=Size(0)))


def content(number: int) -> bytes:
    """One of the few contents: from nothing to 96 KiB, some over the size of one write."""
    return random.Random(number).randbytes((0, 1, 700, 5_000, 16_384, 98_304)[number % 6])


def say(line: str) -> None:
    # One write of one line: a kill leaves it whole or absent.
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


def asked_to_stop() -> bool:
    ready, _, _ = select.select([sys.stdin], [], [], 0)
    return bool(ready)


@final
class Writer:
    """Stores, deletes and uploads under its own run, so that it alone deletes its files."""

    def __init__(self, store: Store, name: str, random_source: random.Random) -> None:
        self._store = store
        self._name = name
        self._random = random_source
        self._files: list[Files] = [store.files(tenant, name) for tenant in TENANTS]
        self._mine: dict[str, StoredFile] = {}

    def act(self) -> int:
        """Do one thing; returns how many events it was."""
        actions: list[Callable[[], int]] = [self._put, self._put, self._put_many]
        actions += [self._delete, self._delete, self._upload, self._short_lived]
        return self._random.choice(actions)()

    def _source(self) -> bytes | io.BytesIO:
        data = content(self._random.randrange(CONTENTS))
        return data if self._random.random() < 0.5 else io.BytesIO(data)

    def _kept(self, file: StoredFile) -> None:
        self._mine[file.file_id] = file
        say(f"+ {file.file_id} {file.checksum_sha256.hex()}")
        if self._random.random() < 0.3:
            with open(self._store.opener.here(file.checksum_sha256), "rb") as stream:
                assert digest_of(stream.read()) == file.checksum_sha256

    def _put(self) -> int:
        files = self._random.choice(self._files)
        self._kept(files.put(self._source(), name="one", run=self._name, retention=FOREVER))
        return 1

    def _put_many(self) -> int:
        files = self._random.choice(self._files)
        items = [PutItem(self._source(), f"many-{n}") for n in range(self._random.randint(1, 12))]
        stored = files.put_many(items, run=self._name, retention=FOREVER)
        for file in stored:
            self._kept(file)
        return len(stored)

    def _delete(self) -> int:
        if not self._mine:
            return 0
        file = self._mine.pop(self._random.choice(list(self._mine)))
        say(f"- {file.file_id}")
        files = self._store.files(file.tenant_id, self._name)
        files.delete(parse_reference(file.storage_ref))
        say(f"x {file.file_id}")
        return 1

    def _short_lived(self) -> int:
        # Expired almost at once: food for the sweep. Promised to nobody.
        files = self._random.choice(self._files)
        gone = parse_retention("until:2020-01-01T00:00:00Z")
        files.put(self._source(), name="short", run=f"{self._name}.short", retention=gone)
        return 1

    def _upload(self) -> int:
        uploads = self._store.uploads(self._random.choice(TENANTS), self._name)
        upload = uploads.request(
            UploadRequest("soak", max_files=3, run=self._name, retention=FOREVER)
        )
        link = self._store.upload_link(upload.upload_token)
        events = 1
        for _ in range(self._random.randint(1, 4)):
            link.put(self._random.randrange(3), self._source(), filename="file.bin")
            events += 1
        if self._random.random() < 0.2:
            link.empty(self._random.randrange(3))
        if self._random.random() < 0.2:
            uploads.cancel(upload.upload_token)
        try:
            for file in link.complete().files:
                self._kept(file)
        except (UploadClosed, FilesRefused):
            pass  # cancelled or emptied above
        return events + 1


@final
class Collecting:
    """Sweeps and collects without a pause."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def act(self) -> int:
        store = self._store
        with store.catalog.read() as snapshot:
            now_us = store.now_us(snapshot)
            sweep = plan_sweep(snapshot, now_us, keep_us=KEEP_US)
            plan = store.collector.plan(snapshot, now_us)
        ended = execute_sweep(store.catalog, sweep)
        return ended.files + ended.uploads + store.collector.execute(plan).blobs


@final
class Scrubbing:
    """Scrubs without a pause: hashes what is stored, removes the orphans of killed writers."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._scrub = Scrub(store)

    def act(self) -> int:
        # Bytes that are being stored and collected all the while are never damaged or lost.
        report = self._scrub.report
        before = report.checked + len(report.orphans)
        if not self._scrub.step():
            assert report.well, list(report.lines())
            self._scrub = Scrub(self._store)
        return report.checked + len(report.orphans) - before


def main() -> None:
    role, root, name, seed = sys.argv[1:]
    with Store.open(Path(root), SETTINGS) as store:
        actor: Writer | Collecting | Scrubbing
        if role == "writer":
            actor = Writer(store, name, random.Random(int(seed)))
        else:
            actor = Collecting(store) if role == "collector" else Scrubbing(store)
        while not asked_to_stop():
            try:
                events = actor.act()
            except NotFound as error:
                raise AssertionError(f"{name} was promised what is not there") from error
            say(f"e {events}")


if __name__ == "__main__":
    main()
