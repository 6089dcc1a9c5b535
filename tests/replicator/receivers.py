"""A real receiver of callbacks: an HTTP or HTTPS server in a thread, as good or bad as wanted."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import SimpleQueue
from typing import Any, final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

ARRIVES_S = 60.0


@final
@dataclass(frozen=True)
class Received:
    """One request as it came; names of headers in lower case."""

    path: str
    headers: Mapping[str, str]
    body: bytes


Answer = Callable[[BaseHTTPRequestHandler, threading.Event], None]


def status(code: int, **headers: str) -> Answer:
    """An answer with no more to it than this."""

    def answer(request: BaseHTTPRequestHandler, _over: threading.Event) -> None:
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


@final
@dataclass
class Receiver:
    """Answers `answers` one after the other, then 204 for ever; `arrived` gets each request."""

    port: int
    scheme: str = "http"
    answers: list[Answer] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)
    arrived: SimpleQueue[Received] = field(default_factory=SimpleQueue)
    over: threading.Event = field(default_factory=threading.Event)
    wrote_bytes: int = 0  # by `endless`, before the sender hung up

    def url(self, host: str = "receiver.test", path: str = "/hook") -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"

    def next(self) -> Received:
        """The next request that has not been asked for; waits for it."""
        return self.arrived.get(timeout=ARRIVES_S)


def hangs(_request: BaseHTTPRequestHandler, over: threading.Event) -> None:
    """Says nothing until the test is over."""
    over.wait(ARRIVES_S)


def drips(request: BaseHTTPRequestHandler, over: threading.Event) -> None:
    """A head that never ends, a byte at a time."""
    _drip(request, over, b"HTTP/1.1 200 OK\r\nX-Slow: " + b"a" * 10_000)


def drips_body(request: BaseHTTPRequestHandler, over: threading.Event) -> None:
    """A good head at once, and a body that never ends."""
    request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    _drip(request, over, b"a" * 10_000)


def _drip(request: BaseHTTPRequestHandler, over: threading.Event, data: bytes) -> None:
    try:
        for byte in data:
            request.wfile.write(bytes([byte]))
            if over.wait(0.01):
                return
    except OSError:
        pass  # the sender hung up, as it should


def endless(receiver: Receiver) -> Answer:
    """A gigabyte, as fast as it is taken."""

    def answer(request: BaseHTTPRequestHandler, _over: threading.Event) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n")
        try:
            for _ in range(1024):
                request.wfile.write(bytes(1 << 20))
                receiver.wrote_bytes += 1 << 20
        except OSError:
            pass

    return answer


def garbage(request: BaseHTTPRequestHandler, _over: threading.Event) -> None:
    request.wfile.write(b"\x00\x01\x02 this is no HTTP\r\n\r\n")


@contextmanager
def receiving(tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    """A receiver on a free port of 127.0.0.1."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Received(self.path, headers, body)
            receiver.received.append(request)
            answer = receiver.answers.pop(0) if receiver.answers else status(204)
            receiver.arrived.put(request)
            answer(self, receiver.over)

        def log_message(self, *_words: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = False  # server_close waits for all
        request_queue_size = 128  # connections that come at the same moment

        def handle_error(self, *_words: Any) -> None:
            pass  # a sender that hangs up is what some tests are about

    server = Server(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    receiver = Receiver(server.server_port, "http" if tls is None else "https")
    # It notices its end at the next look, and nobody wants to wait half a second for that.
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield receiver
    finally:
        receiver.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def nobody() -> Iterator[int]:
    """A port of 127.0.0.1 where nobody listens, and where nobody else can begin to."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def certificate(folder: Path, *names: str) -> Path:
    """A self-signed certificate for `names` and its key, as one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test's own")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([_alternative(name) for name in names]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "receiver.pem"
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
