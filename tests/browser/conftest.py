"""One real server and one real Chromium for each module of tests."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.browser.person import ARGUMENTS, OpenPage
from tests.gateway.served import PATIENCE_S, Served, serving

# On a busy machine; what is asked of a page comes at once elsewhere.
PATIENCE_MS = PATIENCE_S * 1000
expect.set_options(timeout=PATIENCE_MS)
# Refusals are answers with an error status, and lost connections are what some tests are
# about; Chromium reports both as if they were faults of the page.
EXPECTED_REPORTS = (
    "Failed to load resource: the server responded with a status of 4",
    "Failed to load resource: net::ERR_INTERNET_DISCONNECTED",
    "Failed to load resource: net::ERR_CONNECTION_",
    "Failed to load resource: net::ERR_EMPTY_RESPONSE",
    "Failed to load resource: net::ERR_SOCKET_NOT_CONNECTED",
)


@pytest.fixture(scope="module")
def served(disk_folder: Path) -> Iterator[Served]:
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder,
        serving(Path(folder)) as server,
    ):
        yield server


@pytest.fixture(scope="module")
def browser(program: Callable[[str], str]) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program("chromium"), args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens an address; the page may ask nobody but its server, and break no policy.

    Each page is another browser, unless it is opened `beside` one. `without` is a file that
    does not come, `prefix` an address under which a proxy shows the whole server.
    """
    contexts = []
    faults: list[str] = []

    def note(message: Any) -> None:
        if message.type == "error" and not message.text.startswith(EXPECTED_REPORTS):
            faults.append(message.text)

    def open_at(
        url: str, *, beside: Page | None = None, without: str = "", prefix: str = "", **options: Any
    ) -> Page:
        context = beside.context if beside else browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", note)
        page.on("pageerror", lambda error: faults.append(str(error)))
        home = url.partition("/u/")[0].partition("/api/")[0].removesuffix("/docs")
        page.on(
            "request",
            lambda request: None if request.url.startswith(home) else faults.append(request.url),
        )
        if prefix:
            server = urljoin(url, "/").rstrip("/")
            page.route(
                f"{prefix}/**",
                lambda route: route.continue_(url=route.request.url.replace(prefix, server)),
            )
        if without:
            page.route(f"**/{without}", lambda route: route.abort("connectionfailed"))
        page.goto(url)
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert faults == []
