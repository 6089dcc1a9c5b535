"""Receipts: what they prove, with what tools, and what does not pass for one."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import msgspec
import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from cas.cli import main
from cas.clock import DAY_US
from cas.config import Settings, StoreSettings
from cas.errors import InvalidReceipt, NotFound, ReceiptNotProved, UploadNotCompleted
from cas.keys import load_keys
from cas.receipts import (
    Receipts,
    canonical,
    jwks_of,
    keys_of_jwks,
    public_keys,
    read_key,
    thumbprint,
    verify,
)
from cas.references import parse_reference
from cas.store import Store
from cas.upload_links import UploadLink
from cas.uploads import UploadRequest
from tests.clocks import HandClock

OLD, NEW, OTHER = b"o" * 32, b"n" * 32, b"x" * 32
URL = "https://files.example.org"
JSON = dict[str, Any]


def completed(store: Store, *files: tuple[str, bytes], **wanted: Any) -> UploadLink:
    asked = UploadRequest("paper & ink — Verträge", max_files=len(files), **wanted)
    token = store.uploads("t", "ann").request(asked).upload_token
    for index, (filename, data) in enumerate(files):
        store.upload_link(token).put(index, data, filename=filename)
    store.upload_link(token).complete()
    return store.upload_link(token)


def document_of(store: Store, link: UploadLink, *seeds: bytes) -> JSON:
    made = Receipts(seeds or (NEW,), store.store_id(), URL)
    return made.document(link.upload, link.slots())


def packed(document: JSON) -> bytes:
    return json.dumps(document, indent=1).encode()


@pytest.fixture
def store(root: Path, clock: HandClock) -> Any:
    settings = Settings(store=StoreSettings(root=root, min_free=0))  # type: ignore[arg-type]
    with Store.open(root, settings, clock=clock) as opened:
        yield opened


@pytest.fixture
def document(store: Store) -> JSON:
    link = completed(store, ("Überblick “1”.txt", b"hello"), ("b.txt", b"world!"))
    return document_of(store, link)


# --- what it states


def test_a_receipt_states_what_came_and_is_proved_by_the_key(store: Store, document: JSON) -> None:
    stated = verify(packed(document), public_keys([NEW]))
    assert stated.issuer == URL
    assert stated.store_id == store.store_id()
    assert stated.name == "paper & ink — Verträge"
    assert [(file.filename, file.size_bytes, file.checksum_sha256) for file in stated.files] == [
        ("Überblick “1”.txt", 5, hashlib.sha256(b"hello").hexdigest()),
        ("b.txt", 6, hashlib.sha256(b"world!").hexdigest()),
    ]
    assert "t" not in document["receipt"], "whoever sees it learns of no tenant"


def test_it_holds_nothing_that_opens_something(store: Store) -> None:
    link = completed(store, ("a.txt", b"hello"))
    assert link.upload.upload_token not in json.dumps(document_of(store, link))


def test_only_a_completed_upload_has_one(store: Store) -> None:
    uploads = store.uploads("t", "ann")
    token = uploads.request(UploadRequest("papers")).upload_token
    link = store.upload_link(token)
    link.put(0, b"x", filename="a.txt")
    with pytest.raises(UploadNotCompleted, match="pending"):
        document_of(store, link)
    uploads.cancel(token)
    with pytest.raises(UploadNotCompleted, match="cancelled"):
        document_of(store, store.upload_link(token))


def test_it_is_the_same_at_any_time_and_outlives_its_files(store: Store, clock: HandClock) -> None:
    first = completed(store, ("a.txt", b"hello"), ("b.txt", b"world"))
    before = document_of(store, first)
    clock.advance(DAY_US)
    files = store.files("t", "ann")
    for file in files.list().items:
        files.delete(parse_reference(file.storage_ref))
    assert files.list().items == []
    again = store.upload_link(first.upload.upload_token)
    assert document_of(store, again) == before


def test_the_same_bytes_under_another_name_keep_both_names(store: Store) -> None:
    completed(store, ("first.txt", b"hello"))
    again = completed(store, ("second.txt", b"hello"))
    files = document_of(store, again)["receipt"]["files"]
    assert [file["filename"] for file in files] == ["second.txt"]


# --- keys


def test_the_newest_key_signs_and_receipts_of_the_old_one_stay_good(store: Store) -> None:
    link = completed(store, ("a.txt", b"hello"))
    old, new = document_of(store, link, OLD), document_of(store, link, OLD, NEW)
    both = keys_of_jwks(packed(Receipts([OLD, NEW], "", "").jwks()))
    for document in (old, new):
        assert verify(packed(document), both).upload_id == link.upload.upload_id
    verify(packed(new), public_keys([NEW]))
    with pytest.raises(ReceiptNotProved, match=thumbprint(public_keys([NEW])[0])):
        verify(packed(new), public_keys([OLD]))
    with pytest.raises(ReceiptNotProved):
        verify(packed(new), [])


def test_the_thumbprint_is_that_of_the_standard() -> None:
    """The example of RFC 8037, appendix A.3."""
    key = read_key("11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo")
    assert thumbprint(key) == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"
    assert read_key("11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=") == key


@pytest.mark.parametrize("text", ["", "x", "A" * 42, "A" * 44, "é" * 43, "A" * 42 + "!"])
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(InvalidReceipt):
        read_key(text)


@pytest.mark.parametrize("data", [b"", b"[]", b'{"keys": []}', b'{"keys": [{"kty": "RSA"}]}'])
def test_what_is_no_list_of_keys_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidReceipt):
        keys_of_jwks(data)


# --- forged and broken ones


def resigned(document: JSON, **header: Any) -> JSON:
    """Signed with the right key, but under another header."""
    said = {"alg": "EdDSA", "kid": thumbprint(public_keys([NEW])[0]), "typ": "blobcask-receipt"}
    head = base64.urlsafe_b64encode(canonical({**said, **header})).rstrip(b"=").decode()
    content = base64.urlsafe_b64encode(canonical(document["receipt"])).rstrip(b"=").decode()
    signature = Ed25519PrivateKey.from_private_bytes(NEW).sign(f"{head}.{content}".encode())
    text = base64.urlsafe_b64encode(signature).rstrip(b"=").decode()
    return {**document, "signature": f"{head}..{text}"}


def test_any_change_of_what_is_stated_is_noticed(document: JSON) -> None:
    receipt = document["receipt"]
    file = receipt["files"][0]
    for changed in (
        {**receipt, "name": "other"},
        {**receipt, "version": 2},
        {**receipt, "issuer": None},
        {**receipt, "added": 1},
        {**receipt, "files": receipt["files"][:1]},
        {**receipt, "files": receipt["files"][::-1]},
        {**receipt, "files": [{**file, "size_bytes": 6}, *receipt["files"][1:]]},
        {name: value for name, value in receipt.items() if name != "store_id"},
        {},
        None,
    ):
        with pytest.raises(ReceiptNotProved):
            verify(packed({**document, "receipt": changed}), public_keys([NEW]))


def test_another_order_and_indentation_are_the_same_receipt(document: JSON) -> None:
    for data in (
        json.dumps(document, sort_keys=True, ensure_ascii=True).encode(),
        json.dumps(document, indent=8, ensure_ascii=False).encode(),
    ):
        assert verify(data, public_keys([NEW])).name


def test_a_genuine_statement_of_another_kind_is_no_receipt(document: JSON) -> None:
    verify(packed(resigned(document)), public_keys([NEW]))
    for header in ({"alg": "none"}, {"alg": "HS256"}, {"typ": "JWT"}, {"crit": ["x"]}, {"kid": 5}):
        with pytest.raises(InvalidReceipt):
            verify(packed(resigned(document, **header)), public_keys([NEW]))
    unknown = resigned({**document, "receipt": {**document["receipt"], "version": 2}})
    with pytest.raises(InvalidReceipt, match="version"):
        verify(packed(unknown), public_keys([NEW]))
    incomplete = resigned({**document, "receipt": {"version": 1}})
    with pytest.raises(InvalidReceipt):
        verify(packed(incomplete), public_keys([NEW]))


def test_what_two_readers_could_take_for_two_things_is_refused(document: JSON) -> None:
    good = packed(document).decode()
    head, _, signature = document["signature"].partition("..")
    for bad in (
        good.replace('"version": 1', '"version": 1, "version": 1'),
        good.replace('"version": 1', '"version": 1.0'),
        good.replace('"version": 1', f'"version": {1 << 53}'),
        good.replace('"version": 1', '"version": true'),
        good.replace('"name"', '"n\\u00e4me"'),
        good.replace('"b.txt"', '"\\ud800"'),
        good.replace(signature, signature + "="),
        good.replace(signature, signature[:-1]),
        good.replace(f"{head}..", f"{head}.e30."),
        good.replace(f"{head}..", f"{head}."),
        good.replace(head, ""),
        good + "x",
        "[" * 100_000,
        "null",
        "{}",
        "",
    ):
        assert bad != good
        with pytest.raises(InvalidReceipt):
            verify(bad.encode(), public_keys([NEW]))


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_are_refused_and_no_more(data: bytes) -> None:
    with pytest.raises(InvalidReceipt):
        verify(data, public_keys([NEW]))


PLAIN = st.recursive(
    st.none() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="ascii")), inner),
    max_leaves=10,
)


@given(PLAIN)
def test_the_canonical_form_is_the_value_and_is_canonical(value: Any) -> None:
    form = canonical(value)
    assert json.loads(form) == value
    assert canonical(json.loads(form)) == form


def test_the_canonical_form_is_that_of_the_standard() -> None:
    """What RFC 8785, section 3.2.3, says of text; its numbers do not occur here."""
    value = {"b": "\u20ac$\u000f\u000aA'\u0042\u0022\u005c\\\"/", "a": [None, 7], "": "\x7fü"}
    assert canonical(value) == (
        b'{"":"\x7f\xc3\xbc","a":[null,7],"b":"\xe2\x82\xac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    )


# --- other people's tools


def test_any_jose_library_proves_it(document: JSON) -> None:
    head, _, signature = document["signature"].partition("..")
    content = base64.urlsafe_b64encode(canonical(document["receipt"])).rstrip(b"=").decode()
    jwk = jwt.PyJWKSet.from_dict(jwks_of(public_keys([OLD, NEW])))[
        jwt.get_unverified_header(f"{head}..{signature}")["kid"]
    ]
    assert isinstance(jwk.key, Ed25519PublicKey)
    proved = jwt.PyJWS().decode(f"{head}.{content}.{signature}", jwk, ["EdDSA"])
    assert json.loads(proved) == document["receipt"]


# As the documentation gives it.
WITH_OPENSSL = r"""
kid=$(jq -r '.signature | split(".")[0] | gsub("-"; "+") | gsub("_"; "/")
             | @base64d | fromjson | .kid' receipt.json)
{ printf '\060\052\060\005\006\003\053\145\160\003\041\000'  # "an Ed25519 key:" in DER
  { jq -j --arg kid "$kid" '.keys[] | select(.kid == $kid) | .x' keys.json; printf =; } \
  | basenc -d --base64url; } > key.der
{ jq -j '.signature | split(".")[0] + "."' receipt.json
  jq -jcS .receipt receipt.json | basenc -w0 --base64url | tr -d =; } > signed
{ jq -j '.signature | split(".")[2]' receipt.json; printf ==; } | basenc -d --base64url > signature
openssl pkeyutl -verify -pubin -keyform DER -inkey key.der -rawin -in signed -sigfile signature
"""


def test_openssl_proves_it_without_this_program(
    document: JSON, tmp_path: Path, program: Callable[[str], str]
) -> None:
    for name in ("openssl", "jq", "basenc", "bash"):
        program(name)
    (tmp_path / "keys.json").write_text(json.dumps(jwks_of(public_keys([OLD, NEW]))))

    def prove() -> subprocess.CompletedProcess[str]:
        command = ["bash", "-euo", "pipefail", "-c", WITH_OPENSSL]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    (tmp_path / "receipt.json").write_bytes(packed(document))
    good = prove()
    assert (good.returncode, good.stdout) == (0, "Signature Verified Successfully\n"), good.stderr
    document["receipt"]["name"] = "other"
    (tmp_path / "receipt.json").write_bytes(packed(document))
    assert prove().returncode == 1


# --- the command


@pytest.fixture
def folder(store: Store, tmp_path: Path) -> Path:
    """A receipt of two files, the files, and a foreign one."""
    keys = load_keys(store.settings)
    link = completed(store, ("a.txt", b"hello"), ("b.txt", b"world!"))
    (tmp_path / "receipt.json").write_bytes(packed(document_of(store, link, *keys.receipts)))
    for name, data in (("a.txt", b"hello"), ("renamed", b"world!"), ("c.txt", b"hellO")):
        (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.fixture
def run(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    for name in list(os.environ):
        if name.startswith("BLOBCASK_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(folder)

    def call(*arguments: str, root: Path | None = root) -> Result:
        where = [] if root is None else ["--root", str(root)]
        return CliRunner().invoke(main, ["receipt", *arguments, *where], prog_name="blobcask")

    return call


def test_the_command_proves_a_receipt_and_files_offline(
    run: Callable[..., Result], folder: Path
) -> None:
    saved = run("keys")
    assert saved.exit_code == 0
    (folder / "keys.json").write_text(saved.stdout)
    nowhere = folder / "nowhere"
    good = run("verify", "receipt.json", "a.txt", "renamed", "--keys", "keys.json", root=nowhere)
    assert good.exit_code == 0, good.output
    assert "a.txt" in good.stdout
    assert not nowhere.exists()
    form = json.loads(
        run("verify", "receipt.json", "renamed", "--keys", "keys.json", "--json").stdout
    )
    assert [file["path"] for file in form["files"]] == [None, "renamed"]
    key = json.loads(saved.stdout)["keys"][0]["x"]
    assert run("verify", "receipt.json", "--key", key, root=nowhere).exit_code == 0
    assert run("verify", "receipt.json").exit_code == 0, "the keys of --root"


def test_the_command_says_by_its_code_what_is_wrong(
    run: Callable[..., Result], folder: Path
) -> None:
    other = base64.urlsafe_b64encode(public_keys([OTHER])[0]).decode()
    (folder / "broken.json").write_text("{}")
    changed = (folder / "receipt.json").read_text().replace("b.txt", "c.txt")
    (folder / "changed.json").write_text(changed)
    for arguments, code in (
        (["verify", "receipt.json", "c.txt"], 4),
        (["verify", "receipt.json", "a.txt", "c.txt"], 4),
        (["verify", "changed.json"], 4),
        (["verify", "receipt.json", "--key", other], 4),
        (["verify", "broken.json"], 2),
        (["verify", "receipt.json", "--key", "x"], 2),
        (["verify", "receipt.json", "--key", other, "--keys", "receipt.json"], 2),
        (["verify", "receipt.json", "--keys", "receipt.json"], 2),
        (["verify", "absent.json"], 10),
        (["verify", "receipt.json", "absent"], 10),
        (["keys", "--server", "http://127.0.0.1:1"], 2),
    ):
        result = run(*arguments)
        assert result.exit_code == code, (arguments, result.output)
    assert run("verify", "receipt.json", root=folder / "nowhere").exit_code == 3
    assert "c.txt" in run("verify", "receipt.json", "a.txt", "c.txt").stderr


def test_a_record_of_before_there_were_receipts_is_no_fault(store: Store) -> None:
    link = completed(store, ("a.txt", b"hello"))
    slots = [msgspec.structs.replace(slot, received_sha256=None) for slot in link.slots()]
    with pytest.raises(NotFound):
        Receipts([NEW], "", "").document(link.upload, slots)
