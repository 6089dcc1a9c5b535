"""A remote store against a real server: the same verbs, values and errors as an embedded one."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from cas import errors
from cas.cli import main
from cas.digest import digest_of
from cas.files import PutItem
from cas.once import step_key
from cas.records import CANCELLED, PENDING
from cas.references import parse_reference
from cas.remote import RemoteStore
from cas.remote.uploads import RESUMABLE_BYTES
from cas.remote.wire import raise_problem
from cas.retention import parse_retention
from cas.uploads import UploadRequest
from gateway.errors import code_of
from tests.gateway.served import Served, serving, until


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("remote")) as server:
        yield server


@pytest.fixture
def store(served: Served) -> Iterator[RemoteStore]:
    with RemoteStore(served.address, served.admin, patience_s=5) as opened:
        yield opened


class Cut(socketserver.ThreadingTCPServer):
    """A network that fails: passes so many bytes each way, then breaks the connection.

    `budgets` holds the bytes each of the next connections may send; later ones are whole.
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port: int, budgets: list[int], *, answers: bool = False) -> None:
        self.port = port
        self.budgets = budgets
        self.answers = answers  # whether it is the server's bytes that are counted
        self.connections = 0
        super().__init__(("127.0.0.1", 0), _Pipe)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Pipe(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Cut)
        budget = self.server.budgets.pop(0) if self.server.budgets else None
        self.server.connections += 1
        with socket.create_connection(("127.0.0.1", self.server.port)) as upstream:
            sides: list[tuple[socket.socket, socket.socket]] = [
                (self.request, upstream),
                (upstream, self.request),
            ]
            counted, free = sides[:: -1 if self.server.answers else 1]
            other = threading.Thread(target=lambda: _pump(*free, None), daemon=True)
            other.start()
            _pump(*counted, budget)
            for end in (self.request, upstream):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            other.join()


def _pump(source: socket.socket, sink: socket.socket, budget: int | None) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            if budget is not None:
                data = data[:budget]
                budget -= len(data)
            sink.sendall(data)
            if budget == 0:
                return


@contextmanager
def broken(server: Served, budgets: list[int], *, answers: bool = False) -> Iterator[Cut]:
    with Cut(server.port, budgets, answers=answers) as cut:
        thread = threading.Thread(target=cut.serve_forever, daemon=True)
        thread.start()
        yield cut
        cut.shutdown()
        thread.join()


# --- files


def test_what_is_put_comes_back_with_its_record(store: RemoteStore, tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_bytes(b"some words")
    files = store.files()
    put = files.put(path, name="note", run="r1", filename="note.txt", content_type="text/plain")
    assert put.checksum_sha256 == digest_of(b"some words")
    reference = parse_reference(put.storage_ref)
    assert files.stat(reference) == put
    found, source = files.reader(reference)
    with source:
        assert (found, source.read()) == (put, b"some words")
    assert [file.file_id for file in files.list(run="r1").items] == [put.file_id]


def test_the_same_bytes_are_the_same_file_with_the_longer_retention(store: RemoteStore) -> None:
    files = store.files()
    one = files.put(b"twice", name="a", retention=parse_retention("days:1"))
    two = files.put(io.BytesIO(b"twice"), name="b", retention=parse_retention("forever"))
    assert (one.file_id, two.expires_at) == (two.file_id, None)


def test_a_stream_of_unknown_length_is_stored(store: RemoteStore) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"piped")
    os.close(writing)
    with io.FileIO(reading) as pipe:
        file = store.files().put(pipe, name="pipe")
    assert (file.size_bytes, file.checksum_sha256) == (5, digest_of(b"piped"))


def test_many_files_come_in_the_order_of_the_items(store: RemoteStore) -> None:
    items = [PutItem(bytes([number]) * 10, f"n{number}") for number in range(40)]
    stored = store.files().put_many(items, run="many")
    assert [file.name for file in stored] == [item.name for item in items]
    first = store.files().list(run="many", limit=30)
    rest = store.files().list(run="many", limit=30, cursor=first.next_cursor)
    assert len(first.items) + len(rest.items) == 40
    assert rest.next_cursor is None


def test_progress_ends_at_the_size(store: RemoteStore) -> None:
    told: list[tuple[int, int | None]] = []
    data = os.urandom(600_000)
    store.files().put(data, name="big", progress=lambda done, of: told.append((done, of)))
    assert told[-1] == (600_000, 600_000)
    assert told == sorted(told)


def test_a_hold_keeps_a_file_from_deletion(store: RemoteStore) -> None:
    files = store.files()
    reference = parse_reference(files.put(b"kept", name="k").storage_ref)
    assert files.hold(reference, True).hold
    with pytest.raises(errors.Held):
        files.delete(reference)
    files.hold(reference, False)
    files.delete(reference)
    with pytest.raises(errors.NotFound):
        files.stat(reference)


def test_a_signed_url_needs_no_token(store: RemoteStore, served: Served) -> None:
    file = store.files().put(b"signed", name="s")
    url = store.files().url(parse_reference(file.storage_ref), 60)
    assert served.ask("GET", url).body == b"signed"


# --- errors are those of an embedded store


def test_another_tenant_is_not_found(store: RemoteStore, served: Served) -> None:
    reference = parse_reference(store.files().put(b"mine", name="m").storage_ref)
    with RemoteStore(served.address, served.token("admin", tenant="other")) as other:
        assert other.tenant_id == "other"
        with pytest.raises(errors.NotFound):
            other.files().stat(reference)
        with pytest.raises(errors.NotFound):
            other.files("default")


@pytest.mark.parametrize("token", ["", "nonsense", "a.b.c"])
def test_a_bad_token_is_denied(served: Served, token: str) -> None:
    with RemoteStore(served.address, token) as store, pytest.raises(errors.AccessDenied):
        store.files().list()


def test_a_missing_permission_is_denied(served: Served) -> None:
    with (
        RemoteStore(served.address, served.token("view_storage")) as store,
        pytest.raises(errors.AccessDenied, match="manage_storage"),
    ):
        store.files().put(b"x", name="x")


def test_bad_names_are_refused_by_the_server(store: RemoteStore) -> None:
    with pytest.raises(errors.InvalidName):
        store.files().put(b"x", name="a\nb")


def test_no_server_is_unreachable_after_the_patience() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with (
            RemoteStore(address, patience_s=0.5) as store,
            pytest.raises(errors.ServerUnreachable),
        ):
            store.files().list()


@contextmanager
def answering(status: int, headers: dict[str, str], body: bytes) -> Iterator[tuple[str, list[str]]]:
    """A server that gives one answer to everything; the paths it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def test_a_redirect_is_not_followed() -> None:
    with (
        answering(302, {"Location": "http://elsewhere.example/"}, b"") as (address, asked),
        RemoteStore(address, "secret") as store,
        pytest.raises(errors.ServerRefused, match="redirects"),
    ):
        store.files().list()
    assert len(asked) == 1


def test_what_is_not_a_blobcask_server_is_named() -> None:
    with (
        answering(200, {}, b"<html>") as (address, _),
        RemoteStore(address) as store,
        pytest.raises(errors.ServerUnreachable, match="not a blobcask server"),
    ):
        store.files().list()


def test_what_has_no_room_for_long_is_not_asked_for_again() -> None:
    problem = {"status": "error", "code": "TOO_MANY_HELD", "message": "full", "limit_bytes": 7}
    request = httpx.Request("POST", "https://files.example.org/api/v1/events/acme")
    with pytest.raises(errors.TooManyHeld) as refused:
        raise_problem(httpx.Response(429, json=problem, request=request))
    assert refused.value.limit_bytes == 7


@pytest.mark.parametrize(
    "raised",
    [errors.TooManyRuns(2, 2), errors.TooManyApprovals(3, 3), errors.TooManyMails(9, 7, 5)],
)
def test_a_limit_of_the_tenants_is_told_as_it_is_here(raised: errors.BlobcaskError) -> None:
    problem = {"status": "error", "code": code_of(raised).upper(), "message": "full"}
    request = httpx.Request("POST", "https://files.example.org/api/v1/workflows")
    with pytest.raises(type(raised)) as refused:
        raise_problem(httpx.Response(429, json={**problem, **vars(raised)}, request=request))
    assert vars(refused.value) == vars(raised)


def test_an_overloaded_server_is_asked_again_as_late_as_it_wishes() -> None:
    body = b'{"code": "too_many_requests", "detail": "later"}'
    with (
        answering(429, {"Retry-After": "3"}, body) as (address, asked),
        RemoteStore(address, patience_s=1) as store,
        pytest.raises(errors.ServerUnreachable, match="429"),
    ):
        store.files().list()
    assert len(asked) == 1, "its three seconds are beyond the patience of one"


@contextmanager
def refusing_once(status: int) -> Iterator[tuple[str, list[int]]]:
    """A server that reads a body and refuses it, once; how long the bodies were it was sent."""
    lengths: list[int] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = 0
            while size := int(self.rfile.readline(), 16):
                length += len(self.rfile.read(size + 2)) - 2
            self.rfile.readline()
            lengths.append(length)
            body = b'{"code": "too_many_requests", "detail": "later"}'
            self.send_response(status if len(lengths) == 1 else 500)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", lengths
        server.shutdown()
        thread.join()


def test_a_stream_that_is_spent_is_never_sent_as_an_empty_file() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"only once")
    os.close(writing)
    with (
        refusing_once(429) as (address, lengths),
        RemoteStore(address, patience_s=5) as store,
        io.FileIO(reading) as pipe,
        pytest.raises(errors.BlobcaskError, match="none left"),
    ):
        store.files().put(pipe, name="pipe")
    assert lengths == [9]


def test_a_file_that_changed_between_two_attempts_is_not_left_in_its_slot(
    store: RemoteStore, served: Served
) -> None:
    upload = store.uploads().request(UploadRequest("mixed"))
    old, new = os.urandom(RESUMABLE_BYTES + 10), os.urandom(RESUMABLE_BYTES + 10)
    link = store.upload_link(upload.upload_token)
    with (
        broken(served, [40_000_000, 0, 0, 0, 0, 0]) as cut,
        RemoteStore(cut.address, served.admin, patience_s=0.5) as first,
        pytest.raises(errors.ServerUnreachable),
    ):
        first.upload_link(upload.upload_token).put(0, old, filename="x.bin")
    # The server notes what came when it has seen the end of the connection.
    until(lambda: link.info()["partials"][0]["offset_bytes"] > 0)
    with pytest.raises(errors.DigestMismatch):
        link.put(0, new, filename="x.bin")
    assert link.slots() == []


# --- lost connections


def test_a_request_whose_answer_was_lost_makes_no_second_link(
    served: Served, store: RemoteStore
) -> None:
    with (
        broken(served, [40], answers=True) as cut,
        RemoteStore(cut.address, served.admin) as shaky,
    ):
        upload = shaky.uploads().request(UploadRequest("asked for once"))
        assert cut.connections > 1
    uploads = [one for one in store.uploads().list().items if one.name == "asked for once"]
    assert [one.upload_id for one in uploads] == [upload.upload_id]


def test_a_key_is_good_for_one_upload(store: RemoteStore) -> None:
    key = step_key("r1", "collect – " + "x" * 300, "upload")
    first, again = (store.uploads().request(UploadRequest("keyed"), key) for _ in range(2))
    assert first == again
    with pytest.raises(errors.KeyReused):
        store.uploads().request(UploadRequest("another"), key)


def test_a_cut_body_is_sent_again(served: Served) -> None:
    data = os.urandom(2 << 20)
    with (
        broken(served, [300_000, 900_000]) as cut,
        RemoteStore(cut.address, served.admin) as store,
    ):
        file = store.files().put(data, name="cut")
    assert file.checksum_sha256 == digest_of(data)


def test_a_cut_download_goes_on_where_it_was(served: Served, store: RemoteStore) -> None:
    data = os.urandom(3 << 20)
    reference = parse_reference(store.files().put(data, name="down").storage_ref)
    with (
        broken(served, [1_500_000, 1_000_000], answers=True) as cut,
        RemoteStore(cut.address, served.admin) as remote,
    ):
        _, source = remote.files().reader(reference)
        with source:
            assert hashlib.sha256(source.read()).digest() == digest_of(data)
    assert cut.connections == 3


def test_a_large_file_goes_on_after_a_cut_and_is_not_sent_twice(served: Served) -> None:
    data = os.urandom(RESUMABLE_BYTES + 12345)
    told: list[int] = []
    with (
        broken(served, [40_000_000]) as cut,
        RemoteStore(cut.address, served.admin) as store,
    ):
        file = store.files().put(
            data, name="large", filename="large.bin", progress=lambda done, _: told.append(done)
        )
    assert (file.checksum_sha256, file.original_filename) == (digest_of(data), "large.bin")
    assert told[-1] == len(data)


# --- uploads


def test_an_upload_is_asked_for_filled_and_completed(store: RemoteStore) -> None:
    uploads = store.uploads()
    upload = uploads.request(UploadRequest("papers", allowed_types=["txt"], max_files=3))
    assert upload.status == PENDING
    link = store.upload_link(upload.upload_token)
    slot = link.put(1, b"words", filename="w.txt", content_type="text/plain")
    assert link.slots() == [slot]
    link.put(0, b"more", filename="x.txt")
    link.empty(0)
    done = link.complete()
    assert [file["filename"] for file in done["files"]] == ["w.txt"]
    assert link.complete() == done, "a lost answer can be asked for again"
    assert uploads.get(upload.upload_token).upload.status == "completed"
    assert upload.upload_token in [one.upload_token for one in uploads.list().items]


def test_a_closed_upload_says_how_it_ended(store: RemoteStore) -> None:
    upload = store.uploads().request(UploadRequest("x"))
    assert store.uploads().cancel(upload.upload_token).status == CANCELLED
    with pytest.raises(errors.UploadClosed, match=CANCELLED):
        store.upload_link(upload.upload_token).put(0, b"late", filename="late.txt")


def test_refused_files_are_listed_with_their_reasons(store: RemoteStore) -> None:
    upload = store.uploads().request(UploadRequest("pdf", allowed_types=["pdf"]))
    link = store.upload_link(upload.upload_token)
    link.put(0, b"no pdf at all", filename="fake.pdf")
    with pytest.raises(errors.FilesRefused) as refused:
        link.complete()
    [(index, filename, _)] = refused.value.reasons
    assert (index, filename) == (0, "fake.pdf")


# --- one command line for both


def run(served: Served, *arguments: str | Path) -> Any:
    texts = [*map(str, arguments), "--server", served.address]
    environ = {"BLOBCASK_TOKEN": served.admin}
    return CliRunner().invoke(main, texts, env=environ, prog_name="blobcask")


def test_the_command_line_serves_a_server_as_it_serves_a_root(
    served: Served, tmp_path: Path
) -> None:
    path = tmp_path / "cli.txt"
    path.write_bytes(b"from afar")
    put = run(served, "put", path, "--run", "cli")
    assert put.exit_code == 0, put.output
    reference = put.stdout.strip()
    assert run(served, "cat", reference).stdout_bytes == b"from afar"
    copy = tmp_path / "copy"
    assert run(served, "get", reference, "-o", copy).exit_code == 0
    assert copy.read_bytes() == b"from afar"
    [file] = json.loads(run(served, "ls", "--run", "cli", "--json").stdout)["files"]
    assert json.loads(run(served, "stat", reference, "--json").stdout) == file
    url = run(served, "url", reference)
    assert served.ask("GET", url.stdout.strip()).body == b"from afar"
    assert run(served, "hold", reference).exit_code == 0
    assert run(served, "rm", reference).exit_code == 5
    assert run(served, "hold", reference, "--off").exit_code == 0
    assert run(served, "rm", reference).exit_code == 0
    assert run(served, "stat", reference).exit_code == 3


def test_upload_links_are_made_and_cancelled_from_afar(served: Served) -> None:
    asked = run(served, "request-upload", "photos", "--type", "jpg")
    link = asked.stdout.strip()
    assert link.startswith(f"{served.address}/u/")
    token = link.rpartition("/")[2]
    assert token in run(served, "uploads").stdout
    assert run(served, "uploads", token, "--cancel").exit_code == 0


def test_upkeep_is_not_done_from_afar(served: Served) -> None:
    result = run(served, "sweep")
    assert result.exit_code == 2
    assert "--server" in result.output
