"""Addresses of mail: what is one, and what only looks so."""

from __future__ import annotations

from email.headerregistry import Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cas.mailboxes import Mailbox, read_mailbox


@pytest.mark.parametrize(
    ("text", "mailbox"),
    [
        ("ada@example.org", Mailbox("", "ada", "example.org")),
        (" <ada@example.org> ", Mailbox("", "ada", "example.org")),
        ("Ada Lovelace <ada.l+x@example.org>", Mailbox("Ada Lovelace", "ada.l+x", "example.org")),
        (f"{'A' * 60} B <ada@example.org>", Mailbox("A" * 60 + " B", "ada", "example.org")),
        ('"Lovelace, Ada" <ada@example.org>', Mailbox("Lovelace, Ada", "ada", "example.org")),
        ("Löve <ada@exämple.org>", Mailbox("Löve", "ada", "xn--exmple-cua.org")),
        # Python's own codec makes other domains of these, with other owners.
        ("ada@faß.de", Mailbox("", "ada", "xn--fa-hia.de")),
        ("ada@ΒΌΛΟΣ.gr", Mailbox("", "ada", "xn--nxasmq6b.gr")),
        ("ada@βόλος.gr", Mailbox("", "ada", "xn--nxasmm1c.gr")),
        ("ada@日本。jp", Mailbox("", "ada", "xn--wgv71a.jp")),
        ("ada@r3---sn-4g5e.example.org", Mailbox("", "ada", "r3---sn-4g5e.example.org")),
        ("jürgen@example.org", Mailbox("", "jürgen", "example.org")),
        ("root@localhost", Mailbox("", "root", "localhost")),
    ],
)
def test_an_address_is_read(text: str, mailbox: Mailbox) -> None:
    assert read_mailbox(text) == mailbox


@pytest.mark.parametrize(
    "text",
    [
        "", "ada", "ada@", "@example.org", "a@b@c", "a b@example.org", "a@b c", "a@b, c@d",
        "a@b;c@d", "a@b..c", "a@.b", "a@b.", "a..b@c", ".a@c", "a@-b.c", "a@ex_ample.org",
        "a@[127.0.0.1]", '"a b"@c', "a@b (c)", "a@b>", "<a@b", "a@b\nBcc: c@d", "a@b\r\n.\r\n",
        "a@b\0", "a\u202e@b", "Group: a@b;", "A <a@b> <c@d>", "a" * 65 + "@b", "a@" + "b" * 64,
        "a@" + ".".join(["b" * 60] * 5), "a@\u0301b.c", "a@ü-.c", "a@" + "ü" * 1000, "a@א1b.c",
        "A" * 201 + " <a@b>", "A" * 61 + " <a@b>", "=?utf-8?q?a=0d=0aX-Evil=3a_1?=@b.c",
        "=?utf-8?q?Ada?= <a@b.c>", "a=?b@c.d", '"=?utf-8?q?Ada?=" <a@b.c>',
    ],
)  # fmt: skip
def test_what_is_no_one_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"address|controls"):
        read_mailbox(text)


@given(st.text(max_size=40) | st.from_regex(r"[^@]{0,10}<?[^@]{1,10}@[a-z.\-]{1,10}>?"))
def test_what_is_read_is_safe_to_put_into_a_command_and_a_header(text: str) -> None:
    try:
        mailbox = read_mailbox(text)
    except ValueError:
        return
    assert not set(mailbox.address) & set('<> ",;:\r\n\\')
    assert "=?" not in mailbox.name + mailbox.address
    assert mailbox.domain.isascii()
    assert Address(mailbox.name, mailbox.local, mailbox.domain).addr_spec == mailbox.address
    assert read_mailbox(mailbox.address).address == mailbox.address
