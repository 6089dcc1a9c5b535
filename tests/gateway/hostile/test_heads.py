"""Heads that could be read in two ways: one refusal, and the end of the connection.

Behind each stands a whole second request. A server that reads the first one otherwise than
the proxy in front of it would answer it, too: that is request smuggling.
"""

from __future__ import annotations

import pytest

from gateway.worker import HEAD_BYTES_MAX
from gateway.wsgi import HEADERS_MAX, REQUEST_LINE_BYTES_MAX
from tests.gateway.hostile.raw import FOLLOWING, exchange
from tests.gateway.served import Served

INVALID = (400, "invalid_head")
TOO_LARGE = (431, "head_too_large")
CODED = (501, "coding_unknown")

GET = b"GET /healthz HTTP/1.1\r\n"
PUT = b"PUT /healthz HTTP/1.1\r\nHost: a\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
NO_CHUNKS = b"\r\n0\r\n\r\n"

REFUSED = {
    # how long the body is
    "two lengths": (PUT + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcd", *INVALID),
    "one length twice": (PUT + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\nabcd", *INVALID),
    "a list of lengths": (PUT + b"Content-Length: 4, 4\r\n\r\nabcd", *INVALID),
    "a signed length": (PUT + b"Content-Length: +4\r\n\r\nabcd", *INVALID),
    "a negative length": (PUT + b"Content-Length: -1\r\n\r\n", *INVALID),
    "a length with a gap": (PUT + b"Content-Length: 1_0\r\n\r\n", *INVALID),
    "a hexadecimal length": (PUT + b"Content-Length: 0x4\r\n\r\nabcd", *INVALID),
    "an empty length": (PUT + b"Content-Length: \r\n\r\n", *INVALID),
    "a length and chunks": (PUT + b"Content-Length: 5\r\n" + CHUNKED + NO_CHUNKS, *INVALID),
    "chunks and a length": (PUT + CHUNKED + b"Content-Length: 5\r\n" + NO_CHUNKS, *INVALID),
    "chunked twice": (PUT + CHUNKED + CHUNKED + NO_CHUNKS, *INVALID),
    "chunked, then identity": (
        PUT + b"Transfer-Encoding: chunked, identity\r\n" + NO_CHUNKS,
        *INVALID,
    ),
    "identity": (PUT + b"Transfer-Encoding: identity\r\n\r\n", *INVALID),
    "nearly chunked": (PUT + b"Transfer-Encoding: xchunked\r\n" + NO_CHUNKS, *CODED),
    "chunked behind a control": (PUT + b"Transfer-Encoding: \x0bchunked\r\n" + NO_CHUNKS, *INVALID),
    "chunks of an old client": (
        b"PUT /healthz HTTP/1.0\r\nHost: a\r\n" + CHUNKED + NO_CHUNKS,
        *INVALID,
    ),
    # gunicorn would hand these to the app as they are, to be stored as what they are not
    "gzip in chunks": (PUT + b"Transfer-Encoding: gzip, chunked\r\n" + NO_CHUNKS, *CODED),
    "gzip in chunks, apart": (PUT + b"Transfer-Encoding: gzip\r\n" + CHUNKED + NO_CHUNKS, *CODED),
    # where a line ends, and a name
    "a folded line": (GET + b"Host: a\r\nX: a\r\n b\r\n\r\n", *INVALID),
    "a folded first line": (GET + b" Host: a\r\n\r\n", *INVALID),
    "lines without CR": (b"GET /healthz HTTP/1.1\nHost: a\n\n", *INVALID),
    "a bare LF in a value": (GET + b"Host: a\r\nX: a\nTE: chunked\r\n\r\n", *INVALID),
    "a bare CR in a value": (GET + b"Host: a\r\nX: a\rY: b\r\n\r\n", *INVALID),
    "a space before the colon": (PUT + b"Content-Length : 5\r\n\r\n", *INVALID),
    "no colon": (GET + b"Host: a\r\nX\r\n\r\n", *INVALID),
    "no name": (GET + b"Host: a\r\n: a\r\n\r\n", *INVALID),
    "NUL in a name": (GET + b"Host: a\r\nX\0Y: z\r\n\r\n", *INVALID),
    "NUL in a value": (GET + b"Host: a\r\nX: a\0b\r\n\r\n", *INVALID),
    "NUL in the address": (b"GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n", *INVALID),
    "a byte that is no ASCII in the address": (b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", *INVALID),
    "two types": (PUT + b"Content-Type: a/b\r\nContent-Type: c/d\r\n\r\n", *INVALID),
    # whom it is for
    "no host": (GET + b"\r\n", *INVALID),
    "two hosts": (GET + b"Host: a\r\nHost: b\r\n\r\n", *INVALID),
    "one host twice": (GET + b"Host: a\r\nHost: a\r\n\r\n", *INVALID),
    "an empty host": (GET + b"Host:\r\n\r\n", *INVALID),
    "a host with a path": (GET + b"Host: a/b\r\n\r\n", *INVALID),
    "a host with a user": (GET + b"Host: a@b\r\n\r\n", *INVALID),
    "a host with a tag": (GET + b'Host: a"><script>\r\n\r\n', *INVALID),
    "a host with a long port": (GET + b"Host: a:123456\r\n\r\n", *INVALID),
    # another protocol
    "HTTP/0.9": (b"GET /healthz\r\n\r\n", *INVALID),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", *INVALID),
    "HTTP/9.9": (b"GET / HTTP/9.9\r\nHost: a\r\n\r\n", *INVALID),
    "HTTP/1.11": (b"GET / HTTP/1.11\r\nHost: a\r\n\r\n", *INVALID),
    "http/1.1": (b"GET / http/1.1\r\nHost: a\r\n\r\n", *INVALID),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", *INVALID),
    "the PROXY protocol": (b"PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\n" + GET + b"\r\n", *INVALID),
    "nonsense": (b"NONSENSE\r\n\r\n", *INVALID),
    "nothing": (b"\r\n\r\n", *INVALID),
    # methods
    "a method in small letters": (b"get /healthz HTTP/1.1\r\nHost: a\r\n\r\n", *INVALID),
    "a method that is none": (b"GE(T /healthz HTTP/1.1\r\nHost: a\r\n\r\n", *INVALID),
    "a very long method": (b"A" * 100 + b" /healthz HTTP/1.1\r\nHost: a\r\n\r\n", *INVALID),
    "a method nobody knows": (b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n", 501, "method_unknown"),
    "another expectation": (PUT + b"Expect: 200-ok\r\n\r\n", 417, "expectation_failed"),
    # size
    "a long address": (
        b"GET /" + b"a" * REQUEST_LINE_BYTES_MAX + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        414,
        "uri_too_long",
    ),
    "a long field": (
        GET + b"Host: a\r\nX: " + b"a" * (HEAD_BYTES_MAX // 4) + b"\r\n\r\n",
        *TOO_LARGE,
    ),
    "many fields": (GET + b"Host: a\r\n" + b"X: y\r\n" * HEADERS_MAX + b"\r\n", *TOO_LARGE),
    "a large head": (GET + b"X: " + b"a" * HEAD_BYTES_MAX + b"\r\n\r\n", *TOO_LARGE),
}  # fmt: skip


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("name", REFUSED)
def test_a_doubtful_head_gets_one_refusal_and_the_end(served: Served, name: str) -> None:
    message, status, code = REFUSED[name]
    (reply,) = exchange(served, message)
    assert (reply.status, reply.code) == (status, code)
    assert reply.headers["connection"] == "close"


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "PROPFIND", "PATCH"])
def test_a_method_without_use_is_refused_without_an_echo(served: Served, method: str) -> None:
    head = f"{method} /healthz HTTP/1.1\r\nHost: a\r\nX-Echo: my-own-words\r\n\r\n"
    reply = exchange(served, head.encode())[0]
    assert (reply.status, reply.code) == (405, "method_not_allowed")
    assert "GET" in reply.headers["allow"]
    assert b"my-own-words" not in reply.body


@pytest.mark.parametrize(
    "line",
    [
        "Transfer_Encoding: chunked",
        "Content_Length: 5",
        "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk",
        "Upgrade: websocket\r\nConnection: Upgrade",
        "X-HTTP-Method-Override: DELETE",
        "X-Original-URL: /metrics",
        "X-Rewrite-URL: /metrics",
        "Cookie: session=admin; tenant=default",
    ],
)
def test_a_field_that_others_obey_changes_nothing(served: Served, line: str) -> None:
    replies = exchange(served, GET + f"Host: a\r\n{line}\r\n\r\n".encode())
    assert [reply.status for reply in replies] == [200, 200]
    assert all(reply.body == b'{"status":"ok"}' for reply in replies)
    assert not any("set-cookie" in reply.headers for reply in replies)


def test_an_old_client_needs_no_host(served: Served) -> None:
    (reply,) = exchange(served, b"GET /healthz HTTP/1.0\r\n\r\n")
    assert (reply.status, reply.headers["connection"]) == (200, "close")


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (b"4\r\ndata\r\n0\r\n\r\n", b"data"),
        (b"4;name=value\r\ndata\r\n0\r\n\r\n", b"data"),
        (b"0004\r\ndata\r\n0\r\n\r\n", b"data"),
        (b"4\r\ndata\r\n0\r\nX-Trailer: a\r\n\r\n", b"data"),
        (b"+4\r\ndata\r\n0\r\n\r\n", None),
        (b"0x4\r\ndata\r\n0\r\n\r\n", None),
        (b"4 \r\ndata\r\n0\r\n\r\n", None),
        (b" 4\r\ndata\r\n0\r\n\r\n", None),
        (b"4\ndata\n0\n\n", None),
        (b"4;a=\x00\r\ndata\r\n0\r\n\r\n", None),
        (b"4\r\ndata0\r\n\r\n", None),
        (b"5\r\ndata\r\n0\r\n\r\n", None),
        (b"-1\r\n\r\n", None),
        (b"\r\n\r\n", None),
        (b"zz\r\n", None),
    ],
)
def test_chunks_are_read_in_one_way_or_not_at_all(
    served: Served, slot: str, body: bytes, kept: bytes | None
) -> None:
    before = served.objects()
    head = f"PUT {slot}&filename=a.bin HTTP/1.1\r\nHost: a\r\n".encode() + CHUNKED + b"\r\n"
    replies = exchange(served, head + body)
    if kept is None:
        assert [(reply.status, reply.code) for reply in replies] == [(400, "body_truncated")]
        assert replies[0].headers["connection"] == "close"
        assert served.objects() == before
    else:
        assert [reply.status for reply in replies] == [200, 200]
        assert b'"size_bytes":%d' % len(kept) in replies[0].body


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("length", [10**15, 10**26, 10**4000])
def test_a_body_larger_than_any_disk_is_refused_before_it_comes(
    served: Served, slot: str, length: int
) -> None:
    head = f"PUT {slot} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n"
    (reply,) = exchange(served, head.encode())
    assert reply.status in (400, 413, 507)
    assert reply.code in ("invalid_head", "too_large", "store_full")
    assert reply.headers["connection"] == "close"


@pytest.mark.usefixtures("nothing_kept")
def test_a_chunk_larger_than_any_disk_ends_with_its_sender(served: Served, slot: str) -> None:
    head = f"PUT {slot} HTTP/1.1\r\nHost: a\r\n".encode() + CHUNKED + b"\r\n"
    (reply,) = exchange(served, head + b"f" * 17 + b"\r\ndata", b"")
    assert (reply.status, reply.code) == (400, "body_truncated")


def test_a_request_behind_a_refusal_is_not_lost_where_nothing_is_in_doubt(served: Served) -> None:
    refused = b"GET /nowhere HTTP/1.1\r\nHost: a\r\n\r\n"
    replies = exchange(served, refused * 3, FOLLOWING)
    assert [reply.status for reply in replies] == [404, 404, 404, 200]
