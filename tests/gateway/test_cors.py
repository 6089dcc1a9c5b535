"""Web applications of other origins: whom the browser is told to let in, and to what."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cas.errors import InvalidSetting
from cas.setting_sources import load_settings
from tests.gateway.served import Answer, Served, serving

APP = "https://app.example.org"
LOCAL = "http://localhost:5173"
CROSS_ORIGIN = "access-control-"


@pytest.fixture(scope="module")
def served(disk_folder: Path) -> Iterator[Served]:
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder,
        serving(
            Path(folder), GATEWAY__CORS_ORIGINS=f"{APP}, {LOCAL}", GATEWAY__WORKERS="1"
        ) as server,
    ):
        yield server


@pytest.fixture(scope="module")
def closed(disk_folder: Path) -> Iterator[Served]:
    """One that names nobody."""
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder,
        serving(Path(folder), GATEWAY__WORKERS="1") as server,
    ):
        yield server


def told(answer: Answer) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if CROSS_ORIGIN in name}


def preflight(served: Served, path: str, origin: str, method: str = "PUT") -> Answer:
    headers = {"Origin": origin, "Access-Control-Request-Method": method}
    headers["Access-Control-Request-Headers"] = "authorization,x-unknown"
    return served.ask("OPTIONS", path, headers=headers)


@pytest.mark.parametrize("origin", [APP, LOCAL])
@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/storage",
        "/api/v1/uploads/Xk9mP2qR/files/0",
        "/api/v1/uploads/Xk9mP2qR/tus/",
        "/d/x/y",
        "/api/v1/nowhere",
    ],
)
def test_a_preflight_of_a_named_origin_is_answered(served: Served, path: str, origin: str) -> None:
    answer = preflight(served, path, origin)
    assert (answer.status, answer.body) == (204, b"")
    said = told(answer)
    assert said["access-control-allow-origin"] == origin
    methods = said["access-control-allow-methods"].split(", ")
    assert {"PUT", "PATCH", "POST", "DELETE", "HEAD"} <= set(methods)
    headers = said["access-control-allow-headers"].lower().split(", ")
    wanted = {"authorization", "content-type", "range", "upload-offset", "tus-resumable"}
    assert {*wanted, "content-digest", "if-match", "idempotency-key"} <= set(headers)
    assert {"upload-defer-length", "upload-concat"}.isdisjoint(headers)
    assert "x-unknown" not in headers
    assert "*" not in headers
    assert "Origin" in answer.headers["vary"]
    assert "access-control-allow-credentials" not in said


NOT_NAMED = [
    "null",
    "https://app.example.org.evil.org",
    "https://evil-app.example.org",
    "https://evil.org/https://app.example.org",
    "https://app.example.org:8443",
    "http://app.example.org",
    "https://app.example.org/",
    "https://APP.example.org",
    "https://xapp.example.org",
    "https://app_example.org",
    "https://app.example.org, https://evil.org",
    "http://localhost",
    "*",
    "",
]


@pytest.mark.parametrize("origin", NOT_NAMED)
def test_an_origin_that_is_not_named_is_told_nothing(served: Served, origin: str) -> None:
    for answer in (
        preflight(served, "/api/v1/storage", origin),
        served.ask("GET", "/api/v1/storage", headers={"Origin": origin}, token=served.admin),
    ):
        assert told(answer) == {}
        assert "Origin" in answer.headers["vary"]


def test_answers_and_refusals_are_readable_for_a_named_origin(served: Served) -> None:
    for answer, status in (
        (served.ask("GET", "/api/v1/storage", token=served.admin, headers={"Origin": APP}), 200),
        (served.ask("GET", "/api/v1/storage", headers={"Origin": APP}), 401),
        (served.ask("GET", "/api/v1/uploads/Zz9zZz9z/info", headers={"Origin": APP}), 404),
        (served.ask("GET", "/api/v1/nowhere", headers={"Origin": APP}), 404),
        (served.ask("GET", "/d/x/y?expires=1&signature=x", headers={"Origin": APP}), 404),
    ):
        assert answer.status == status
        said = told(answer)
        assert said["access-control-allow-origin"] == APP
        exposed = said["access-control-expose-headers"].split(", ")
        assert {"ETag", "Location", "Repr-Digest", "Content-Range", "Retry-After"} <= set(exposed)
        assert {"Upload-Offset", "Tus-Resumable", "X-Request-Id"} <= set(exposed)
        assert "Origin" in answer.headers["vary"]


def test_without_an_origin_the_answer_still_says_that_it_varies(served: Served) -> None:
    answer = served.ask("GET", "/api/v1/storage", token=served.admin)
    assert told(answer) == {}
    assert "Origin" in answer.headers["vary"]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/u/Zz9zZz9z", "/static/upload.js"])
def test_pages_and_probes_are_open_to_no_other_origin(served: Served, path: str) -> None:
    assert told(served.ask("GET", path, headers={"Origin": APP})) == {}
    assert told(preflight(served, path, APP)) == {}


def test_without_the_setting_there_is_nothing(closed: Served) -> None:
    for answer in (
        preflight(closed, "/api/v1/storage", APP),
        closed.ask("GET", "/api/v1/storage", token=closed.admin, headers={"Origin": APP}),
    ):
        assert told(answer) == {}
        assert "vary" not in answer.headers


@pytest.mark.parametrize(
    "origin",
    [
        "https://app.example.org/",
        "https://app.example.org/path",
        "app.example.org",
        "null",
        "*",
        "https://*.example.org",
        "https://App.example.org",
        "https://app.example.org:443",
        "http://app.example.org:80",
        "https://user@app.example.org",
        "ftp://app.example.org",
    ],
)
def test_what_no_browser_sends_is_no_setting(origin: str) -> None:
    with pytest.raises(InvalidSetting, match="cors_origins"):
        load_settings(None, {"BLOBCASK_GATEWAY__CORS_ORIGINS": origin})
