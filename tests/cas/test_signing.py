"""Signed URLs: what is signed, which keys count, and what a forger learns."""

from __future__ import annotations

import msgspec
import pytest

from cas.clock import SECOND_US
from cas.errors import BadSignature, LinkExpired
from cas.signing import DOWNLOAD, SLOT, Claim, Signer

OLD, NEW = b"o" * 32, b"n" * 32
CLAIM = Claim(SLOT, "PUT", ("Xk9mP2qR", "0"), 1_000, (50,))
BEFORE, AFTER = 999 * SECOND_US, 1_000 * SECOND_US


def test_a_signature_opens_its_claim_until_it_expires() -> None:
    signer = Signer([NEW])
    signature = signer.sign(CLAIM)
    signer.verify(CLAIM, signature, BEFORE)
    with pytest.raises(LinkExpired):
        signer.verify(CLAIM, signature, AFTER)


@pytest.mark.parametrize(
    "change",
    [
        {"purpose": DOWNLOAD},
        {"method": "DELETE"},
        {"method": "GET"},
        {"subject": ("Xk9mP2qR", "1")},
        {"subject": ("Xk9mP2q", "R", "0")},
        {"subject": ('Xk9mP2qR", "0',)},
        {"expires": 1_001},
        {"limits": (51,)},
        {"limits": ()},
    ],
)
def test_a_signature_opens_nothing_else(change: dict[str, object]) -> None:
    signer = Signer([NEW])
    signature = signer.sign(CLAIM)
    with pytest.raises(BadSignature):
        signer.verify(msgspec.structs.replace(CLAIM, **change), signature, BEFORE)


def test_a_get_admits_head_and_nothing_more() -> None:
    signer = Signer([NEW])
    get = Claim(DOWNLOAD, "GET", ("id", "name"), 1_000)
    signature = signer.sign(get)
    signer.verify(msgspec.structs.replace(get, method="HEAD"), signature, BEFORE)
    with pytest.raises(BadSignature):
        signer.verify(msgspec.structs.replace(get, method="PUT"), signature, BEFORE)


@pytest.mark.parametrize("forged", ["", "x", "A" * 43, "é" * 43, "\udcff", "A" * 10_000])
def test_a_forged_signature_is_refused_even_when_the_time_is_over(forged: str) -> None:
    """The forger of an old link is told no more than the forger of a new one."""
    with pytest.raises(BadSignature):
        Signer([NEW]).verify(CLAIM, forged, AFTER)


def test_the_newest_key_signs_and_all_keys_of_the_ring_verify() -> None:
    ring = Signer([OLD, NEW])
    assert ring.sign(CLAIM) == Signer([NEW]).sign(CLAIM)
    ring.verify(CLAIM, Signer([OLD]).sign(CLAIM), BEFORE)
    with pytest.raises(BadSignature):
        Signer([NEW]).verify(CLAIM, Signer([OLD]).sign(CLAIM), BEFORE)
