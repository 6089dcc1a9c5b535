"""Signatures of callbacks, as any library of the scheme verifies them."""

from __future__ import annotations

import time

import pytest
from standardwebhooks import Webhook
from standardwebhooks.webhooks import WebhookVerificationError

from cas.callbacks import shown_secret, signature, tenant_secret

MASTER = bytes(range(32))


def test_a_library_verifies_what_was_signed_with_the_shown_secret() -> None:
    secret = tenant_secret(MASTER, "t1")
    at_s = int(time.time())
    headers = {
        "webhook-id": "d1",
        "webhook-timestamp": str(at_s),
        "webhook-signature": signature(secret, "d1", at_s, b'{"a":1}'),
    }
    library = Webhook(shown_secret(secret))
    assert library.verify(b'{"a":1}', headers) == {"a": 1}
    with pytest.raises(WebhookVerificationError):
        library.verify(b'{"a":2}', headers)
    with pytest.raises(WebhookVerificationError):
        library.verify(b'{"a":1}', {**headers, "webhook-id": "d2"})


def test_every_tenant_has_a_secret_of_its_own_that_stays() -> None:
    assert tenant_secret(MASTER, "t1") == tenant_secret(MASTER, "t1")
    assert len({tenant_secret(MASTER, name) for name in ("t1", "t2", "t", "1")}) == 4
    # Written out: another derivation would lock out every receiver there is.
    shown = shown_secret(tenant_secret(MASTER, "default"))
    assert shown == "whsec_GYnsbB4PV+A8x7Umc/Yieg+Xd9jgFAIU3H2yqV4oCe4="
