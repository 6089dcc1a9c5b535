"""`deploy/nginx.conf` in a real nginx, with a real server behind it."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, final
from urllib.parse import quote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tests.conftest import CHECKOUT
from tests.gateway.served import ANSWER_S, Answer, Served, held_port, serving, until

DATA = bytes(range(256)) * 4000
START_S = 60.0


@final
@dataclass(frozen=True)
class Front:
    """nginx before a server."""

    served: Served
    port: int
    plain_port: int
    trust: ssl.SSLContext
    folder: Path

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        sent = dict(headers or {})
        if token is not None:
            sent["Authorization"] = f"Bearer {token}"
        connection = http.client.HTTPSConnection(
            "localhost", self.port, context=self.trust, timeout=ANSWER_S
        )
        try:
            base = f"https://localhost:{self.port}"
            connection.request(method, path.removeprefix(base), body, sent)
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, response.read())
        finally:
            connection.close()


def certificate(folder: Path) -> None:
    """A key and a certificate of localhost that signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate.pem").write_bytes(made.public_bytes(Encoding.PEM))
    written = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "key.pem").write_bytes(written)


def configured(front: Path, root: Path, gateway: int, tls: int, plain: int) -> str:
    """The file that is shipped, with nothing but its names and places changed."""
    text = (CHECKOUT / "deploy" / "nginx.conf").read_text()
    for shipped, here in (
        ("127.0.0.1:8080", f"127.0.0.1:{gateway}"),
        ("listen 80;", f"listen 127.0.0.1:{plain};"),
        ("listen 443 ssl;", f"listen 127.0.0.1:{tls} ssl;"),
        ("files.example.org;\n    ssl", "localhost;\n    ssl"),
        ("/etc/ssl/certs/files.example.org.pem", f"{front}/certificate.pem"),
        ("/etc/ssl/private/files.example.org.key", f"{front}/key.pem"),
        ("/var/log/nginx/blobcask.log", f"{front}/access.log"),
        ("/var/log/nginx/blobcask-error.log", f"{front}/server-error.log"),
        ("alias /var/lib/blobcask/objects/;", f"alias {root}/objects/;"),
    ):
        assert shipped in text, f"{shipped} is not in the file any more"
        text = text.replace(shipped, here)
    user = "user root;" if os.geteuid() == 0 else ""
    return f"""
        daemon off; {user} worker_processes 1; pid {front}/nginx.pid;
        events {{ worker_connections 256; }}
        http {{
            default_type application/octet-stream;
            client_body_temp_path {front}/body; proxy_temp_path {front}/proxy;
            fastcgi_temp_path {front}/fastcgi; uwsgi_temp_path {front}/uwsgi;
            scgi_temp_path {front}/scgi;
            {text}
        }}
    """


@contextmanager
def nginx(program: str, folder: Path, text: str, port: int) -> Iterator[None]:
    (folder / "nginx.conf").write_text(text)
    command = [program, "-e", f"{folder}/error.log", "-c", f"{folder}/nginx.conf"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=START_S).close()
                break
            except ConnectionRefusedError:
                assert process.stderr is not None
                ended = process.poll() is not None
                assert not ended, process.stderr.read() + (folder / "error.log").read_text()
                assert time.monotonic() < deadline
        yield
    finally:
        process.send_signal(signal.SIGQUIT)
        process.communicate(timeout=START_S)


@pytest.fixture(scope="module")
def front(disk_folder: Path, program: Callable[[str], str]) -> Iterator[Front]:
    with (
        held_port() as tls,
        held_port() as plain,
        tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as root_name,
        tempfile.TemporaryDirectory(prefix="nginx-", dir=disk_folder) as folder_name,
        serving(
            Path(root_name),
            GATEWAY__ACCEL_REDIRECT="/blobs/",
            GATEWAY__TRUSTED_PROXIES="127.0.0.1",
            GATEWAY__PUBLIC_URL=f"https://localhost:{tls}",
        ) as served,
    ):
        folder = Path(folder_name)
        certificate(folder)
        text = configured(folder, Path(root_name), served.port, tls, plain)
        trust = ssl.create_default_context(cafile=str(folder / "certificate.pem"))
        with nginx(program("nginx"), folder, text, tls):
            yield Front(served, tls, plain, trust, folder)


@pytest.fixture(scope="module")
def file(front: Front) -> dict[str, Any]:
    url = f"/api/v1/storage?name=bytes&filename={quote('Bericht „x“.svg')}"
    headers = {"Content-Type": "image/svg+xml"}
    stored = front.ask("POST", url, DATA, token=front.served.admin, headers=headers)
    assert stored.status == 201
    return stored.form


@pytest.fixture(scope="module")
def url(front: Front, file: dict[str, Any]) -> str:
    ref = quote(file["storage_ref"], safe="")
    answer = front.ask("GET", f"/api/v1/storage/{ref}/url", token=front.served.admin)
    assert answer.status == 200
    made = str(answer.form["url"])
    assert made.startswith(f"https://localhost:{front.port}/d/")
    return made


def test_a_large_body_streams_through_without_being_spooled(front: Front) -> None:
    data = os.urandom(3 << 20)
    sent = front.ask("POST", "/api/v1/storage?name=large", data, token=front.served.admin)
    assert sent.status == 201
    assert sent.form["checksum_sha256"] == hashlib.sha256(data).hexdigest()
    assert list((front.folder / "body").iterdir()) == []
    assert list((front.folder / "proxy").iterdir()) == []


def test_an_upload_link_and_its_slots_work_through_it(front: Front) -> None:
    wanted = json.dumps({"name": "documents", "max_files": 1})
    made = front.ask("POST", "/api/v1/uploads", wanted.encode(), token=front.served.admin)
    assert made.status == 201
    token = made.form["upload_token"]
    assert front.ask("GET", f"/u/{token}").status == 200
    info = front.ask("GET", f"/api/v1/uploads/{token}/info").form
    slot = info["presigned_urls"][0]
    assert front.ask("PUT", f"{slot}&filename=a.txt", b"hello").status == 200
    assert front.ask("POST", f"/api/v1/uploads/{token}/complete").status == 200


def test_nginx_sends_the_bytes_with_all_that_makes_them_harmless(
    front: Front, file: dict[str, Any], url: str
) -> None:
    got = front.ask("GET", url)
    digest = hashlib.sha256(DATA)
    assert (got.status, got.body) == (200, DATA)
    headers = got.headers
    assert headers["server"].startswith("nginx")
    assert headers["content-type"] == "image/svg+xml"
    assert headers["content-disposition"].startswith("attachment; filename=")
    assert "filename*=UTF-8''Bericht%20%E2%80%9Ex%E2%80%9C.svg" in headers["content-disposition"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"] == "sandbox; default-src 'none'"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "private, no-cache"
    assert headers["etag"] == f'"{digest.hexdigest()}"'
    assert headers["repr-digest"].startswith("sha-256=:")
    assert headers["x-request-id"]
    assert "x-accel-redirect" not in headers


def test_the_time_of_the_bytes_is_not_told(front: Front, url: str) -> None:
    """It would say when the same bytes came first, whoever brought them (invariant 9)."""
    headers = {"If-Modified-Since": "Fri, 01 Jan 2100 00:00:00 GMT"}
    for got in (
        front.ask("GET", url),
        front.ask("HEAD", url),
        front.ask("GET", url, None, headers=headers),
    ):
        assert got.status == 200
        assert "last-modified" not in got.headers


def test_a_head_has_the_headers_and_no_bytes(front: Front, url: str) -> None:
    got = front.ask("HEAD", url)
    assert (got.status, got.body) == (200, b"")
    assert got.headers["content-length"] == str(len(DATA))
    assert got.headers["etag"]


def test_ranges_and_conditions_hold(front: Front, url: str) -> None:
    tag = front.ask("HEAD", url).headers["etag"]
    part = front.ask("GET", url, headers={"Range": "bytes=100-199"})
    assert (part.status, part.body) == (206, DATA[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(DATA)}"
    assert part.headers["etag"] == tag
    tail = front.ask("GET", url, headers={"Range": "bytes=-5", "If-Range": tag})
    assert (tail.status, tail.body) == (206, DATA[-5:])
    stale = front.ask("GET", url, headers={"Range": "bytes=-5", "If-Range": '"other"'})
    assert (stale.status, stale.body) == (200, DATA)
    beyond = front.ask("GET", url, headers={"Range": "bytes=99999999-"})
    assert beyond.status == 416
    assert front.ask("GET", url, headers={"If-None-Match": tag}).status == 304
    assert front.ask("GET", url, headers={"If-None-Match": '"other"'}).body == DATA
    assert front.ask("GET", url, headers={"If-Match": tag}).body == DATA
    assert front.ask("GET", url, headers={"If-Match": '"other"'}).status == 412


@pytest.mark.parametrize(
    "write",
    [
        lambda ref: quote(ref, safe=""),
        lambda ref: ref,
        lambda ref: ref.replace("://", ":/"),
        lambda ref: ref.partition("://")[2],
    ],
    ids=["encoded", "plain", "merged", "short"],
)
def test_a_reference_gets_through_however_it_is_written(
    front: Front, file: dict[str, Any], write: Callable[[str], str]
) -> None:
    path = f"/api/v1/storage/{write(file['storage_ref'])}"
    assert front.ask("GET", path, token=front.served.admin).body == DATA
    stat = front.ask("GET", f"{path}/stat", token=front.served.admin)
    assert stat.form["file_id"] == file["file_id"]


def test_missing_bytes_are_the_servers_fault(front: Front) -> None:
    data = os.urandom(100)
    stored = front.ask("POST", "/api/v1/storage?name=lost", data, token=front.served.admin).form
    digest = stored["checksum_sha256"]
    (front.served.root / "objects" / digest[:2] / digest).unlink()
    path = f"/api/v1/storage/{quote(stored['storage_ref'], safe='')}"
    got = front.ask("GET", path, token=front.served.admin)
    assert got.status == 503
    assert got.code == "blob_unavailable"


def test_what_is_internal_stays_inside(front: Front, file: dict[str, Any]) -> None:
    digest = file["checksum_sha256"]
    assert front.ask("GET", f"/blobs/{digest[:2]}/{digest}").status == 404
    assert front.ask("GET", "/metrics").status == 404
    assert front.ask("GET", "/%6Detrics").status == 404
    assert front.ask("GET", "//metrics").status == 404
    assert front.ask("GET", "/readyz").status == 404
    assert front.served.ask("GET", "/metrics").status == 200
    # Not while a commit takes seconds on a busy disk.
    until(lambda: front.served.ask("GET", "/readyz").status == 200)


def test_errors_of_the_gateway_come_through_as_they_are(front: Front) -> None:
    got = front.ask("GET", "/api/v1/storage")
    assert (got.status, got.code) == (401, "unauthorized")
    assert front.ask("GET", "/d/none/none?expires=1&signature=x").code == "not_found"


def test_plain_http_is_sent_to_tls_with_its_method(front: Front) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", front.plain_port, timeout=ANSWER_S)
    connection.request("POST", "/api/v1/uploads", headers={"Host": "files.example.org"})
    response = connection.getresponse()
    assert response.status == 308
    assert response.headers["Location"] == "https://files.example.org/api/v1/uploads"
    connection.close()


def test_the_log_of_nginx_holds_no_token(front: Front, url: str) -> None:
    front.ask("GET", url)
    signature = url.partition("signature=")[2]
    text = (front.folder / "access.log").read_text()
    assert text.count("\n") > 3
    assert signature not in text
    assert "/d/" not in text


def test_pages_are_limited_by_address(front: Front) -> None:
    with ExitStack() as stack:
        connections = [
            http.client.HTTPSConnection(
                "localhost", front.port, context=front.trust, timeout=ANSWER_S
            )
            for _ in range(60)
        ]
        for connection in connections:
            stack.callback(connection.close)
            connection.connect()
        for connection in connections:  # all at once, however long each of them takes
            connection.request("GET", "/u/zzzzzzzz")
        answers = [connection.getresponse() for connection in connections]
        refused = [answer for answer in answers if answer.status == 429]
        assert refused
        for answer in refused:
            assert answer.headers["retry-after"] == "5"
            assert answer.headers["content-type"] == "text/html"
            assert b"try again" in answer.read()
