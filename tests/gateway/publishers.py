"""An identity provider for tests: keys of its own, tokens, and a JWKS over real HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, final

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import OKPAlgorithm, RSAAlgorithm

from gateway.issuers import EDDSA, RS256

CLAIMS: Mapping[str, Any] = {"tenant": "t", "sub": "ann", "permissions": ["admin"], "exp": 4e9}


@cache
def rsa_key(name: str, bits: int = 2048) -> RSAPrivateKey:
    """The same key for the same name: making one takes long."""
    assert name
    return generate_private_key(65537, bits)


@cache
def ed_key(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(name.encode().ljust(32, b"."))


def algorithm_of(key: RSAPrivateKey | Ed25519PrivateKey) -> str:
    return RS256 if isinstance(key, RSAPrivateKey) else EDDSA


def pem(key: RSAPrivateKey | Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def jwk(key: RSAPrivateKey | Ed25519PrivateKey, kid: str | None, **more: Any) -> dict[str, Any]:
    if isinstance(key, RSAPrivateKey):
        found = RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    else:
        found = OKPAlgorithm.to_jwk(key.public_key(), as_dict=True)
    found.pop("key_ops", None)
    return {**found, **({} if kid is None else {"kid": kid}), **more}


def jwks(*keys: Mapping[str, Any]) -> bytes:
    return json.dumps({"keys": keys}).encode()


def token(key: RSAPrivateKey | Ed25519PrivateKey, kid: str | None = None, **claims: Any) -> str:
    """A token with CLAIMS, changed by `claims`; a claim of None is left out."""
    said = {name: value for name, value in {**CLAIMS, **claims}.items() if value is not None}
    headers = None if kid is None else {"kid": kid}
    return jwt.encode(said, key, algorithm_of(key), headers)


@final
@dataclass
class Publisher:
    """What it answers may be changed at any time; `asked` counts."""

    url: str
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    asked: int = 0
    before_answer: Callable[[], object] = lambda: None


@contextmanager
def publishing(body: bytes) -> Iterator[Publisher]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            publisher.asked += 1
            publisher.before_answer()
            self.send_response(publisher.status)
            for name, value in publisher.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(publisher.body)))
            self.end_headers()
            self.wfile.write(publisher.body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    publisher = Publisher(f"http://127.0.0.1:{server.server_port}/jwks.json", body)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield publisher
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
