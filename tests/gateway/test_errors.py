"""The table of errors: every error of the store has a row, and rows tell nothing inside."""

from __future__ import annotations

from pathlib import Path

import falcon
import pytest
from falcon import testing

from cas import errors as cas
from cas.errors import BlobcaskError
from gateway import errors


def kinds(kind: type[BlobcaskError]) -> list[type[BlobcaskError]]:
    return [kind, *(deeper for below in kind.__subclasses__() for deeper in kinds(below))]


# What other packages raise among themselves never reaches a request.
OWN = [kind for kind in kinds(BlobcaskError)[1:] if not kind.__module__.startswith("replicator.")]


def answered(error: Exception) -> testing.Result:
    """What a client is told when a resource raises `error`."""

    class Resource:
        def on_get(self, _req: falcon.Request, _resp: falcon.Response) -> None:
            raise error

    app: falcon.App[falcon.Request, falcon.Response] = falcon.App(middleware=[errors.RequestIds()])
    errors.install(app, reopen=lambda: None)
    app.add_route("/", Resource())
    return testing.TestClient(app).simulate_get("/")


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.__name__)
def test_every_error_raised_on_purpose_has_a_row_of_its_own_or_its_kind(
    kind: type[BlobcaskError],
) -> None:
    remote = (cas.AccessDenied, cas.ServerRefused, cas.ServerUnreachable)
    elsewhere = ("cas.adoption", "cas.remote.wire", "cas.remote.bodies")
    starting = (cas.InvalidSetting, cas.TargetNeeded)
    if kind in (*starting, cas.WrongProcess, *remote) or kind.__module__ in elsewhere:
        return  # stops the start; is a fault of ours; is a client's; never leaves its module
    row = next(errors.TABLE[one] for one in kind.__mro__ if one in errors.TABLE)
    assert row.status != 500
    assert row.code != "internal"


def test_a_code_means_one_status() -> None:
    statuses: dict[str, set[int]] = {}
    for row in errors.TABLE.values():
        statuses.setdefault(row.code, set()).add(row.status)
    assert all(len(one) == 1 for one in statuses.values())


def test_a_full_store_tells_numbers_but_no_paths() -> None:
    answer = answered(cas.StoreFull(10, 200, Path("/srv/secret")))
    assert answer.status_code == 507
    assert (answer.json["free_bytes"], answer.json["needed_bytes"]) == (10, 200)
    assert "secret" not in answer.text


def test_a_fault_of_ours_tells_nothing() -> None:
    answer = answered(RuntimeError("secret"))
    assert (answer.status_code, answer.json["code"]) == (500, "internal")
    assert "secret" not in answer.text


def test_what_is_not_there_is_told_alike_whatever_was_asked_for() -> None:
    one = answered(cas.NotFound("upload", "AAAAAAAA"))
    other = answered(cas.NotFound("file", "hwy://uploads/other/…"))
    forged = answered(errors.BadSignature())
    assert one.json == other.json == forged.json


def test_refused_files_are_listed() -> None:
    answer = answered(cas.FilesRefused([(0, "a.pdf", "is a ZIP archive")]))
    assert answer.status_code == 422
    assert answer.json["reasons"] == [
        {"index": 0, "filename": "a.pdf", "reason": "is a ZIP archive"}
    ]


def test_an_unavailable_store_says_when_to_come_back() -> None:
    answer = answered(cas.CatalogFailed("disk at /srv/secret"))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "secret" not in answer.text
