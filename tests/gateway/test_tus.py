"""Resumable uploads over HTTP, verb by verb, and with a foreign tus client."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import socket
import tempfile
import threading
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import falcon
import pytest
from falcon import testing
from tusclient.client import TusClient

from cas.clock import HOUR_US
from cas.config import Settings
from cas.keys import Keys
from cas.signing import Signer
from cas.store import Store
from cas.uploads import UploadRequest
from gateway import errors
from gateway.door import Door
from gateway.links import Links
from gateway.tus import TusPartialResource
from tests.clocks import HandClock
from tests.gateway.served import Answer, Served, serving
from workflows.views import Workflows

TUS = {"Tus-Resumable": "1.0.0"}
PIECE = "application/offset+octet-stream"
DATA = random.Random(1).randbytes(300_000)


def metadata(**values: str) -> str:
    return ",".join(f"{key} {b64encode(text.encode()).decode()}" for key, text in values.items())


def read_metadata(text: str) -> dict[str, str]:
    pairs = (pair.split(" ") for pair in text.split(","))
    return {key: b64decode(coded).decode() for key, coded in pairs}


def token_of(served: Served, **wanted: Any) -> str:
    return str(served.request_upload(**{"max_files": 3, **wanted})["upload_token"])


def post(
    served: Served, token: str, body: bytes = b"", *, length: int | None = len(DATA), **more: Any
) -> Answer:
    """Announce a file; `more` are headers, `_` for `-`."""
    headers = {**TUS, **({} if length is None else {"Upload-Length": str(length)})}
    headers |= {name.replace("_", "-"): value for name, value in more.items()}
    return served.ask("POST", f"/api/v1/uploads/{token}/tus/", body, headers=headers)


def created(served: Served, token: str, length: int = len(DATA), **more: Any) -> str:
    """The URL of a new partial."""
    answer = post(served, token, length=length, **more)
    assert answer.status == 201, answer.body
    return answer.headers["location"]


def patch(served: Served, url: str, offset: int, data: Any, **more: str) -> Answer:
    headers = {**TUS, "Upload-Offset": str(offset), "Content-Type": PIECE}
    headers |= {name.replace("_", "-"): value for name, value in more.items()}
    return served.ask("PATCH", url, data, headers=headers)


def head(served: Served, url: str) -> Answer:
    return served.ask("HEAD", url, headers=TUS)


def offset_of(served: Served, url: str) -> int:
    answer = head(served, url)
    assert answer.status == 200
    return int(answer.headers["upload-offset"])


def info(served: Served, token: str) -> dict[str, Any]:
    return served.ask("GET", f"/api/v1/uploads/{token}/info").form


def raw_patch(served: Served, url: str, offset: int, length: int) -> socket.socket:
    """A connection whose PATCH has its head sent, and no byte of its body."""
    connection = served.connect()
    fields = {**TUS, "Upload-Offset": offset, "Content-Type": PIECE, "Content-Length": length}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    connection.sendall(f"PATCH {urlsplit(url).path} HTTP/1.1\r\nHost: a\r\n{lines}\r\n".encode())
    return connection


# --- OPTIONS


def test_options_tells_what_is_offered(served: Served) -> None:
    token = token_of(served, max_size_mb=1)
    url = f"/api/v1/uploads/{token}/tus/"
    for path in (url, url.rstrip("/"), created(served, token)):
        answer = served.ask("OPTIONS", path)
        assert answer.status == 204
        assert answer.headers["tus-version"] == answer.headers["tus-resumable"] == "1.0.0"
        assert set(answer.headers["tus-extension"].split(",")) == {
            "creation", "creation-with-upload", "expiration", "checksum", "termination",
        }  # fmt: skip
        assert answer.headers["tus-checksum-algorithm"] == "sha256,sha1"
        assert answer.headers["tus-max-size"] == str(1 << 20)
    unlimited = served.ask("OPTIONS", f"/api/v1/uploads/{token_of(served)}/tus/")
    assert "tus-max-size" not in unlimited.headers
    assert served.ask("OPTIONS", "/api/v1/uploads/nobodys1/tus/").code == "not_found"


@pytest.mark.parametrize("version", [None, "0.2.2", "1.0.0, 0.2.2"])
def test_another_version_is_refused_with_ours(served: Served, version: str | None) -> None:
    token = token_of(served)
    url = created(served, token)
    headers = {} if version is None else {"Tus-Resumable": version}
    for method, path in [("POST", f"/api/v1/uploads/{token}/tus/"), ("PATCH", url)]:
        answer = served.ask(method, path, headers={**headers, "Upload-Length": "5"})
        assert (answer.status, answer.code) == (412, "tus_version_unsupported")
        assert answer.headers["tus-version"] == "1.0.0"
    for method in ("HEAD", "DELETE"):
        assert served.ask(method, url, headers=headers).status == 412
    assert len(info(served, token)["partials"]) == 1


# --- POST


def test_a_file_is_announced(served: Served) -> None:
    token = token_of(served)
    answer = post(
        served, token,
        Upload_Metadata=metadata(index="2", filename="Paß – 1.pdf", filetype="application/pdf"),
    )  # fmt: skip
    assert answer.status == 201
    assert answer.headers["tus-resumable"] == "1.0.0"
    assert "upload-offset" not in answer.headers
    assert parsedate_to_datetime(answer.headers["upload-expires"]).tzinfo is not None
    url = answer.headers["location"]
    assert url.startswith(f"{served.address}/api/v1/uploads/{token}/tus/")
    shown = info(served, token)
    assert shown["tus_url"] == f"{served.address}/api/v1/uploads/{token}/tus/"
    [partial] = shown["partials"]
    assert set(partial) == {
        "partial_id", "index", "filename", "size_bytes", "offset_bytes", "expires_at", "tus_url",
    }  # fmt: skip
    assert (partial["index"], partial["filename"]) == (2, "Paß – 1.pdf")
    assert (partial["size_bytes"], partial["offset_bytes"]) == (len(DATA), 0)
    assert partial["tus_url"] == url
    asked = head(served, url)
    assert asked.headers["upload-offset"] == "0"
    assert asked.headers["upload-length"] == str(len(DATA))
    assert asked.headers["cache-control"] == "no-store"
    assert asked.headers["upload-expires"] == answer.headers["upload-expires"]
    assert read_metadata(asked.headers["upload-metadata"]) == {
        "index": "2", "filename": "Paß – 1.pdf", "filetype": "application/pdf",
    }  # fmt: skip


def test_without_metadata_the_first_free_slot_is_taken(served: Served) -> None:
    token = token_of(served)
    for index in range(2):
        url = created(served, token, Upload_Metadata=metadata(filetype="image/png"))
        found = read_metadata(head(served, url).headers["upload-metadata"])
        assert (found["index"], found["filename"]) == (str(index), "file.png")


def test_a_first_piece_may_come_with_the_announcement(served: Served) -> None:
    token = token_of(served)
    answer = post(served, token, DATA[:1000], Content_Type=PIECE)
    assert answer.status == 201
    assert answer.headers["upload-offset"] == "1000"
    assert offset_of(served, answer.headers["location"]) == 1000
    whole = post(served, token, DATA, Content_Type=PIECE)
    assert whole.headers["upload-offset"] == str(len(DATA))
    assert "upload-expires" not in whole.headers
    [file] = info(served, token)["files"]
    assert file["checksum_sha256"] == hashlib.sha256(DATA).hexdigest()


def test_an_empty_file_needs_no_piece(served: Served) -> None:
    token = token_of(served)
    url = created(served, token, 0, Upload_Metadata=metadata(filename="empty.txt"))
    assert offset_of(served, url) == 0
    [file] = info(served, token)["files"]
    assert (file["filename"], file["size_bytes"]) == ("empty.txt", 0)


@pytest.mark.parametrize(
    ("length", "headers", "status", "code"),
    [
        (None, {}, 400, "invalid_request"),
        (None, {"Upload_Length": "-1"}, 400, "invalid_request"),
        (None, {"Upload_Length": "1e3"}, 400, "invalid_request"),
        (None, {"Upload_Length": "9" * 16}, 400, "invalid_request"),
        (None, {"Upload_Defer_Length": "1"}, 400, "invalid_request"),
        (9, {"Upload_Concat": "partial"}, 400, "invalid_request"),
        (9, {"Upload_Metadata": "filename ***"}, 400, "invalid_request"),
        (9, {"Upload_Metadata": "filename /w=="}, 400, "invalid_request"),
        (9, {"Upload_Metadata": "a YQ==,a YQ=="}, 400, "invalid_request"),
        (9, {"Upload_Metadata": metadata(index="x")}, 400, "invalid_request"),
        (9, {"Upload_Metadata": metadata(filename="a/b")}, 400, "invalid_name"),
        (9, {"Upload_Metadata": metadata(index="3")}, 404, "not_found"),
        ((1 << 20) + 1, {}, 413, "too_large"),
    ],
)
def test_what_cannot_be_announced_is_refused(
    served: Served, length: int | None, headers: dict[str, Any], status: int, code: str
) -> None:
    token = token_of(served, max_size_mb=1)
    answer = post(served, token, length=length, **headers)
    assert (answer.status, answer.code) == (status, code)
    assert answer.headers["tus-resumable"] == "1.0.0"
    assert info(served, token)["partials"] == []


def test_a_body_of_another_type_is_no_first_piece(served: Served) -> None:
    answer = post(served, token_of(served), b"{}", Content_Type="application/json")
    assert (answer.status, answer.code) == (415, "unsupported_media_type")


def test_what_the_disk_has_no_room_for_is_refused_at_once(served: Served) -> None:
    answer = post(served, token_of(served), length=10**15 - 1)
    assert (answer.status, answer.code) == (507, "store_full")
    assert answer.form["needed_bytes"] > answer.form["free_bytes"]


def test_a_full_or_closed_upload_takes_no_more(served: Served) -> None:
    token = token_of(served, max_files=1)
    assert post(served, token, DATA, Content_Type=PIECE).status == 201
    answer = post(served, token)
    assert (answer.status, answer.code) == (409, "slots_taken")
    assert served.ask("POST", f"/api/v1/uploads/{token}/complete").status == 200
    answer = post(served, token)
    assert (answer.status, answer.code) == (409, "upload_closed")
    assert answer.form["state"] == "completed"


# --- HEAD


def test_unknown_and_foreign_partials_are_told_alike(served: Served) -> None:
    url = created(served, token_of(served))
    own = token_of(served)
    partial_id = url.rpartition("/")[2]
    unknown = f"{'0' * 8}{partial_id[8:]}"
    asked = [
        f"/api/v1/uploads/{own}/tus/{partial_id}",
        f"/api/v1/uploads/{own}/tus/{unknown}",
        f"/api/v1/uploads/{own}/tus/x",
        f"/api/v1/uploads/nobodys1/tus/{partial_id}",
    ]
    headers = {"Content-Type": PIECE, "Upload-Offset": "0", **TUS}
    for method in ("PATCH", "DELETE"):
        bodies = {served.ask(method, path, headers=headers).body for path in asked}
        assert len(bodies) == 1
        assert json.loads(bodies.pop())["code"] == "not_found"
    for path in asked:
        answer = head(served, path)
        assert answer.status == 404
        assert "upload-offset" not in answer.headers
    assert offset_of(served, url) == 0


# --- PATCH


def test_pieces_fill_the_slot(served: Served) -> None:
    token = token_of(served)
    url = created(served, token, Upload_Metadata=metadata(index="1", filename="a.bin"))
    answer = patch(served, url, 0, DATA[:100_000])
    assert (answer.status, answer.headers["upload-offset"]) == (204, "100000")
    assert "upload-expires" in answer.headers
    assert info(served, token)["partials"][0]["offset_bytes"] == 100_000
    assert patch(served, url, 100_000, b"").headers["upload-offset"] == "100000"
    answer = patch(served, url, 100_000, DATA[100_000:])
    assert (answer.status, answer.headers["upload-offset"]) == (204, str(len(DATA)))
    assert "upload-expires" not in answer.headers
    shown = info(served, token)
    assert shown["partials"] == []
    assert shown["files"][0]["index"] == 1
    assert shown["files"][0]["checksum_sha256"] == hashlib.sha256(DATA).hexdigest()
    assert offset_of(served, url) == len(DATA)
    assert url.rpartition("/")[2] not in served.objects()


def test_a_piece_of_unknown_length_is_taken_too(served: Served) -> None:
    url = created(served, token_of(served))
    pieces = iter([DATA[:1000], DATA[1000:2000]])
    assert patch(served, url, 0, pieces).headers["upload-offset"] == "2000"
    assert patch(served, url, 2000, iter([DATA[2000:], b"more"])).code == "too_large"
    assert patch(served, url, 2000, iter([DATA[2000:]])).headers["upload-offset"] == "300000"


def test_a_wrong_offset_is_told_the_right_one(served: Served) -> None:
    url = created(served, token_of(served))
    patch(served, url, 0, DATA[:10])
    answer = patch(served, url, 9, DATA[9:])
    assert (answer.status, answer.code) == (409, "offset_mismatch")
    assert answer.headers["upload-offset"] == "10"
    assert answer.form["offset_bytes"] == 10
    assert offset_of(served, url) == 10


@pytest.mark.parametrize("kind", ["application/octet-stream", "application/json"])
def test_a_piece_of_another_type_is_refused(served: Served, kind: str) -> None:
    url = created(served, token_of(served))
    answer = patch(served, url, 0, DATA, Content_Type=kind)
    assert (answer.status, answer.code) == (415, "unsupported_media_type")
    assert offset_of(served, url) == 0


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Upload_Offset": ""}, "invalid_request"),
        ({"Upload_Offset": "-1"}, "invalid_request"),
        ({"Upload_Checksum": "md5 abcd"}, "invalid_request"),
        ({"Upload_Checksum": "sha256 abcd"}, "invalid_request"),
        ({"Upload_Checksum": "sha256"}, "invalid_request"),
        ({"Content_Encoding": "gzip"}, "invalid_request"),
    ],
)
def test_a_broken_piece_is_refused(served: Served, headers: dict[str, str], code: str) -> None:
    url = created(served, token_of(served))
    answer = patch(served, url, 0, DATA, **headers)
    assert (answer.status, answer.code) == (400, code)
    assert offset_of(served, url) == 0


def test_more_than_was_announced_is_refused(served: Served) -> None:
    url = created(served, token_of(served), 100)
    answer = patch(served, url, 0, DATA[:101])
    assert (answer.status, answer.code) == (413, "too_large")
    assert offset_of(served, url) == 0


@pytest.mark.parametrize("algorithm", ["sha256", "sha1"])
def test_a_piece_that_is_not_what_was_promised_is_thrown_away(
    served: Served, algorithm: str
) -> None:
    url = created(served, token_of(served))
    digest = hashlib.new(algorithm, DATA[:1000]).digest()
    promise = f"{algorithm} {b64encode(digest).decode()}"
    assert patch(served, url, 0, DATA[:1000], Upload_Checksum=promise).status == 204
    answer = patch(served, url, 1000, DATA[1000:], Upload_Checksum=promise)
    assert (answer.status, answer.code) == (460, "checksum_mismatch")
    assert offset_of(served, url) == 1000


def test_what_came_before_the_connection_broke_is_kept(served: Served) -> None:
    url = created(served, token_of(served))
    token = url.split("/")[-3]
    with raw_patch(served, url, 0, len(DATA)) as connection:
        connection.sendall(DATA[:70_000])
    wait_for(lambda: info(served, token)["partials"][0]["offset_bytes"] == 70_000)
    assert offset_of(served, url) == 70_000
    assert patch(served, url, 70_000, DATA[70_000:]).status == 204


def test_who_lost_the_last_answer_hears_that_all_is_there(served: Served) -> None:
    token = token_of(served)
    url = created(served, token)
    with raw_patch(served, url, 0, len(DATA)) as connection:
        connection.sendall(DATA)
    wait_for(lambda: not info(served, token)["partials"])
    assert offset_of(served, url) == len(DATA)
    assert patch(served, url, len(DATA), b"").status == 204
    assert served.ask("POST", f"/api/v1/uploads/{token}/complete").status == 200
    assert offset_of(served, url) == len(DATA)


def test_a_sender_that_fell_silent_does_not_keep_its_successor_waiting(served: Served) -> None:
    url = created(served, token_of(served))
    silent = raw_patch(served, url, 0, len(DATA))
    silent.sendall(DATA[:5000])
    wait_for(lambda: url.rpartition("/")[2] in served.objects())
    # That connection stays open, as one whose client lost its network; the server that gives
    # it up by itself, after 30 s, tells it another reason than below.
    answer = patch(served, url, offset := offset_of(served, url), DATA[offset:])
    while answer.status == 409:  # what a client does: ask again, go on from there
        answer = patch(served, url, offset := offset_of(served, url), DATA[offset:])
    assert answer.headers["upload-offset"] == str(len(DATA))
    told = silent.makefile("rb").read()
    assert b"400 Bad Request" in told
    assert b"partial_taken" in told
    silent.close()


def test_senders_that_know_no_patch_override_the_method(served: Served) -> None:
    token = token_of(served)
    url = created(served, token)
    headers = {**TUS, "Upload-Offset": "0", "Content-Type": PIECE}
    answer = served.ask(
        "POST", url, DATA[:9], headers={**headers, "X-HTTP-Method-Override": "PATCH"}
    )
    assert (answer.status, answer.headers["upload-offset"]) == (204, "9")
    answer = served.ask("POST", url, headers={**TUS, "X-HTTP-Method-Override": "DELETE"})
    assert answer.status == 204
    assert info(served, token)["partials"] == []
    assert served.ask("POST", url, headers=TUS).status == 405


# --- DELETE


def test_giving_up_removes_the_bytes(served: Served) -> None:
    token = token_of(served)
    url = created(served, token)
    patch(served, url, 0, DATA[:1000])
    assert url.rpartition("/")[2] in served.objects()
    assert served.ask("DELETE", url, headers=TUS).status == 204
    assert url.rpartition("/")[2] not in served.objects()
    for answer in (head(served, url), patch(served, url, 1000, b""), head(served, url)):
        assert answer.status == 404
    finished = post(served, token, DATA, Content_Type=PIECE).headers["location"]
    assert served.ask("DELETE", finished, headers=TUS).status == 204
    assert info(served, token)["files"] == []


def test_completing_ends_what_is_unfinished(served: Served) -> None:
    token = token_of(served)
    whole = created(served, token, 3)
    patch(served, whole, 0, b"abc")
    part = created(served, token)
    patch(served, part, 0, DATA[:1000])
    done = served.ask("POST", f"/api/v1/uploads/{token}/complete")
    assert [file["size_bytes"] for file in done.form["files"]] == [3]
    assert patch(served, part, 1000, DATA[1000:]).code == "not_found"
    assert part.rpartition("/")[2] not in served.objects()
    assert offset_of(served, whole) == 3
    assert served.ask("DELETE", whole, headers=TUS).code == "upload_closed"


# --- time


def test_one_that_waited_too_long_is_gone(memory: Path, clock: HandClock) -> None:
    settings = Settings()
    with Store.open(memory / "store", settings, clock=clock) as store:
        upload = store.uploads("acme", "ada").request(
            UploadRequest("papers", expires_in_s=90 * 24 * 3600)
        )
        begun = store.upload_link(upload.upload_token).begin_partial(0, "a", None, 9)
        links = Links(Signer((b"k" * 32,)), clock.now_us, settings.gateway)
        app: falcon.App[Any, Any] = falcon.App(middleware=[errors.RequestIds()])
        errors.install(app, lambda: None)
        workflows = Workflows(store, Keys((b"k" * 32,), b"", b"", (), ()))
        door = Door(store, workflows, links)
        app.add_route("/{token}/{partial_id}", TusPartialResource(door, links))
        client = testing.TestClient(app)
        url = f"/{upload.upload_token}/{begun.partial_id}"
        assert client.simulate_head(url, headers=TUS).status_code == 200
        clock.advance(24 * HOUR_US)
        assert client.simulate_head(url, headers=TUS).status_code == 410
        headers = {**TUS, "Content-Type": PIECE, "Upload-Offset": "0"}
        answer = client.simulate_patch(url, body=b"x", headers=headers)
        assert (answer.status_code, answer.json["code"]) == (410, "partial_expired")


# --- a foreign client


def test_tuspy_sends_a_file_in_pieces(served: Served) -> None:
    token = token_of(served)
    client = TusClient(f"{served.address}/api/v1/uploads/{token}/tus/")
    uploader = client.uploader(
        file_stream=io.BytesIO(DATA),
        chunk_size=70_000,
        metadata={"filename": "tuspy.bin"},
        upload_checksum=True,
    )
    uploader.upload()
    [file] = info(served, token)["files"]
    assert file["filename"] == "tuspy.bin"
    assert file["checksum_sha256"] == hashlib.sha256(DATA).hexdigest()
    again = client.uploader(file_stream=io.BytesIO(DATA), url=uploader.url)
    assert again.offset == len(DATA)
    again.upload()


def test_tuspy_retries_after_it_lost_the_last_answer(served: Served) -> None:
    token = token_of(served)
    with losing_the_first_answer(served, "PATCH") as address:
        client = TusClient(f"{served.address}/api/v1/uploads/{token}/tus/")
        uploader = client.uploader(file_stream=io.BytesIO(DATA), retries=3, retry_delay=0)
        uploader.set_url(uploader.create_url().replace(served.address, address))
        uploader.upload()
    assert uploader.offset == len(DATA)
    [file] = info(served, token)["files"]
    assert file["checksum_sha256"] == hashlib.sha256(DATA).hexdigest()


@contextmanager
def losing_the_first_answer(served: Served, method: str) -> Iterator[str]:
    """The address of a proxy that breaks the connection instead of giving the first answer
    to `method`, once the server has given it."""
    listener = socket.create_server(("127.0.0.1", 0))
    lost: list[bool] = []

    def carry(client: socket.socket) -> None:
        with client, served.connect() as server:
            head = client.recv(65536, socket.MSG_PEEK)
            lose = head.startswith(method.encode()) and not lost
            feeding = threading.Thread(target=feed, args=(client, server))
            feeding.start()
            while data := server.recv(65536):
                if lose:
                    lost.append(True)
                    client.shutdown(socket.SHUT_RDWR)
                    break
                client.sendall(data)
            else:
                client.shutdown(socket.SHUT_WR)
            feeding.join()

    def feed(client: socket.socket, server: socket.socket) -> None:
        while data := client.recv(65536):
            server.sendall(data)

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=carry, args=(client,), daemon=True).start()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
    assert lost


def kill(served: Served) -> None:
    """kill -9 of the server and all its processes, at this moment."""
    for pid in (served.process.pid, *served.workers()):
        os.kill(pid, signal.SIGKILL)
    served.process.wait()


@pytest.mark.slow
def test_a_large_file_survives_kill_9_of_the_server(disk_folder: Path) -> None:
    data = random.Random(9).randbytes(128 << 20)
    with tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder:
        root = Path(folder)
        with serving(root) as served:
            token = token_of(served, max_files=1)
            admin = served.admin
            client = TusClient(f"{served.address}/api/v1/uploads/{token}/tus/")
            uploader = client.uploader(
                file_stream=io.BytesIO(data),
                chunk_size=16 << 20,
                metadata={"filename": "large.bin"},
            )
            uploader.upload(stop_at=32 << 20)
            # The next piece is cut in its middle: 72 MiB of it are on their way.
            url = str(uploader.url)
            with raw_patch(served, url, 32 << 20, 96 << 20) as connection:
                connection.sendall(data[32 << 20 : 104 << 20])
                wait_for(lambda: info(served, token)["partials"][0]["offset_bytes"] > 32 << 20)
                kill(served)
        with serving(root) as served:
            url = served.address + urlsplit(url).path
            resumed = TusClient(served.address).uploader(
                file_stream=io.BytesIO(data), url=url, chunk_size=32 << 20
            )
            assert 96 << 20 <= resumed.offset <= 104 << 20
            resumed.upload()
            done = served.ask("POST", f"/api/v1/uploads/{token}/complete")
            assert done.status == 200
            [file] = done.form["files"]
            assert file["checksum_sha256"] == hashlib.sha256(data).hexdigest()
            reference = file["storage_ref"].partition("://")[2]
            stored = served.ask("GET", f"/api/v1/storage/{reference}", token=admin)
            assert hashlib.sha256(stored.body).digest() == hashlib.sha256(data).digest()
            assert served.objects() == {file["checksum_sha256"]}


def wait_for(condition: Callable[[], bool]) -> None:
    """Ask until it is so; each question is a request, and the test's time limit ends it."""
    while not condition():
        pass
