"""References have one text and one parser; nothing unchecked becomes part of one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cas.digest import digest_of
from cas.errors import InvalidInput, InvalidName, InvalidReference
from cas.references import Reference, check_segment, extension_of, parse_reference

HEX = digest_of(b"abc").hex()
segments = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
extensions = st.from_regex(r"\A[a-z0-9]{1,16}\Z")


@given(segments, segments, segments, extensions, st.binary())
def test_a_reference_comes_back_from_its_text(
    family: str, tenant: str, run: str, extension: str, data: bytes
) -> None:
    reference = Reference(tenant, run, digest_of(data), extension, family)
    text = str(reference)
    assert text.isascii()
    assert len(text) <= 512
    assert parse_reference(text) == reference
    assert parse_reference(text.removeprefix("hwy://")) == reference


def test_the_text_is_as_the_requirements_say() -> None:
    reference = Reference("acme", "run-1", digest_of(b"abc"), "pdf")
    assert str(reference) == f"hwy://uploads/acme/run-1/{HEX}.pdf"
    assert str(Reference("a", "b", digest_of(b"abc"), "c", scheme="x")).startswith("x://uploads/")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hwy://",
        f"hwy://uploads/acme/{HEX}.pdf",
        f"hwy://uploads/acme/run/more/{HEX}.pdf",
        f"hwy://uploads//run/{HEX}.pdf",
        f"hwy://uploads/../run/{HEX}.pdf",
        f"hwy://uploads/acme/./{HEX}.pdf",
        f"hwy://uploads/ac me/run/{HEX}.pdf",
        f"hwy://uploads/ac%2Fme/run/{HEX}.pdf",
        f"hwy://uploads/äcme/run/{HEX}.pdf",
        f"hwy://uploads/acme/run/{HEX}",
        f"hwy://uploads/acme/run/{HEX}.",
        f"hwy://uploads/acme/run/{HEX}.PDF",
        f"hwy://uploads/acme/run/{HEX}.tar.gz",
        f"hwy://uploads/acme/run/{HEX.upper()}.pdf",
        f"hwy://uploads/acme/run/{HEX[1:]}.pdf",
        f"hwy://uploads/acme/run/{HEX}.pdf\n",
        f"hwy://uploads/acme/run/{HEX}.pdf/",
        f"s3://uploads/acme/run/{HEX}.pdf",
        f"hwy://hwy://uploads/acme/run/{HEX}.pdf",
        f"hwy:/uploads/acme/run/{HEX}.pdf",
        f"hwy://uploads/{'a' * 129}/run/{HEX}.pdf",
        f"hwy://uploads/acme\x00/run/{HEX}.pdf",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidReference):
        parse_reference(text)


@given(st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        reference = parse_reference(text)
    except InvalidReference:
        return
    assert str(reference).endswith(text)


@given(st.text(max_size=140))
def test_a_segment_that_passes_needs_no_quoting(text: str) -> None:
    try:
        check_segment(text, "run")
    except InvalidName:
        return
    assert text.isascii()
    assert not set(text) & set("/\\%?# \x00\n")
    assert text not in (".", "..")


@pytest.mark.parametrize(
    ("filename", "content_type", "extension"),
    [
        ("a.pdf", None, "pdf"),
        ("a.PDF", "text/plain", "pdf"),
        ("archive.tar.gz", None, "gz"),
        (".bashrc", None, "bashrc"),
        ("no extension", "image/png", "png"),
        ("a.", "application/pdf; charset=x", "pdf"),
        ("a.b c", None, "bin"),
        ("a.äöü", "image/png", "png"),
        ("a." + "x" * 17, None, "bin"),
        (None, "application/pdf", "pdf"),
        (None, "no/such-type-at-all", "bin"),
        (None, None, "bin"),
        ("", "", "bin"),
    ],
)
def test_the_extension_is_the_filenames_else_the_types(
    filename: str | None, content_type: str | None, extension: str
) -> None:
    assert extension_of(filename, content_type) == extension


@given(st.none() | st.text(max_size=40), st.none() | st.text(max_size=40))
def test_any_extension_fits_a_reference(filename: str | None, content_type: str | None) -> None:
    reference = Reference("a", "b", digest_of(b""), extension_of(filename, content_type))
    try:
        assert parse_reference(str(reference)) == reference
    except InvalidInput as error:
        raise AssertionError("an extension does not fit") from error
