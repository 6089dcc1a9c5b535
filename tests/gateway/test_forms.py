"""JSON at the door: what is read of a body, and how a form is sent."""

from __future__ import annotations

import threading
import tracemalloc
from typing import Any

import falcon
import msgspec
import pytest

from cas.errors import InvalidRequest, TooLarge
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


class Passed(msgspec.Struct):
    value: msgspec.Raw


@pytest.mark.parametrize(
    "body",
    [
        rb'{"value":1,"v\u0061lue":2}',
        b'{"value":{"x":[{}, {"y" : 1, "z":[], "y"\n:2}]}}',
        b'{"value":[{"a":{"a":0},"b":"a","a":0}]}',
        rb'{"value":{"\"":0,"x":"\\","\"":0}}',
    ],
)
def test_a_member_that_is_there_twice_is_found_at_any_depth_however_it_is_written(
    body: bytes,
) -> None:
    with pytest.raises(InvalidRequest, match="is there twice"):
        forms.read(body, Passed)


@pytest.mark.parametrize(
    "value",
    [
        b'{"a":{"a":{"a":0}},"b":{"a":0}}',
        b'[{"a":0},{"a":0},"a","a"]',
        rb'{"a":"\",\"a\":{","b":"}{\\","A":"a"}',
        '{"é":0,"e":0,"":1}'.encode(),
    ],
)
def test_a_name_may_be_there_again_in_another_object_or_in_a_text(value: bytes) -> None:
    assert forms.read(b'{"value":' + value + b"}", Passed).value == msgspec.Raw(value)


def test_a_body_of_very_many_values_is_read_without_building_any() -> None:
    body = b'{"value":[' + b"[]," * 300_000 + b"[]]}"
    tracemalloc.start()
    try:
        asked = forms.read(body, Passed)
        with pytest.raises(TooLarge):
            forms.built("value", asked.value, list[Any], len(body) // 2)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * len(body)


@pytest.mark.parametrize("value", [b"[1,2,3]", b"[1,  2,\n3 ]", rb'"\u0041\u0042\/12"'])
def test_a_value_is_as_long_as_it_would_be_kept(value: bytes) -> None:
    kept = msgspec.json.encode(msgspec.json.decode(value))
    forms.built("value", msgspec.Raw(value), Any, len(kept))
    with pytest.raises(TooLarge):
        forms.check_length(msgspec.Raw(value), len(kept) - 1)


def test_what_large_bodies_come_to_is_built_one_at_a_time() -> None:
    large, built = b" " * (1 << 20), threading.Event()

    def build_another() -> None:
        with forms.building(large):
            built.set()

    thread = threading.Thread(target=build_another)
    with forms.building(large):
        thread.start()
        with forms.building(large), forms.building(b"{}"):
            assert not built.is_set()
    thread.join()
    assert built.is_set()


def test_what_is_json_already_is_sent_as_it_is() -> None:
    resp = falcon.Response()
    forms.answer(resp, {"name": "Zoë", "value": msgspec.Raw(b'{"kept": 1.50}')})
    assert resp.data == '{"name":"Zoë","value":{"kept": 1.50}}'.encode()
