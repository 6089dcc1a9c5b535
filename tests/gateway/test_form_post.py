"""The upload page's plain form over HTTP: what browsers send, and what nobody decent does."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import falcon.testing
import pytest

from cas.config import Settings, StoreSettings
from cas.keys import load_keys
from cas.records import UploadFile
from cas.store import Store
from cas.upload_links import UploadLink
from cas.uploads import UploadRequest
from gateway.app import create_app
from tests.gateway.served import Answer, Served, serving

FORM = {"Content-Type": "multipart/form-data; boundary=line"}
END = b"--line--\r\n"


@pytest.fixture(scope="module")
def served(disk_folder: Path) -> Iterator[Served]:
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder,
        serving(Path(folder)) as server,
    ):
        yield server


def part(data: bytes, head: str = "", *, name: str = "files", filename: str | None = None) -> bytes:
    of_file = "" if filename is None else f'; filename="{filename}"'
    lines = f'--line\r\nContent-Disposition: form-data; name="{name}"{of_file}\r\n{head}\r\n'
    return lines.encode() + data + b"\r\n"


def post(served: Served, asked: dict[str, Any], body: Any, **headers: str) -> Answer:
    sent = {**FORM, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return served.ask("POST", f"/u/{asked['upload_token']}", body, headers=sent)


def files(served: Served, asked: dict[str, Any]) -> dict[str, str]:
    form = served.ask("GET", f"/api/v1/uploads/{asked['upload_token']}/info").form
    return {file["filename"]: file["checksum_sha256"] for file in form["files"]}


def page_of(answer: Answer, status: int) -> str:
    """A page for people, whatever the status, under the page's own policy."""
    assert answer.status == status
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    return answer.body.decode()


def test_files_go_into_free_slots_and_the_answer_leads_back_to_the_page(served: Served) -> None:
    asked = served.request_upload(max_files=3)
    body = part(b"a", filename="a.txt") + part(b"", filename="") + part(b"bb", filename="b.txt")
    answer = post(served, asked, body + END)
    assert (answer.status, answer.headers["location"]) == (303, asked["upload_token"])
    assert answer.headers["referrer-policy"] == "no-referrer"
    post(served, asked, part(b"c", filename="c.txt") + END)
    expected = {"a.txt": b"a", "b.txt": b"bb", "c.txt": b"c"}
    assert files(served, asked) == {
        name: hashlib.sha256(data).hexdigest() for name, data in expected.items()
    }


def test_a_chunked_form_is_read_too(served: Served) -> None:
    asked = served.request_upload(max_files=1)
    body = part(b"x" * 300_000, filename="a.txt") + part(b"yes", name="finish") + END
    pieces = (body[at : at + 70_000] for at in range(0, len(body), 70_000))
    answer = post(served, asked, pieces)  # of unknown length: sent in chunks
    assert answer.status == 303
    form = served.ask("GET", f"/api/v1/uploads/{asked['upload_token']}/info").form
    assert form["status"] == "completed"


def test_a_slot_that_something_else_waits_for_is_left_to_it(served: Served) -> None:
    asked = served.request_upload(max_files=1)
    tus = {"Tus-Resumable": "1.0.0", "Upload-Length": "10"}
    path = f"/api/v1/uploads/{asked['upload_token']}/tus/"
    assert served.ask("POST", path, headers=tus).status == 201
    answer = post(served, asked, part(b"a", filename="a.txt") + END)
    assert "only 1 file is wanted" in page_of(answer, 422)
    put = asked["presigned_urls"][0]
    refused = served.ask("PUT", put, b"a", headers={"If-None-Match": "*"})
    assert (refused.status, refused.code) == (412, "slot_taken")


def test_put_replaces_unless_it_is_told_not_to(served: Served) -> None:
    asked = served.request_upload(max_files=1)
    put = asked["presigned_urls"][0] + "&filename=a.txt"
    once = {"If-None-Match": "*"}
    assert served.ask("PUT", put, b"a", headers=once).status == 200
    assert served.ask("PUT", put, b"b", headers=once).code == "slot_taken"
    assert files(served, asked)["a.txt"] == hashlib.sha256(b"a").hexdigest()
    assert served.ask("PUT", put, b"c").status == 200
    assert files(served, asked)["a.txt"] == hashlib.sha256(b"c").hexdigest()


def test_a_refused_file_leaves_the_others_their_chance(served: Served) -> None:
    asked = served.request_upload(max_files=5, max_size_mb=1)
    body = b"".join(
        [
            part(bytes(3_000_000), filename="big.bin"),
            part(b"a", filename="../evil"),
            part(b"good", filename="good.txt"),
            part(b"yes", name="finish"),
        ]
    )
    page = page_of(post(served, asked, body + END), 422)
    assert "It is larger than allowed." in page
    assert "holds a path separator" in page
    assert list(files(served, asked)) == ["good.txt"]  # and nothing was completed


@pytest.mark.parametrize(
    "body",
    {
        "nothing": b"",
        "no end": part(b"a", filename="lost.txt"),
        "an end inside a file": part(b"a" * 100_000, filename="lost.txt")[:90_000],
        "no boundary at all": b"a" * 200_000,
        "a file without a name": part(b"a") + END,
        "a form within the form": part(
            b"", "Content-Type: multipart/mixed; boundary=b\r\n", filename="lost.txt"
        )
        + END,
        "a transfer encoding": part(
            b"YQ==", "Content-Transfer-Encoding: base64\r\n", filename="lost.txt"
        )
        + END,
        "a head of 10 MB": part(b"a", "X: " + "x" * 10_000_000 + "\r\n", filename="lost.txt") + END,
        "a head that is no text": part(b"a", filename="lost.txt").replace(b"lost", b"\xff\xfe")
        + END,
        "a type that is no text": part(b"a", "Content-Type: \r\n", filename="lost.txt").replace(
            b"Type: ", b"Type: \xff"
        )
        + END,
        "a field of 1 MB": part(b"9" * 1_000_000, name="remove") + END,
        "a field that is no text": part(b"\xff", name="remove") + END,
    }.items(),
    ids=lambda case: case[0],
)
def test_what_is_no_whole_form_is_refused_and_nothing_of_it_is_kept(
    served: Served, body: tuple[str, bytes]
) -> None:
    asked = served.request_upload(max_files=2)
    page = page_of(post(served, asked, body[1]), 400)
    assert "did not arrive whole" in page
    assert files(served, asked) == {}


def test_too_many_parts_are_refused(served: Served) -> None:
    asked = served.request_upload(max_files=1)
    page_of(post(served, asked, part(b"", filename="") * 100 + END), 400)


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=" + "b" * 71,
        "application/x-www-form-urlencoded",
        "text/plain",
    ],
)
def test_other_forms_are_refused(served: Served, content_type: str) -> None:
    asked = served.request_upload(max_files=1)
    body = part(b"a", filename="a.txt") + END
    page_of(post(served, asked, body, Content_Type=content_type), 400)
    assert files(served, asked) == {}


def test_nothing_to_send_is_said_so(served: Served) -> None:
    asked = served.request_upload(max_files=1)
    body = part(b"", filename="") + part(b"yes", name="finish") + END
    assert "Please choose a file first" in page_of(post(served, asked, body), 422)


def test_what_is_removed_twice_is_gone(served: Served) -> None:
    asked = served.request_upload(max_files=1)
    post(served, asked, part(b"a", filename="a.txt") + END)
    for unwanted in ("0", "0", "99999", "no-such-partial", "x" * 500):
        answer = post(served, asked, part(unwanted.encode(), name="remove") + END)
        assert answer.status == 303
    assert files(served, asked) == {}


def test_a_closed_upload_leads_to_its_page_and_an_unknown_one_nowhere(served: Served) -> None:
    asked = served.request_upload(max_files=1)
    path = f"/api/v1/uploads/{asked['upload_token']}/cancel"
    assert served.ask("POST", path, token=served.admin).status == 200
    assert post(served, asked, part(b"a", filename="a.txt") + END).status == 303
    unknown = {"upload_token": "AAAAAAAA"}
    page_of(post(served, unknown, part(b"a", filename="a.txt") + END), 404)


def test_the_page_tells_phones_and_desktops_what_to_offer(served: Served) -> None:
    asked = served.request_upload(allowed_types=["jpg", "pdf"])
    page = served.ask("GET", asked["upload_url"]).body.decode()
    assert 'accept=".jpeg,.jpg,.pdf,application/pdf,image/jpeg"' in page


def test_the_pages_files_may_be_kept_for_ever_under_their_version(served: Served) -> None:
    page = served.ask("GET", served.request_upload()["upload_url"]).body.decode()
    version = page.partition("../static/")[2].partition("/")[0]
    for name in ("upload.js", "phrases.js", "upload.css", "icon.svg"):
        answer = served.ask("GET", f"/static/{version}/{name}")
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert served.ask("GET", f"/static/old/{name}").headers["cache-control"] == "no-cache"


def test_limits_are_told_to_people_as_pages(disk_folder: Path) -> None:
    rates = {"LIMITS__GUESSES": "1/h", "LIMITS__LINK_BYTES": "1KiB/d"}
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder,
        serving(Path(folder), **rates) as limited,
    ):
        asked = limited.request_upload(max_files=3)
        large = part(b"x" * 5_000, filename="a.txt") + END
        assert "too much at once" in page_of(post(limited, asked, large), 413)
        small = part(b"x" * 600, filename="a.txt") + END
        assert post(limited, asked, small).status == 303
        page = page_of(wait := post(limited, asked, small), 429)
        assert "Please wait a little" in page
        assert int(wait.headers["retry-after"]) > 0
        assert [limited.ask("GET", f"/u/{n:08}").status for n in range(3)][-1] == 429


def test_the_slots_are_looked_up_once_for_a_form_and_not_again_when_none_is_left(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(store=StoreSettings(root=root))
    looked: list[None] = []
    slots = UploadLink.slots

    def look(link: UploadLink) -> list[UploadFile]:
        looked.append(None)
        return slots(link)

    monkeypatch.setattr(UploadLink, "slots", look)
    with Store.open(root, settings) as store:
        upload = store.uploads("t", "ada").request(UploadRequest("papers", max_files=3))
        client = falcon.testing.TestClient(create_app(store, settings, load_keys(settings)))
        path = f"/u/{upload.upload_token}"
        three = b"".join(part(b"x", filename=f"{n}.txt") for n in range(3))
        assert client.simulate_post(path, headers=FORM, body=three + END).status_code == 303
        assert len(looked) == 1
        answer = client.simulate_post(path, headers=FORM, body=three + END)
        assert answer.status_code == 422
        assert len(looked) == 3  # for the form, and for the page that answers it


def test_a_slot_that_a_form_empties_can_be_filled_by_the_rest_of_it(served: Served) -> None:
    asked = served.request_upload(max_files=1)
    assert post(served, asked, part(b"a", filename="a.txt") + END).status == 303
    body = part(b"b", filename="b.txt") + part(b"0", name="remove") + part(b"c", filename="c.txt")
    page_of(post(served, asked, body + END), 422)
    assert set(files(served, asked)) == {"c.txt"}
