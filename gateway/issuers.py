"""Who else may make tokens: the public keys of issuers, from files and from their own address.

    [auth] public_keys   PEM, read at the start
    [auth] jwks_file     JWKS, read again when the file is another one
    [auth] jwks_url      JWKS, fetched when it is needed, kept while its publisher is down

A key is bound to the one algorithm of its kind (RSA: RS256, Ed25519: EdDSA) when it is read,
so no header of a token can have it used for anything else. What such a list holds beside
them (secrets, private keys, short RSA keys, keys to encrypt with) is passed over.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, final

import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from cas.clock import SECOND_US
from cas.config import AuthSettings
from cas.errors import InvalidSetting
from gateway.pool import outside_slot

log = logging.getLogger("blobcask.gateway")

RS256: Final = "RS256"
EDDSA: Final = "EdDSA"
RSA_BITS_MIN: Final = 2048  # RFC 7518, section 3.3
KEYS_MAX: Final = 100  # a token without a key identifier is tried with each
FETCH_S: Final = 5.0
RETRY_S: Final = 10.0  # between two fetches, whoever asks and however the last one went
STALE_S_MAX: Final = 24 * 3600.0  # a publisher that is down this long vouches for nobody
JWKS_BYTES_MAX: Final = 256 * 1024

_PEM: Final = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)
_NO_KEY: Final = f"no public key in it: RSA of at least {RSA_BITS_MIN} bits, or Ed25519"


@final
@dataclass(frozen=True, slots=True)
class IssuerKey:
    """A public key, and the one algorithm that it verifies."""

    public: RSAPublicKey | Ed25519PublicKey
    algorithm: str
    kid: str | None = None  # None: whatever identifier a token gives may mean this key

    def fits(self, algorithm: str, kid: str | None) -> bool:
        return self.algorithm == algorithm and (kid is None or self.kid in (None, kid))


class KeySource(Protocol):
    """Where keys come from. Safe for threads."""

    def known(self) -> tuple[IssuerKey, ...]:
        """The keys that are believed now."""
        ...

    def learn(self) -> None:
        """Somebody shows a key identifier that is in no list: look for a newer list."""
        ...


@final
class Issuers:
    """All sources together, and what tokens of theirs must say of themselves."""

    def __init__(
        self, sources: tuple[KeySource, ...] = (), *, issuer: str = "", audience: str = ""
    ) -> None:
        self._sources = sources
        self.issuer = issuer  # "": any
        self.audience = audience

    @classmethod
    def of(cls, settings: AuthSettings) -> Issuers:
        """Raises InvalidSetting for a file that cannot be read or holds no usable key, and for
        `jwks_url` without `audience`."""
        sources: list[KeySource] = []
        if settings.public_keys is not None:
            sources.append(_started(PemFile, "public_keys", settings.public_keys))
        if settings.jwks_file is not None:
            sources.append(_started(JwksFile, "jwks_file", settings.jwks_file))
        if settings.jwks_url:
            if not settings.audience:  # the provider signs for all its applications
                reason = "name this server's audience, or any token of jwks_url's issuer opens it"
                raise InvalidSetting("auth", "audience", "", reason)
            sources.append(JwksUrl(settings.jwks_url, settings.jwks_refresh / SECOND_US))
        return cls(tuple(sources), issuer=settings.issuer, audience=settings.audience)

    def candidates(self, algorithm: str, kid: str | None) -> Iterator[IssuerKey]:
        """The keys that may have signed; newer lists are looked for when no other is left."""
        if algorithm not in (RS256, EDDSA):
            return
        tried: list[IssuerKey] = []
        for key in self._fitting(algorithm, kid):
            tried.append(key)
            yield key
        if kid is not None and all(key.kid != kid for key in tried):
            for source in self._sources:
                source.learn()
            yield from (key for key in self._fitting(algorithm, kid) if key not in tried)

    def _fitting(self, algorithm: str, kid: str | None) -> list[IssuerKey]:
        found = (key for source in self._sources for key in source.known())
        return [key for key in found if key.fits(algorithm, kid)]


@final
class PemFile:
    """One or more public keys in PEM, read once."""

    def __init__(self, path: Path) -> None:
        self._keys = keys_of_pem(path.read_bytes())

    def known(self) -> tuple[IssuerKey, ...]:
        return self._keys

    def learn(self) -> None:
        pass


@final
class JwksFile:
    """A JWKS file. While what replaced it cannot be read, the keys of before are believed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._stamped()
        self._keys = keys_of_jwks(path.read_bytes())
        self._trouble = ""

    def known(self) -> tuple[IssuerKey, ...]:
        try:
            stamp = self._stamped()
            if stamp != self._stamp:
                # In this order: a file that changes in between is read again.
                self._keys = keys_of_jwks(self._path.read_bytes())
                self._stamp = stamp
            trouble = ""
        except (OSError, ValueError) as error:
            trouble = str(error)
        if trouble and trouble != self._trouble:
            log.warning("%s: %s; its former keys are used", self._path, trouble)
        self._trouble = trouble
        return self._keys

    def learn(self) -> None:
        pass  # `known` looks each time

    def _stamped(self) -> tuple[int, int, int]:
        found = self._path.stat()
        return found.st_mtime_ns, found.st_ino, found.st_size


@final
@dataclass(frozen=True, slots=True)
class _Held:
    keys: tuple[IssuerKey, ...]
    at_s: float


@final
class JwksUrl:
    """A JWKS at an address. One thread fetches; the others go on with what is held."""

    def __init__(
        self,
        url: str,
        refresh_s: float,
        monotonic: Callable[[], float] = time.monotonic,
        fetch: Callable[[str], bytes] | None = None,
    ) -> None:
        self._url = url
        self._refresh_s = refresh_s
        self._monotonic = monotonic
        self._fetch_bytes = fetch or fetched
        self._turn = threading.Lock()
        self._held: _Held | None = None
        self._tried_at_s = float("-inf")
        self._failing = False

    def known(self) -> tuple[IssuerKey, ...]:
        held = self._held
        if held is None or self._age_s(held) >= self._refresh_s:
            self._fetch(wait=held is None)
            held = self._held
        if held is None or self._age_s(held) >= STALE_S_MAX:
            return ()
        return held.keys

    def learn(self) -> None:
        self._fetch(wait=True)

    def _age_s(self, held: _Held) -> float:
        return self._monotonic() - held.at_s

    def _fetch(self, *, wait: bool) -> None:
        """Fetch, unless that was just done. `wait` for one that is under way.

        All of it outside the working slot: a publisher that is slow, and strangers' tokens
        with made-up key identifiers, must not stop the requests of others (invariant 11).
        While fetches fail nobody waits but who fetches.
        """
        with outside_slot():
            self._fetch_in_turn(wait=wait)

    def _fetch_in_turn(self, *, wait: bool) -> None:
        if not self._turn.acquire(timeout=FETCH_S if wait and not self._failing else 0):
            return
        try:
            now_s = self._monotonic()
            if now_s - self._tried_at_s < RETRY_S:
                return
            self._tried_at_s = now_s
            self._held = _Held(keys_of_jwks(self._fetch_bytes(self._url)), now_s)
            self._failing = False
        except (OSError, ValueError) as error:
            self._failing = True
            log.warning("%s: %s", self._url, error)
        finally:
            self._turn.release()


def fetched(url: str) -> bytes:
    """The body at `url`; raises ValueError, OSError. Redirects are not followed.

    As sent, never unpacked: a small body must not become a large one here.
    """
    # Late: `blobcask token` and servers without an address need no HTTP client.
    import httpx

    deadline_s = time.monotonic() + FETCH_S
    body = bytearray()
    headers = {"Accept": "application/jwk-set+json, application/json"}
    headers["Accept-Encoding"] = "identity"
    try:
        with (
            httpx.Client(timeout=FETCH_S, follow_redirects=False) as client,
            client.stream("GET", url, headers=headers) as answer,
        ):
            if answer.status_code != 200:
                raise ValueError(f"answered {answer.status_code}")
            for piece in answer.iter_raw():
                body += piece
                if len(body) > JWKS_BYTES_MAX:
                    raise ValueError(f"longer than {JWKS_BYTES_MAX} bytes")
                if time.monotonic() > deadline_s:
                    raise ValueError(f"took longer than {FETCH_S:.0f} s")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise OSError(f"{type(error).__name__}: {error}") from None
    return bytes(body)


# --- reading keys


def keys_of_pem(data: bytes) -> tuple[IssuerKey, ...]:
    """Every public key of a PEM file; raises ValueError for anything else in it."""
    keys = []
    for block in _PEM.finditer(data):
        if block[1] not in (b"PUBLIC KEY", b"RSA PUBLIC KEY"):
            raise ValueError(f"holds a {block[1].decode()}; give public keys only")
        try:
            key = _bound(load_pem_public_key(block[0]))
        except UnsupportedAlgorithm as error:
            raise ValueError(str(error)) from None
        if key is None:
            raise ValueError(f"use RSA of at least {RSA_BITS_MIN} bits, or Ed25519")
        keys.append(key)
    return tuple(keys[:KEYS_MAX])


class _Jwks(msgspec.Struct):
    keys: list[dict[str, Any]]


def keys_of_jwks(data: bytes) -> tuple[IssuerKey, ...]:
    """Every usable key of a JWKS (RFC 7517); raises ValueError when it is none."""
    try:
        jwks = msgspec.json.decode(data, type=_Jwks)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"no JWKS: {error}") from None
    found = (key for key in map(_key_of_jwk, jwks.keys[:KEYS_MAX]) if key is not None)
    return tuple(found)


def _key_of_jwk(jwk: dict[str, Any]) -> IssuerKey | None:
    kid, algorithm = jwk.get("kid"), {"RSA": RS256, "OKP": EDDSA}.get(str(jwk.get("kty")))
    if algorithm is None or jwk.get("alg", algorithm) != algorithm or "d" in jwk:
        return None
    if jwk.get("use", "sig") != "sig" or not isinstance(kid, str | None):
        return None
    try:
        key = jwt.PyJWK(jwk, algorithm).key
    except (jwt.PyJWTError, ValueError, TypeError):
        return None
    return _bound(key, kid)


def _bound(key: object, kid: str | None = None) -> IssuerKey | None:
    """The key with the one algorithm of its kind; None for what is not accepted."""
    if isinstance(key, RSAPublicKey) and key.key_size >= RSA_BITS_MIN:
        return IssuerKey(key, RS256, kid)
    if isinstance(key, Ed25519PublicKey):
        return IssuerKey(key, EDDSA, kid)
    return None


def _started(source: Callable[[Path], PemFile | JwksFile], name: str, path: Path) -> KeySource:
    try:
        made = source(path)
    except (OSError, ValueError) as error:
        reason = error.strerror or "cannot be read" if isinstance(error, OSError) else str(error)
        raise InvalidSetting("auth", name, path, reason) from None
    if not made.known():
        raise InvalidSetting("auth", name, path, _NO_KEY)
    return made
