"""The command: what stands on stdout, what on stderr, which code it ends with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from cas import errors
from cas.cli import main
from cas.cli.call import size, table
from cas.cli.exits import BROKEN_PIPE, EXITS, exit_code
from cas.digest import digest_of
from tests.conftest import CHECKOUT

Run = Callable[..., Result]
ABSENT = f"hwy://uploads/default/direct/{'0' * 64}.txt"


@pytest.fixture
def run(root: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call a verb on the store at `root`; bytes given as `stdin` are its standard input."""
    for name in list(os.environ):
        if name.startswith("BLOBCASK_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("BLOBCASK_STORE__MIN_FREE", "0B")

    def call(*arguments: str | Path, stdin: bytes | None = None) -> Result:
        texts = [*map(str, arguments), "--root", str(root)]
        return CliRunner().invoke(main, texts, input=stdin, prog_name="blobcask")

    return call


def form_of(result: Result) -> Any:
    """The one JSON document on stdout."""
    return json.loads(result.stdout)


def stored(run: Run, path: Path, data: bytes, *options: str) -> str:
    """Put a file; its reference."""
    path.write_bytes(data)
    result = run("put", path, *options)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


# --- storing and reading


def test_what_is_put_can_be_read_listed_and_copied(run: Run, tmp_path: Path) -> None:
    reference = stored(run, tmp_path / "note.txt", b"some words")
    assert reference == f"hwy://uploads/default/direct/{digest_of(b'some words').hex()}.txt"
    assert run("cat", reference).stdout_bytes == b"some words"
    copy = tmp_path / "copy"
    assert run("get", reference, "-o", copy).exit_code == 0
    assert copy.read_bytes() == b"some words"
    listed = run("ls")
    assert reference in listed.stdout
    assert "note.txt" in listed.stdout
    [file] = form_of(run("ls", "--json"))["files"]
    assert file["storage_ref"] == reference
    assert file["content_type"] == "text/plain"
    assert file["size_bytes"] == 10


def test_stdin_is_stored_under_the_name_it_is_given(run_command: Callable[..., Any]) -> None:
    done = run_command("put", "-", "--filename", "rows.csv", "--json", stdin=b"a,b\n")
    assert done.returncode == 0, done.stderr
    [file] = json.loads(done.stdout)["files"]
    assert (file["filename"], file["name"], file["content_type"]) == (
        "rows.csv",
        "rows.csv",
        "text/csv",
    )


def test_many_files_are_stored_in_one_go(run: Run, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.bin" for number in range(5)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 100)
    result = run("put", *paths, "--run", "r1")
    assert result.exit_code == 0
    assert [line.rpartition("/")[2] for line in result.stdout.splitlines()] == [
        f"{digest_of(path.read_bytes()).hex()}.bin" for path in paths
    ]
    assert len(form_of(run("ls", "--run", "r1", "--json"))["files"]) == 5
    assert form_of(run("ls", "--json", "--run", "other"))["files"] == []


def test_a_listing_goes_on_where_it_ended(run: Run, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.bin" for number in range(5)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]))
    run("put", *paths)
    first = form_of(run("ls", "--json", "--limit", "2"))
    rest = form_of(run("ls", "--json", "--limit", "0", "--cursor", first["next_cursor"]))
    assert len(first["files"]) == 2
    names = [file["name"] for file in first["files"] + rest["files"]]
    assert sorted(names) == [path.name for path in paths]
    assert rest["next_cursor"] is None


def test_a_copy_never_replaces_a_file_unasked(run: Run, tmp_path: Path) -> None:
    reference = stored(run, tmp_path / "a.txt", b"new")
    there = tmp_path / "there"
    there.write_bytes(b"old")
    refused = run("get", reference, "-o", there)
    assert refused.exit_code == exit_code(errors.Conflict())
    assert there.read_bytes() == b"old"
    assert run("get", reference, "-o", there, "--force").exit_code == 0
    assert there.read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "there"]


def test_damaged_bytes_are_told_and_never_copied(run: Run, root: Path, tmp_path: Path) -> None:
    reference = stored(run, tmp_path / "a.txt", b"right")
    name = digest_of(b"right").hex()
    path = root / "objects" / name[:2] / name
    path.chmod(0o644)
    path.write_bytes(b"wrong")
    assert run("cat", reference).exit_code == 7
    assert run("get", reference, "-o", tmp_path / "copy").exit_code == 7
    assert not (tmp_path / "copy").exists()


def test_a_tenant_sees_its_own_files_only(run: Run, tmp_path: Path) -> None:
    reference = stored(run, tmp_path / "a.txt", b"x", "--tenant", "acme")
    assert "/acme/" in reference
    assert form_of(run("ls", "--json"))["files"] == []
    assert run("cat", reference).stdout == "x"  # the reference names the tenant
    assert run("cat", reference, "--tenant", "other").exit_code == 3


# --- removing


def test_a_removal_can_be_rehearsed(run: Run, tmp_path: Path) -> None:
    reference = stored(run, tmp_path / "a.txt", b"x")
    assert run("rm", reference, "--dry-run").exit_code == 0
    assert run("stat", reference).exit_code == 0
    done = run("rm", reference, "--json")
    assert form_of(done) == {"deleted": [reference], "size_bytes": 1, "dry_run": False}
    assert run("stat", reference).exit_code == 3


def test_one_unknown_or_held_file_keeps_all_of_them(run: Run, tmp_path: Path) -> None:
    one = stored(run, tmp_path / "a.txt", b"1")
    two = stored(run, tmp_path / "b.txt", b"2")
    assert run("rm", one, ABSENT).exit_code == 3
    assert run("hold", two).exit_code == 0
    assert run("rm", one, two).exit_code == 5
    assert len(form_of(run("ls", "--json"))["files"]) == 2
    assert run("hold", two, "--off").exit_code == 0
    assert run("rm", one, two).exit_code == 0


def test_sweep_and_collect_say_what_they_would_do(run: Run, tmp_path: Path) -> None:
    stored(run, tmp_path / "a.txt", b"x", "--retention", "until:2001-01-01T00:00:00Z")
    planned = form_of(run("sweep", "--dry-run", "--json"))
    assert (planned["files"], planned["dry_run"]) == (1, True)
    assert form_of(run("sweep", "--json"))["files"] == 1
    assert form_of(run("sweep", "--json"))["files"] == 0
    assert form_of(run("collect", "--dry-run", "--json"))["blobs"] == 0  # within the grace


def test_nothing_is_swept_by_a_clock_that_runs_behind(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(run, tmp_path / "a.txt", b"x")
    monkeypatch.setattr("cas.clock.SystemClock.now_us", lambda clock: 1_000_000)
    for verb in ("sweep", "collect"):
        result = run(verb)
        assert result.exit_code == 5
        assert "behind" in result.stderr


# --- uploads


def test_an_upload_is_asked_for_shown_and_cancelled(run: Run) -> None:
    asked = run("request-upload", "photos", "--type", "jpg", "--max-files", "3", "--json")
    upload = form_of(asked)
    assert upload["allowed_types"] == ["jpg"]
    assert upload["upload_url"].endswith(f"/u/{upload['upload_token']}")
    assert upload["upload_token"] in run("uploads").stdout
    shown = form_of(run("uploads", upload["upload_token"], "--json"))
    assert (shown["status"], shown["slots"]) == ("pending", [])
    assert run("uploads", upload["upload_token"], "--cancel").exit_code == 0
    assert form_of(run("uploads", "--json"))["uploads"][0]["status"] == "cancelled"
    assert run("uploads", upload["upload_token"], "--cancel").exit_code == 5
    assert run("uploads", upload["upload_token"], "--tenant", "other").exit_code == 3


def test_a_size_without_unit_is_refused(run: Run) -> None:
    result = run("request-upload", "x", "--max-size", "10")
    assert result.exit_code == 2
    assert "unit" in result.stderr


# --- upkeep


def test_the_checks_find_a_fresh_store_well(run: Run, tmp_path: Path) -> None:
    stored(run, tmp_path / "a.txt", b"x")
    assert form_of(run("doctor", "--read-data", "--json")) == {"findings": []}
    assert form_of(run("scrub", "--json"))["checked"] == 1
    assert form_of(run("journal", "verify", "--json"))["damage"] == []
    assert form_of(run("checkpoint", "--json"))["seq"] >= 2
    assert form_of(run("recount", "--json"))["mended"] == 0
    assert form_of(run("rebuild", "--json"))["ops"] >= 3
    assert form_of(run("doctor", "--json")) == {"findings": []}


def test_the_checks_end_with_a_code_of_their_own(run: Run, root: Path, tmp_path: Path) -> None:
    stored(run, tmp_path / "a.txt", b"x")
    name = digest_of(b"x").hex()
    (root / "objects" / name[:2] / name).unlink()
    for verb in ("doctor", "scrub"):
        result = run(verb)
        assert result.exit_code == 11, verb
        assert name in result.stdout


def test_the_journal_tells_who_did_what(run: Run, tmp_path: Path) -> None:
    reference = stored(run, tmp_path / "a.txt", b"x")
    run("rm", reference)
    changes = [json.loads(line) for line in run("journal", "tail", "--json").stdout.splitlines()]
    actors = {change["actor"] for change in changes}
    assert any(actor.startswith("cli:") for actor in actors)
    removed = [op for change in changes for op in change["ops"] if op["record"] is None]
    assert [op["table"] for op in removed] == ["stored_files", "usage"]
    assert "stored_files" in run("journal", "tail").stdout
    assert run("journal", "tail", "--tenant", "other").stdout == ""


# --- errors and codes


@pytest.mark.parametrize("verb", ["ls", "sweep", "doctor", "scrub", "rebuild", "checkpoint"])
def test_only_what_stores_makes_a_store(run: Run, root: Path, verb: str) -> None:
    root.rmdir()
    result = run(verb)
    assert result.exit_code == 3
    assert result.stdout == ""
    assert not root.exists()
    root.mkdir()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["cat", ABSENT], 3),
        (["cat", "nonsense"], 2),
        (["put", "/etc/hostname", "--retention", "soon"], 2),
        (["put", "/etc/hostname", "--tenant", "../x"], 2),
        (["put", "/nowhere"], 2),
        (["put", "/etc/hostname", "/etc/passwd", "--name", "x"], 2),
        (["uploads", "--cancel"], 2),
        (["no-such-verb"], 2),
    ],
)
def test_every_error_has_its_code(
    run: Run, tmp_path: Path, arguments: list[str], code: int
) -> None:
    stored(run, tmp_path / "a.txt", b"x")
    result = run(*arguments)
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr


def test_with_json_the_error_is_json_too(run: Run, tmp_path: Path) -> None:
    stored(run, tmp_path / "a.txt", b"x")
    result = run("stat", ABSENT, "--json")
    assert json.loads(result.stderr) == {
        "error": "NotFound",
        "message": f"no file {ABSENT!r}",
        "exit_code": 3,
    }


def test_every_error_class_is_in_the_table() -> None:
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    specific = [kind for kind, _, _ in EXITS if kind not in (errors.BlobcaskError, OSError)]
    for kind in classes:
        if kind not in (Path, errors.BlobcaskError):
            assert issubclass(kind, tuple(specific)), kind


def test_help_shows_the_codes_and_every_verb(run: Run) -> None:
    text = CliRunner().invoke(main, ["--help"]).stdout
    for verb in "put get cat ls stat rm hold request-upload uploads sweep collect".split():
        assert f"\n  {verb} " in text
    for verb in "scrub rebuild checkpoint journal doctor serve token".split():
        assert f"\n  {verb} " in text
    assert "no space left" in text


def test_every_verb_takes_the_shared_options() -> None:
    def verbs(command: click.Command) -> list[click.Command]:
        inner = command.commands.values() if isinstance(command, click.Group) else []
        return [command, *(found for one in inner for found in verbs(one))]

    for command in verbs(main):
        options = {name for parameter in command.params for name in parameter.opts}
        assert options >= {"--config", "--root", "--json"}, command.name


def test_settings_come_from_the_file_and_root_from_the_option(
    run: Run, tmp_path: Path, root: Path
) -> None:
    config = tmp_path / "config.ini"
    config.write_text(f"[store]\nroot = {tmp_path / 'elsewhere'}\n[references]\nscheme = cask\n")
    (tmp_path / "a.txt").write_bytes(b"x")
    result = run("put", tmp_path / "a.txt", "--config", config)
    assert result.stdout.startswith("cask://")
    assert (root / "VERSION").exists()
    config.write_text("[store]\nrot = /x\n")
    result = run("ls", "--config", config)
    assert result.exit_code == 2
    assert "rot" in result.stderr


# --- real processes


@pytest.fixture
def run_command(root: Path) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Call a verb as a process of its own, as a shell does."""
    environ = {name: value for name, value in os.environ.items() if "BLOBCASK" not in name}

    def call(
        *arguments: str | Path, stdin: bytes | None = None, **options: Any
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", "cas", *map(str, arguments), "--root", root],
            input=stdin,
            env={**environ, "BLOBCASK_STORE__MIN_FREE": "0B"},
            cwd=CHECKOUT,
            check=False,
            **({"capture_output": True} | options),
        )

    return call


def test_a_reader_that_goes_away_is_no_error(
    run_command: Callable[..., subprocess.CompletedProcess[bytes]], tmp_path: Path
) -> None:
    (tmp_path / "big").write_bytes(bytes(3 << 20))
    reference = run_command("put", tmp_path / "big").stdout.decode().strip()
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run_command(
            "cat", reference, capture_output=False, stdout=writing, stderr=subprocess.PIPE
        )
    finally:
        os.close(writing)
    assert done.returncode == BROKEN_PIPE
    assert done.stderr == b""


def test_an_interrupted_put_ends_quietly_and_leaves_nothing(root: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "cas", "put", "-", "--root", root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "BLOBCASK_STORE__MIN_FREE": "0B"},
        cwd=CHECKOUT,
    )
    assert process.stdin is not None
    # More than a pipe holds, so it is being read when this returns.
    process.stdin.write(bytes(4 << 20))
    process.stdin.flush()
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert process.returncode == 130
    assert stdout == b""
    assert b"Traceback" not in stderr
    assert [path for path in (root / "objects").rglob("*") if path.is_file()] == []


# --- how things look


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1 << 30, "1.0 GiB"),
        (1 << 50, "1024.0 TiB"),
    ],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert size(count) == text


def test_a_table_is_aligned_and_moves_no_cursor() -> None:
    lines = list(table(("A", "B"), [("x\x1b[2J", "1"), ("longer name", "22")]))
    assert lines == ["A            B", "x�[2J        1", "longer name  22"]
