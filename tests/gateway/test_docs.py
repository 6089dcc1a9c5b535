"""`/docs`: all that the document tells of, for people, and nothing a page should not do."""

from __future__ import annotations

import html
import json
import re

import msgspec

from tests.gateway.served import Served
from workflows.signatures import Scheme


def test_every_operation_stands_on_the_page_with_its_answers_and_refusals(served: Served) -> None:
    answer = served.ask("GET", "/docs")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    page = answer.body.decode()
    articles = dict(re.findall(r'<article id="([\w-]+)">(.*?)</article>', page, re.DOTALL))
    document = served.ask("GET", "/api/v1/openapi.json").form
    told = 0
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method == "parameters":
                continue
            article = html.unescape(articles[operation["operationId"]])
            url = re.sub(r"{(\w+)}", r"<\1>", path)
            wanted = [method.upper(), f'"$BLOBCASK{url}', "curl "]
            wanted += [each["name"] for each in operation["parameters"]]
            for status, reply in operation["responses"].items():
                wanted += [f"<code>{status}</code>", *re.findall(r"`(\w+)`", reply["description"])]
            assert [each for each in wanted if each not in article] == []
            assert ("$TOKEN" in article) == ("security" in operation)
            assert f'href="#{operation["operationId"]}"' in page
            told += 1
    assert told >= 20
    for name, schema in document["components"]["schemas"].items():
        article = html.unescape(articles[f"form-{name}"])
        wanted = [f"<code>{field}</code>" for field in schema.get("properties", {})]
        for told in (schema, *schema.get("properties", {}).values()):
            wanted += [part for part in re.split("`", told.get("description", "")) if part]
        assert [each for each in wanted if each not in article] == []


def test_how_a_webhook_of_any_sender_is_signed_stands_on_the_page(served: Served) -> None:
    page = html.unescape(served.ask("GET", "/docs").body.decode())
    articles = dict(re.findall(r'<article id="form-(\w+)">(.*?)</article>', page, re.DOTALL))
    link = '<a href="#form-SignatureForm">SignatureForm</a> or null'
    assert link in articles["RegistrationForm"]
    found = {}
    for told in articles["SignatureForm"].split("<dt>")[1:]:
        [(name, default)] = re.findall(
            r"^<code>(\w+)</code>.*?(?:Default: <code>(.*?)</code>.</dd>|</dd>)", told, re.DOTALL
        )
        found[name] = default
    kept = msgspec.to_builtins(Scheme(header="X"))
    assert found == {"header": "", **{name: json.dumps(kept[name]) for name in list(kept)[1:]}}


def test_the_page_may_do_nothing_and_asks_nobody_else(served: Served) -> None:
    answer = served.ask("GET", "/docs")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    page = answer.body.decode()
    assert "<script" not in page
    assert "style=" not in page
    for link in re.findall(r'(?:href|src)="([^"#]+)"', page):
        assert served.ask("GET", f"/{link}").status == 200
        assert not link.startswith(("http:", "https:", "/"))


def test_the_page_is_no_part_of_the_api(served: Served) -> None:
    assert "/docs" not in served.ask("GET", "/api/v1/openapi.json").form["paths"]
