"""A web application of another origin, in a real Chromium: what it may read, and what not."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tests.gateway.publishers import Publisher, publishing
from tests.gateway.served import Served, serving

# Everything here needs a preflight; the answer is what a script of the page could read of it.
CALL = """async ([url, token]) => {
  const headers = {Authorization: `Bearer ${token}`, "X-Request-Id": "r"};
  try {
    const sent = await fetch(url, {method: "POST", headers, body: "hello"});
    const read = (name) => sent.headers.get(name);
    return [sent.status, (await sent.json()).size_bytes, read("Location"), read("Repr-Digest"),
            read("X-Request-Id"), read("Date")];
  } catch (error) {
    return error.name;
  }
}"""


@pytest.fixture(scope="module")
def friend() -> Iterator[Publisher]:
    with publishing(b"<!doctype html><title>a friend</title>") as publisher:
        publisher.headers["Content-Type"] = "text/html"
        yield publisher


@pytest.fixture(scope="module")
def stranger() -> Iterator[Publisher]:
    with publishing(b"<!doctype html><title>a stranger</title>") as publisher:
        publisher.headers["Content-Type"] = "text/html"
        yield publisher


@pytest.fixture(scope="module")
def served(disk_folder: Path, friend: Publisher) -> Iterator[Served]:
    origin = friend.url.removesuffix("/jwks.json")
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder,
        serving(Path(folder), GATEWAY__CORS_ORIGINS=origin, GATEWAY__WORKERS="1") as server,
    ):
        yield server


@pytest.fixture(scope="module")
def page(browser: Browser) -> Page:
    return browser.new_page()


def call(page: Page, served: Served, publisher: Publisher) -> Any:
    page.goto(publisher.url)
    return page.evaluate(CALL, [f"{served.address}/api/v1/storage?name=x", served.admin])


def test_an_application_that_is_named_may_call_and_read(
    page: Page, served: Served, friend: Publisher
) -> None:
    status, size_bytes, location, digest, request_id, date = call(page, served, friend)
    assert (status, size_bytes, request_id) == (201, 5, "r")
    assert location.startswith("/api/v1/storage/")
    assert digest.startswith("sha-256=:")
    assert date is None, "not exposed: nobody needs it"


def test_an_application_that_is_not_named_stores_and_reads_nothing(
    page: Page, served: Served, stranger: Publisher
) -> None:
    before = served.objects()
    assert call(page, served, stranger) == "TypeError"
    assert served.objects() == before
