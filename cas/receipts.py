"""Receipts: signed statements of what an upload brought, which their holder can prove.

    {"receipt": {"version": 1, "issuer": …, "store_id": …, "upload_id": …, "name": …,
                 "completed_at": …, "files": [{"filename": …, "size_bytes": …,
                 "checksum_sha256": …, "content_type": …}, …]},
     "signature": "<header>..<signature>"}

The signature is a JWS (RFC 7515) with detached content (appendix F), by Ed25519 (`EdDSA`, RFC
8037). The content is `receipt` in its canonical form (JCS, RFC 8785), so that what people
read is what was signed, however it is indented; a payload in base64url beside a readable copy
would leave open which of the two counts. Any JOSE library verifies it with the canonical
form, base64url, put between the two dots.

`receipt` holds text, whole numbers, lists, objects and null only. For these the canonical
form is `json.dumps` with sorted keys and no spaces. Nothing in it opens anything.

What is stated of the upload is made from its record and its slots alone: asked for again it
is the same, also when its files are deleted. The issuer is the server's present public URL,
and the newest key signs, so after a change of either the copies differ, and each one stays
valid. The header names its key by the thumbprint (RFC 7638), by which the JWKS lists it.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64decode, b64encode, urlsafe_b64encode
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, final

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cas.clock import rfc3339
from cas.errors import InvalidReceipt, NotFound, ReceiptNotProved, UploadNotCompleted
from cas.records import COMPLETED, PendingUpload, UploadFile

JSON = dict[str, Any]
VERSION: Final = 1
TYPE: Final = "blobcask-receipt"  # in the header: no other statement passes for a receipt
BYTES_MAX: Final = 4 << 20  # 1,000 files with the longest names are 1.2 MiB
_KEY_BYTES: Final = 32
_NUMBER_MAX: Final = 1 << 53  # what every JSON reader takes for the same number


@final
class ReceivedFile(msgspec.Struct, frozen=True):
    """A file as it arrived; `checksum_sha256` is 64 lowercase hex characters."""

    filename: str
    size_bytes: int
    checksum_sha256: str
    content_type: str  # by the content, where that tells, else as its sender said


@final
class Receipt(msgspec.Struct, frozen=True):
    """What is stated; `issuer` is the server's public URL, None where it has none."""

    version: int
    issuer: str | None
    store_id: str
    upload_id: str
    name: str
    completed_at: str  # RFC 3339
    files: list[ReceivedFile]


@final
class Receipts:
    """Makes the receipts of one store. `seeds` are Ed25519, oldest first; the last one signs."""

    def __init__(self, seeds: Sequence[bytes], store_id: str, public_url: str) -> None:
        self._key = _private(seeds[-1])
        self._keys = public_keys(seeds)
        self._store_id = store_id
        self._issuer = public_url or None

    def document(self, upload: PendingUpload, slots: Iterable[UploadFile]) -> JSON:
        """The signed receipt of an upload; raises UploadNotCompleted."""
        if upload.status != COMPLETED:
            raise UploadNotCompleted(upload.status)
        stated = Receipt(
            VERSION,
            self._issuer,
            self._store_id,
            upload.upload_id,
            upload.name,
            rfc3339(upload.completed_at or 0),
            [_received(slot) for slot in slots],
        )
        receipt: JSON = msgspec.to_builtins(stated)
        header = {"alg": "EdDSA", "kid": thumbprint(self._keys[-1]), "typ": TYPE}
        head = _base64url(canonical(header))
        signature = self._key.sign(_signed(head, receipt))
        return {"receipt": receipt, "signature": f"{head}..{_base64url(signature)}"}

    def jwks(self) -> JSON:
        """The public keys, old ones too, for whoever verifies."""
        return jwks_of(self._keys)


def public_keys(seeds: Iterable[bytes]) -> list[bytes]:
    """The public keys (32 raw bytes each) of Ed25519 seeds."""
    return [_private(seed).public_key().public_bytes_raw() for seed in seeds]


def _private(seed: bytes) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(seed[:_KEY_BYTES])


def _received(slot: UploadFile) -> ReceivedFile:
    digest = slot.received_sha256
    if digest is None:
        raise NotFound("receipt", slot.upload_id)
    return ReceivedFile(slot.filename, slot.size_bytes, digest.hex(), slot.content_type)


# --- verifying


def verify(document: bytes, keys: Iterable[bytes]) -> Receipt:
    """What a receipt states, proved by one of `keys` (32 raw bytes each).

    Raises InvalidReceipt for what is none, ReceiptNotProved where the signature is another's.
    """
    found = _strict_json(document)
    if not isinstance(found, dict) or found.keys() != {"receipt", "signature"}:
        raise InvalidReceipt("document", "not an object of receipt and signature")
    head, signature = _parts(found["signature"])
    by_name = {thumbprint(key): key for key in keys}
    kid = _key_named(head)
    if kid not in by_name:
        raise ReceiptNotProved(f"signed with the key {kid}, which is none of the given ones")
    try:
        public = Ed25519PublicKey.from_public_bytes(by_name[kid])
        public.verify(signature, _signed(head, found["receipt"]))
    except InvalidSignature:
        raise ReceiptNotProved("the signature is not of this receipt: it was changed") from None
    return _stated(found["receipt"])


def _parts(signature: object) -> tuple[str, bytes]:
    """The header as it was signed, and the signature."""
    parts = signature.split(".") if isinstance(signature, str) else []
    if len(parts) != 3 or parts[1]:
        raise InvalidReceipt("signature", "not a JWS with detached content")
    return parts[0], _unbase64url(parts[2], "signature")


def _key_named(head: str) -> str:
    header = _strict_json(_unbase64url(head, "header"))
    if not isinstance(header, dict) or header.keys() != {"alg", "kid", "typ"}:
        raise InvalidReceipt("header", "not alg, kid and typ")
    kid = header["kid"]
    if (header["alg"], header["typ"]) != ("EdDSA", TYPE) or not isinstance(kid, str):
        raise InvalidReceipt("header", f"not EdDSA, or not {TYPE}")
    return kid


def _stated(receipt: object) -> Receipt:
    try:
        stated = msgspec.convert(receipt, Receipt)
    except msgspec.ValidationError as error:
        raise InvalidReceipt("receipt", str(error)) from None
    if stated.version != VERSION:
        raise InvalidReceipt(stated.version, f"a version other than {VERSION}")
    return stated


def _strict_json(data: bytes) -> object:
    """JSON that no two readers take for different things; raises InvalidReceipt."""

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands twice in one object")
        return found

    def refuse(text: str) -> object:
        raise ValueError(f"{text} is no whole number")

    if len(data) > BYTES_MAX:
        raise InvalidReceipt("document", f"longer than {BYTES_MAX} bytes")
    try:
        found: object = json.loads(
            data.decode(), object_pairs_hook=once, parse_float=refuse, parse_constant=refuse
        )
    except (ValueError, RecursionError) as error:
        raise InvalidReceipt("document", f"not JSON of its kind: {error}") from None
    return found


# --- the forms of the standards


def canonical(value: object) -> bytes:
    """JCS (RFC 8785) of what a receipt may hold; raises InvalidReceipt for anything else."""
    _check_plain(value)
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidReceipt("text", "holds half a character") from None


def _check_plain(value: object) -> None:
    if isinstance(value, dict):
        for name in value:
            # Only among others are Python's order of keys and that of JCS different.
            if not (isinstance(name, str) and name.isascii()):
                raise InvalidReceipt(name, "a name that is not ASCII")
        for item in value.values():
            _check_plain(item)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        if abs(value) >= _NUMBER_MAX:
            raise InvalidReceipt(value, "a number that readers would round")
    elif not isinstance(value, str | None):
        raise InvalidReceipt(value, "neither text, number, list, object nor null")


def thumbprint(key: bytes) -> str:
    """The name of a public key (RFC 7638)."""
    return _base64url(hashlib.sha256(canonical(_jwk(key))).digest())


def jwks_of(keys: Iterable[bytes]) -> JSON:
    """Public keys as a JWKS (RFC 7517, RFC 8037)."""
    return {
        "keys": [
            {**_jwk(key), "kid": thumbprint(key), "alg": "EdDSA", "use": "sig"} for key in keys
        ]
    }


class _Jwk(msgspec.Struct):
    kty: str
    crv: str = ""
    x: str = ""


class _Jwks(msgspec.Struct):
    keys: list[_Jwk]


def keys_of_jwks(data: bytes) -> list[bytes]:
    """The Ed25519 keys of a saved JWKS; raises InvalidReceipt when there is none."""
    try:
        jwks = msgspec.json.decode(data, type=_Jwks)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidReceipt("keys", f"no JWKS: {error}") from None
    keys = [read_key(jwk.x) for jwk in jwks.keys if (jwk.kty, jwk.crv) == ("OKP", "Ed25519")]
    if not keys:
        raise InvalidReceipt("keys", "no Ed25519 key in this JWKS")
    return keys


def read_key(text: str) -> bytes:
    """A public key given as base64 of 32 bytes, URL-safe or not; raises InvalidReceipt."""
    key = _unbase64url(text.strip().rstrip("=").replace("+", "-").replace("/", "_"), "key")
    if len(key) != _KEY_BYTES:
        raise InvalidReceipt(text, f"not the base64 of {_KEY_BYTES} bytes")
    return key


def _jwk(key: bytes) -> Mapping[str, str]:
    return {"crv": "Ed25519", "kty": "OKP", "x": _base64url(key)}


def _signed(head: str, receipt: object) -> bytes:
    """The bytes that are signed (RFC 7515, section 5.1)."""
    return f"{head}.{_base64url(canonical(receipt))}".encode()


def _base64url(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def _unbase64url(text: str, what: str) -> bytes:
    """Strict: one text for the same bytes, else a receipt could be changed and stay good."""
    try:
        data = b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError:  # of text that is not ASCII too
        data = b""
    if not data or b64encode(data, b"-_").rstrip(b"=") != text.encode():
        raise InvalidReceipt(what, "not base64url")
    return data
