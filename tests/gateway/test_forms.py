"""JSON at the door: what is read of a body, and how a form is sent."""

from __future__ import annotations

from typing import Any

import falcon
import msgspec
import pytest

from cas.errors import InvalidRequest
from gateway import forms


class Named(msgspec.Struct):
    values: dict[str, Any]


def test_a_member_that_is_there_twice_is_found_among_half_a_million_others() -> None:
    """To look at each of them for each other one would take an hour."""
    names = [b'"%x":0' % number for number in range(500_000)]
    body = b'{"values":{' + b",".join([*names, names[-1]]) + b"}}"
    with pytest.raises(InvalidRequest, match="'7a11f' is there twice"):
        forms.read(body, Named)
    assert len(forms.read(b'{"values":{' + b",".join(names) + b"}}", Named).values) == 500_000


def test_a_refusal_repeats_a_long_name_only_in_part() -> None:
    name = b'"' + b"n" * 100_000 + b'":0'
    with pytest.raises(InvalidRequest, match="is there twice") as refused:
        forms.read(b'{"values":{' + name + b"," + name + b"}}", Named)
    assert len(str(refused.value)) < 200


def test_what_is_json_already_is_sent_as_it_is() -> None:
    resp = falcon.Response()
    forms.answer(resp, {"name": "Zoë", "value": msgspec.Raw(b'{"kept": 1.50}')})
    assert resp.data == '{"name":"Zoë","value":{"kept": 1.50}}'.encode()
