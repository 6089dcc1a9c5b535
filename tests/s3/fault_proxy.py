"""A proxy between a client and an S3 server that brings bad luck, as told.

    with FaultProxy(bucket) as proxy:
        proxy.luck = every(10, Cut())
        ... speak to bucket.behind(proxy.address) ...

`luck` is asked at each request, and may be set anew at any time: None lets the request
through, a fault befalls it. Bytes are passed on as they come, so large objects cost no memory
but where a fault needs them whole (Pretend). `seen` tells what was asked, `bytes_put` what
was sent in bodies: the cost of what a client repeats.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, BinaryIO, Literal, Self, final
from urllib.parse import parse_qs, unquote, urlsplit

from tests.s3.ceph import Bucket

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

_PIECE_BYTES = 64 << 10
_IDLE_S = 120.0
# They speak of one connection, and are not passed on.
_HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "expect"})


@final
@dataclass(frozen=True)
class Asked:
    """One request, as its head tells it."""

    number: int  # from 1, over all connections
    method: str
    path: str  # with the bucket's name, percent-decoded
    query: dict[str, list[str]]
    headers: dict[str, str]  # names in lower case

    @property
    def size_bytes(self) -> int:
        return int(self.headers.get("content-length", "0"))

    @property
    def key(self) -> str:
        """Of the object; "" where the request is about the bucket."""
        return self.path.lstrip("/").partition("/")[2]


# --- faults


@final
@dataclass(frozen=True)
class Refuse:
    """The connection is reset at once."""


@final
@dataclass(frozen=True)
class Cut:
    """The connection is reset after so many bytes of the request's body, or the answer's."""

    after_bytes: int = 0
    way: Literal["request", "answer"] = "request"


@final
@dataclass(frozen=True)
class Say:
    """The proxy answers itself; the server hears nothing."""

    status: int = 503
    code: str = "SlowDown"
    headers: dict[str, str] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Wait:
    """The request is passed on after a delay."""

    seconds: float


@final
@dataclass(frozen=True)
class Hold:
    """The request is passed on when the test says so; `held` is set while one waits."""

    release: threading.Event
    held: threading.Event = field(default_factory=threading.Event)


@final
@dataclass(frozen=True)
class Slow:
    """Bodies pass at this speed, both ways."""

    bytes_per_s: int


@final
@dataclass(frozen=True)
class Flip:
    """One bit of the body is another one, on its way there or back."""

    way: Literal["request", "answer"] = "request"


@final
@dataclass(frozen=True)
class Lose:
    """The server does what is asked, and the answer is lost."""


@final
@dataclass(frozen=True)
class Pretend:
    """A PUT is answered as if all were well, and this is stored in truth.

    "whole" takes wrong checksums without a word. With `lies_later` a HEAD repeats the lie:
    size, ETag and checksum are those that the client claimed, so that only reading helps.
    """

    stored: Literal["nothing", "half", "flipped", "whole"]
    lies_later: bool = False


Fault = Refuse | Cut | Say | Wait | Hold | Slow | Flip | Lose | Pretend
Luck = Callable[[Asked], Fault | None]


def good(_asked: Asked) -> None:
    """Nothing befalls anybody."""


def always(fault: Fault) -> Luck:
    """Every request."""
    return lambda _asked: fault


def every(number: int, fault: Fault) -> Luck:
    """Each `number`th request."""
    return lambda asked: fault if asked.number % number == 0 else None


def only(methods: str, fault: Fault, *, below: str = "") -> Luck:
    """Requests by one of these methods ("PUT DELETE") for keys that hold `below`."""
    names = frozenset(methods.split())
    return lambda asked: fault if asked.method in names and below in asked.key else None


def first(number: int, fault: Fault, *, methods: str = "", below: str = "") -> Luck:
    """The first `number` such requests, then no more."""
    names = frozenset(methods.split())
    left = itertools.count(number, -1)
    lock = threading.Lock()

    def luck(asked: Asked) -> Fault | None:
        if (names and asked.method not in names) or below not in asked.key:
            return None
        with lock:
            return fault if next(left) > 0 else None

    return luck


# --- the proxy


@final
@dataclass(frozen=True)
class _Claim:
    """What a client was made to believe of an object."""

    size_bytes: int
    etag: str
    sha256: str


@final
class FaultProxy:
    """Listens on a free port of loopback from `__enter__` to `__exit__`."""

    def __init__(self, bucket: Bucket) -> None:
        upstream = urlsplit(bucket.endpoint)
        assert upstream.hostname is not None
        assert upstream.port is not None
        self.upstream = (upstream.hostname, upstream.port)
        self.luck: Luck = good
        self.seen: list[tuple[Asked, int]] = []  # with the status that was passed on; 0: none
        self.bytes_put = 0  # of bodies that came from clients
        self._bucket = bucket
        self._numbers = itertools.count(1)
        self._claims: dict[str, _Claim] = {}
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._stopped = False
        self._acceptor = threading.Thread(target=self._accept, daemon=True)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def bucket(self) -> Bucket:
        """The bucket as it is reached through here."""
        return self._bucket.behind(self.address)

    def __enter__(self) -> Self:
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._stopped = True
            connections = list(self._open)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in connections:
            _reset(connection)
        self._acceptor.join(10)

    def count(self, methods: str = "", below: str = "") -> int:
        """How many such requests were asked so far."""
        names = frozenset(methods.split())
        with self._lock:
            return sum(
                1
                for asked, _ in self.seen
                if (not names or asked.method in names) and below in asked.key
            )

    def wait_for(self, content: Callable[[Self], bool], seconds: float = 60) -> None:
        """Until `content` is, which looks after each request."""
        deadline = time.monotonic() + seconds
        while not content(self):
            with self._changed:
                left = deadline - time.monotonic()
                assert left > 0, f"not seen in {seconds} s; {len(self.seen)} requests"
                self._changed.wait(min(left, 1.0))

    def cut_all(self) -> None:
        """Reset every connection that is open now."""
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            _reset(connection)

    # --- inside

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._stopped:
                    _reset(connection)
                    return
                self._open.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with ExitStack() as stack:
            stack.callback(self._forget, connection)
            # It may be cut before its thread begins.
            stack.enter_context(suppress(OSError))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(_IDLE_S)
            server = stack.enter_context(
                closing(http.client.HTTPConnection(*self.upstream, timeout=_IDLE_S))
            )
            file = stack.enter_context(connection.makefile("rb"))
            # A client that left, or was thrown out, ends its own connection only.
            with suppress(OSError, http.client.HTTPException, _Ended, ValueError):
                while (asked := self._read_head(file)) is not None:
                    _Exchange(self, asked, connection, file, server).run()

    def _forget(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.discard(connection)
        connection.close()

    def _read_head(self, file: BinaryIO) -> Asked | None:
        line = file.readline(_PIECE_BYTES).decode("latin-1").split()
        if len(line) != 3:
            return None
        headers = http.client.parse_headers(file)
        url = urlsplit(line[1])
        return Asked(
            next(self._numbers),
            line[0],
            unquote(url.path),
            parse_qs(url.query, keep_blank_values=True),
            {name.lower(): value for name, value in headers.items()} | {"": line[1]},
        )

    def note(self, asked: Asked, status: int, sent_bytes: int) -> None:
        with self._changed:
            self.seen.append((asked, status))
            self.bytes_put += sent_bytes
            self._changed.notify_all()

    def claim(self, path: str, claim: _Claim | None = None) -> _Claim | None:
        """Remember a lie, or repeat it."""
        with self._lock:
            if claim is not None:
                self._claims[path] = claim
            return self._claims.get(path)

    def forget_claim(self, path: str) -> None:
        """Nobody lies about what was deleted."""
        with self._lock:
            self._claims.pop(path, None)

    def client(self) -> S3Client:
        """The proxy's own way to the server, for what it stores in truth."""
        return self._bucket.client()

    @property
    def bucket_name(self) -> str:
        return self._bucket.name


class _Ended(Exception):
    """The connection is over, as it was meant to be."""


@final
class _Exchange:
    """One request and its answer."""

    def __init__(
        self,
        proxy: FaultProxy,
        asked: Asked,
        connection: socket.socket,
        file: BinaryIO,
        server: http.client.HTTPConnection,
    ) -> None:
        self.proxy = proxy
        self.asked = asked
        self.connection = connection
        self.file = file
        self.server = server
        self.left_bytes = asked.size_bytes  # of the request's body
        self.noted = False

    def run(self) -> None:
        fault = self.proxy.luck(self.asked)
        if self.asked.method == "DELETE":
            self.proxy.forget_claim(self.asked.path)
        try:
            self._befall(fault)
        finally:
            self._note(0)

    def _befall(self, fault: Fault | None) -> None:
        match fault:
            case Refuse():
                self._end()
            case Say():
                self._read_body()
                self._say(fault)
            case Pretend() if self.asked.method == "PUT" and self.asked.key:
                self._pretend(fault)
            case Pretend(lies_later=True) if self.asked.method == "HEAD":
                self._lie()
            case Pretend():
                self._pass_on(None)
            case Wait(seconds):
                time.sleep(seconds)  # the fault itself: nothing is being waited for
                self._pass_on(None)
            case Hold(release, held):
                held.set()
                release.wait(_IDLE_S)
                self._pass_on(None)
            case _:
                self._pass_on(fault)

    def _end(self) -> None:
        _reset(self.connection)
        raise _Ended

    def _note(self, status: int) -> None:
        if not self.noted:
            self.noted = True
            self.proxy.note(self.asked, status, self.asked.size_bytes - self.left_bytes)

    # --- bodies

    def _welcome(self) -> None:
        if "100-continue" in self.asked.headers.get("expect", "").lower():
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _pieces(self) -> Iterable[bytes]:
        """The request's body as it comes."""
        self._welcome()
        while self.left_bytes > 0:
            piece = self.file.read(min(_PIECE_BYTES, self.left_bytes))
            if not piece:
                raise _Ended
            self.left_bytes -= len(piece)
            yield piece

    def _read_body(self) -> bytes:
        return b"".join(self._pieces())

    # --- truth

    def _pass_on(self, fault: Fault | None) -> None:
        try:
            self._send_head()
            self._send_body(fault)
            response = self.server.getresponse()
        except (ConnectionError, http.client.HTTPException):
            # As a load balancer says it; the next request gets a fresh connection.
            self.server.close()
            self._read_body()
            self._say(Say(502, "BadGateway"))
            return
        if isinstance(fault, Lose):
            response.read()
            self._end()
        self._answer(response, fault)

    def _send_head(self) -> None:
        self.server.putrequest(
            self.asked.method, self.asked.headers[""], skip_host=True, skip_accept_encoding=True
        )
        for name, value in self.asked.headers.items():
            if name and name not in _HOP_BY_HOP:
                self.server.putheader(name, value)
        self.server.endheaders()

    def _send_body(self, fault: Fault | None) -> None:
        passed = 0
        for piece in self._pieces():
            if isinstance(fault, Cut) and fault.way == "request":
                piece = piece[: fault.after_bytes - passed]  # what is let through
            elif isinstance(fault, Flip) and fault.way == "request" and passed == 0:
                piece = _flipped(piece)
            elif isinstance(fault, Slow):
                time.sleep(len(piece) / fault.bytes_per_s)
            self.server.send(piece)
            passed += len(piece)
            if isinstance(fault, Cut) and fault.way == "request" and passed >= fault.after_bytes:
                self._cut_both()
        if isinstance(fault, Cut) and fault.way == "request":
            self._cut_both()

    def _cut_both(self) -> None:
        self.server.close()
        self._end()

    def _answer(self, response: http.client.HTTPResponse, fault: Fault | None) -> None:
        bodiless = self.asked.method == "HEAD"
        data = None if response.getheader("content-length") or bodiless else response.read()
        lines = [f"HTTP/1.1 {response.status} {response.reason}"]
        lines += [
            f"{name}: {value}"
            for name, value in response.getheaders()
            if name.lower() not in _HOP_BY_HOP
        ]
        if data is not None and response.status not in (HTTPStatus.NO_CONTENT, 304):
            lines.append(f"Content-Length: {len(data)}")
        self._note(response.status)
        self.connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        passed = 0
        cut = isinstance(fault, Cut) and fault.way == "answer"
        while piece := data if data is not None else response.read(_PIECE_BYTES):
            if cut:
                assert isinstance(fault, Cut)
                piece = piece[: max(0, fault.after_bytes - passed)]
                self.connection.sendall(piece)
                break
            if isinstance(fault, Flip) and fault.way == "answer" and passed == 0:
                piece = _flipped(piece)
            if isinstance(fault, Slow):
                time.sleep(len(piece) / fault.bytes_per_s)
            self.connection.sendall(piece)
            passed += len(piece)
            if data is not None:
                break
        if cut:
            self._cut_both()
        response.close()

    # --- lies

    def _say(self, say: Say) -> None:
        body = (
            f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{say.code}</Code>'
            f"<Message>{say.code}</Message></Error>"
        ).encode()
        self._reply(say.status, {"Content-Type": "application/xml", **say.headers}, body)

    def _reply(
        self, status: int, headers: dict[str, str], body: bytes = b"", length: int | None = None
    ) -> None:
        size_bytes = len(body) if length is None else length
        lines = [f"HTTP/1.1 {status} Said", f"Content-Length: {size_bytes}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._note(status)
        if self.asked.method == "HEAD":
            body = b""
        self.connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body)

    def _pretend(self, fault: Pretend) -> None:
        body = self._read_body()
        claim = self._claimed(body)
        truth = {
            "nothing": None,
            "half": body[: len(body) // 2],
            "flipped": _flipped(body),
            "whole": body,
        }[fault.stored]
        if truth is not None:
            self._store(truth)
        if "partNumber" not in self.asked.query:
            self.proxy.claim(self.asked.path, claim)
        headers = {"ETag": f'"{claim.etag}"'}
        if claim.sha256:
            headers["x-amz-checksum-sha256"] = claim.sha256
        self._reply(HTTPStatus.OK, headers)

    def _claimed(self, body: bytes) -> _Claim:
        """What the client wants to hear: its own claims, right or wrong."""
        md5 = self.asked.headers.get("content-md5")
        etag = base64.b64decode(md5).hex() if md5 else hashlib.md5(body).hexdigest()
        return _Claim(len(body), etag, self.asked.headers.get("x-amz-checksum-sha256", ""))

    def _store(self, body: bytes) -> None:
        with closing(self.proxy.client()) as client:
            part = self.asked.query.get("partNumber")
            if part is None:
                client.put_object(Bucket=self.proxy.bucket_name, Key=self.asked.key, Body=body)
            else:
                client.upload_part(
                    Bucket=self.proxy.bucket_name,
                    Key=self.asked.key,
                    Body=body,
                    PartNumber=int(part[0]),
                    UploadId=self.asked.query["uploadId"][0],
                )

    def _lie(self) -> None:
        claim = self.proxy.claim(self.asked.path)
        if claim is None:
            self._pass_on(None)
            return
        headers = {
            "ETag": f'"{claim.etag}"',
            "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
            "Content-Type": "application/octet-stream",
        }
        if claim.sha256:
            headers["x-amz-checksum-sha256"] = claim.sha256
        self._reply(HTTPStatus.OK, headers, length=claim.size_bytes)


def _flipped(piece: bytes) -> bytes:
    middle = len(piece) // 2
    return piece[:middle] + bytes([piece[middle] ^ 1]) + piece[middle + 1 :] if piece else b"!"


def _reset(connection: socket.socket) -> None:
    """Close with RST, as a machine that lost its power looks to those behind it."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    with suppress(OSError):
        connection.close()
