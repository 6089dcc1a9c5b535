"""`blobcask serve` and `blobcask token` as commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cas.store import Store
from tests.clocks import wrong_clock
from tests.conftest import CHECKOUT
from tests.gateway.served import serving


def blobcask(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "cas", *words, "--root", str(root)]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60)


def test_a_token_stands_alone_on_stdout_and_opens_the_server(root: Path) -> None:
    with serving(root) as served:
        made = blobcask(root, "token", "--tenant", "t1", "--permission", "view_storage")
        assert made.returncode == 0
        assert made.stderr == ""
        (token,) = made.stdout.split()
        assert served.ask("GET", "/api/v1/storage", token=token).form["files"] == []


@pytest.mark.parametrize("fake", ["-3650d", "+3650d"])
def test_what_the_command_line_makes_under_a_wrong_clock_opens_the_server_under_it(
    root: Path, monkeypatch: pytest.MonkeyPatch, fake: str
) -> None:
    with Store.open(root) as store:
        kept = store.files("default", "ada").put(b"bytes", name="kept")
    for name, value in wrong_clock(fake).items():
        monkeypatch.setenv(name, value)
    with serving(root) as served:
        token = served.token("admin")
        listed = served.ask("GET", "/api/v1/storage", token=token)
        assert listed.status == 200, listed.body
        (url,) = blobcask(root, "url", kept.storage_ref, "--expires-in", "60").stdout.split()
        assert served.ask("GET", "/d/" + url.partition("/d/")[2]).body == b"bytes"


def test_what_is_served_at_all_addresses_is_told_by_one_that_can_be_opened(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(root, GATEWAY__BIND="0.0.0.0:0") as served:
        assert served.first == f"http://127.0.0.1:{served.port}/u/" + served.first[-8:]
        (said,) = (line for line in served.printed if line.startswith("Links of workflows"))
        assert "[gateway] public_url" in said
        token = served.token("admin")
        stored = served.ask("POST", "/api/v1/storage?name=a", b"bytes", token=token).form
    monkeypatch.setenv("BLOBCASK_GATEWAY__BIND", "0.0.0.0:8080")
    (url,) = blobcask(root, "url", stored["storage_ref"]).stdout.split()
    assert url.startswith("http://127.0.0.1:8080/d/")


def test_mail_without_an_address_for_its_links_stops_the_start(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOBCASK_MAIL__HOST", "mail.example.org")
    monkeypatch.setenv("BLOBCASK_MAIL__SENDER", "us@example.org")
    refused = blobcask(root, "serve")
    assert refused.returncode == 2
    assert "[gateway] public_url is not set: [mail] host needs it" in refused.stderr
    assert not root.exists() or not list(root.iterdir())


def test_a_token_needs_a_permission_that_exists(root: Path) -> None:
    assert blobcask(root, "token").returncode != 0
    refused = blobcask(root, "token", "--permission", "everything")
    assert refused.returncode != 0
    assert refused.stdout == ""


def test_a_second_start_keeps_keys_and_files_and_prints_no_secret(root: Path) -> None:
    with serving(root) as served:
        stored = served.ask("POST", "/api/v1/storage?name=a", b"kept", token=served.admin).form
        admin = served.admin
    with serving(root) as served:
        assert not any(admin[:10] in line for line in served.printed)
        listed = served.ask("GET", "/api/v1/storage", token=admin).form["files"]
        assert [file["storage_ref"] for file in listed] == [stored["storage_ref"]]


def test_a_folder_that_is_no_store_is_refused_in_words(root: Path) -> None:
    (root / "holiday.jpg").write_bytes(b"")
    refused = blobcask(root, "serve")
    assert refused.returncode != 0
    assert "holiday.jpg" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_printed_url_downloads_without_a_login(root: Path) -> None:
    with serving(root) as served:
        stored = served.ask("POST", "/api/v1/storage?name=a", b"bytes", token=served.admin).form
        made = blobcask(root, "url", stored["storage_ref"], "--expires-in", "60")
        assert made.returncode == 0, made.stderr
        (url,) = made.stdout.split()
        path = "/d/" + url.partition("/d/")[2]
        assert served.ask("GET", path).body == b"bytes"
        assert served.ask("GET", path.replace("expires=1", "expires=2")).status == 404
    unknown = blobcask(root, "url", stored["storage_ref"].replace("default", "other"))
    assert unknown.returncode != 0
    assert unknown.stdout == ""
