"""A server outlives a catalog that stopped: all its workers open the store anew."""

from __future__ import annotations

import errno
import os

import pytest

from cas.durable import Disk
from cas.errors import CatalogFailed
from cas.store import Store
from tests.gateway.served import Served, until


class FailingSync(Disk):
    """A disk whose first sync of a journal fails, as a dying one's does."""

    def sync_data(self, fd: int) -> None:
        if "/journal/" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().sync_data(fd)


def test_after_a_failed_sync_the_workers_are_replaced_and_writing_goes_on(served: Served) -> None:
    kept = served.ask("POST", "/api/v1/storage?name=kept", b"before", token=served.admin)
    assert kept.status == 201
    with Store.open(served.root, disk=FailingSync()) as other:
        files = other.files("default", "somebody else")
        with pytest.raises(CatalogFailed):
            files.put(b"never acknowledged", name="lost")
    before = set(served.workers())

    refused = served.ask("POST", "/api/v1/storage?name=new", b"during", token=served.admin)

    assert (refused.status, refused.code) == (503, "catalog_failed")

    # The listener stays open all the while: what is asked meanwhile waits for a new worker.
    def written() -> bool:
        answer = served.ask("POST", "/api/v1/storage?name=new", b"during", token=served.admin)
        assert answer.status in (201, 503)
        return answer.status == 201

    until(written)
    assert set(served.workers()) - before
    fetched = served.ask(
        "GET", f"/api/v1/storage/{kept.form['storage_ref'][6:]}", token=served.admin
    )
    assert fetched.body == b"before"
