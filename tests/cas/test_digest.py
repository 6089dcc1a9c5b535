"""A digest has one canonical text, and nothing else is taken for one."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cas.digest import DIGEST_BYTES, digest_of, parse_digest
from cas.errors import InvalidDigest


@given(st.binary(max_size=2000))
def test_a_digest_is_the_sha256_and_its_text_comes_back(data: bytes) -> None:
    digest = digest_of(data)
    assert digest == hashlib.sha256(data).digest() == digest_of(memoryview(bytearray(data)))
    assert len(digest) == DIGEST_BYTES
    assert parse_digest(digest.hex()) == digest


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0" * 63,
        "0" * 65,
        "A" * 64,
        "g" * 64,
        "0" * 63 + "\n",
        " " + "0" * 63,
        "0x" + "0" * 62,
        "٠" * 64,  # digits, but not ASCII ones
        "0" * 32 + "\x00" + "0" * 31,
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidDigest) as error:
        parse_digest(text)
    assert error.value.value == text


@given(st.text(max_size=70))
def test_what_parses_is_canonical(text: str) -> None:
    try:
        digest = parse_digest(text)
    except InvalidDigest:
        return
    assert digest.hex() == text
