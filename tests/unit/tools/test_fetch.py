"""Fetch: pages of a real server on loopback as text, within bounds, marked as foreign."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from serve_app.config.tools import FetchConfig
from serve_app.errors import ToolRetry
from serve_app.tools.base import ToolResult
from serve_app.tools.web.fetch import Fetch
from serve_app.tools.web.page import MAX_HTML_CHARS, UNTRUSTED
from tests.web_fakes import Site, running_site

ARTICLE = """<html><head><title>Salmon &amp;
 rivers</title></head><body><nav><a href="/">Home</a> <a href="/x">Shop</a></nav><article>
<h1>Salmon</h1><p>Atlantic salmon return to their river after one to four years at sea.</p>
<p>They find it by smell, and few of them come back a second time, as counts at weirs show.</p>
</article><script>steal()</script><footer>Imprint</footer></body></html>"""


@pytest.fixture
def site() -> Iterator[Site]:
    with running_site() as running:
        yield running


def fetch(site: Site, path: str, start_char: int | None = None, **settings: Any) -> ToolResult:
    tool = Fetch(FetchConfig(tool_id="fetch", allow=(f"127.0.0.1:{site.port}",), **settings))
    arguments = {"url": f"{site.url}{path}"} | (
        {} if start_char is None else {"start_char": start_char}
    )
    return tool.run(arguments, 60.0)


def test_page_comes_as_title_address_and_main_text(site: Site) -> None:
    site.page("/salmon", ARTICLE, "text/html; charset=utf-8")
    result = fetch(site, "/salmon")
    assert result.text == (
        f"{UNTRUSTED}\nTitle: Salmon & rivers\nURL: {site.url}/salmon\n\nSalmon\n"
        "Atlantic salmon return to their river after one to four years at sea.\n"
        "They find it by smell, and few of them come back a second time, as counts at weirs show."
    )
    (source,) = result.data["sources"]
    assert (source["id"], source["title"]) == (f"{site.url}/salmon", "Salmon & rivers")
    assert source["text"].startswith("Salmon\nAtlantic")


def test_page_without_main_content_gives_its_words(site: Site) -> None:
    site.page("/", "<html><body><div>Closed today.</div><script>x()</script></body></html>")
    assert fetch(site, "/").text.endswith("\n\nClosed today.")
    site.page("/", "<html><body></body></html>")
    assert fetch(site, "/").text.endswith("[the page has no text]")


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("text/plain", "one\r\ntwo"),
        ("text/markdown; charset=UTF-8", "one\ntwo"),
        ("application/json", "one\ntwo"),
        ("application/ld+json", "one\ntwo"),
    ],
)
def test_plain_text_and_json_come_as_they_are(site: Site, kind: str, body: str) -> None:
    site.page("/", body, kind)
    assert fetch(site, "/").text == f"{UNTRUSTED}\nURL: {site.url}/\n\none\ntwo"


@pytest.mark.parametrize(
    "kind", ["application/pdf", "image/png", "application/octet-stream", "video/mp4", "x", None]
)
def test_other_types_are_refused(site: Site, kind: str | None) -> None:
    site.page("/", b"%PDF", kind)
    with pytest.raises(ToolRetry, match="not text"):
        fetch(site, "/")


@pytest.mark.parametrize(
    ("charset", "encoding"),
    [
        ("; charset=iso-8859-1", "latin-1"),
        ("; charset=windows-1252", "cp1252"),
        ('; charset="utf-16"', "utf-16"),
        ("; charset=gbk", "gbk"),
        ("; charset=unknown", "utf-8"),
        ("; charset=punycode", "utf-8"),
        ("; charset=unicode_escape", "utf-8"),
        ("; charset=zip", "utf-8"),
        ("", "utf-8"),
    ],
)
def test_character_sets_are_those_of_the_web(site: Site, charset: str, encoding: str) -> None:
    text = "gr\u00fcn" if encoding != "gbk" else "\u7eff"
    site.page("/", text.encode(encoding), f"text/plain{charset}")
    assert fetch(site, "/").text.endswith(f"\n\n{text}")


def test_a_page_may_name_its_character_set_itself(site: Site) -> None:
    body = '<html><head><meta charset="iso-8859-1"></head><body><p>gr\u00fcn</p></body></html>'
    site.page("/", body.encode("latin-1"))
    assert fetch(site, "/").text.endswith("gr\u00fcn")


def test_bytes_that_are_no_characters_are_replaced(site: Site) -> None:
    site.page("/", b"a\xff\x00\x1b[31mb", "text/plain")
    assert fetch(site, "/").text.endswith("\n\na\ufffd  [31mb")


def test_a_long_page_is_read_on_from_where_it_was_cut(site: Site) -> None:
    whole = "".join(f"{number} " for number in range(1000)).strip()
    site.page("/", whole, "text/plain")
    read, parts = 0, list[str]()
    while read < len(whole):
        text = fetch(site, "/", start_char=read, max_result_chars=600).text
        assert len(text) <= 600
        part, _, note = text.partition("\n\n")[2].partition("\n[characters ")
        parts.append(part)
        read += len(part)
        assert (
            not note
            or note == f"{read - len(part)} to {read} of {len(whole)}; continue with start_char]"
        )
    assert "".join(parts) == whole
    with pytest.raises(ToolRetry, match=f"the page has {len(whole)} characters"):
        fetch(site, "/", start_char=len(whole))


def test_a_result_is_bounded_where_the_address_alone_is_longer(site: Site) -> None:
    site.page(f"/{'a' * 500}", "text", "text/plain")
    assert len(fetch(site, f"/{'a' * 500}", max_result_chars=64).text) == 64


@pytest.mark.parametrize("status", [404, 403, 500])
def test_an_error_of_the_server_is_named(site: Site, status: int) -> None:
    site.page("/", "secret", status=status)
    with pytest.raises(ToolRetry, match=f"^the server answers {status}$"):
        fetch(site, "/")


def test_a_refused_address_is_for_the_model_to_change(site: Site) -> None:
    tool = Fetch(FetchConfig(tool_id="fetch"))
    for url in ("http://127.0.0.1/", "http://[::1]/", f"{site.url}/", "nonsense"):
        with pytest.raises(ToolRetry):
            tool.run({"url": url}, 60.0)
    assert site.requests == []


@pytest.mark.parametrize(
    "page",
    [
        "<div>" * 50_000 + "deep",
        "<" * 200_000,
        "<p " + " ".join(f"a{number}=1" for number in range(20_000)) + ">attributes",
        "<!--" + "-" * 200_000,
        "<title>" + "t" * 200_000,
        "<table><tr><td>" * 3_000,
        "\x00" * 10_000,
        "<?xml version='1.0'?><!DOCTYPE x [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;'>]><x>&b;</x>",
        "<html><head><base href='file:///etc/'><link href=passwd></head><body>x</body></html>",
    ],
    ids=["deep", "lt", "attributes", "comment", "title", "table", "nul", "entities", "links"],
)
def test_no_page_breaks_the_reader(site: Site, page: str) -> None:
    site.page("/", page)
    assert fetch(site, "/").text.startswith(UNTRUSTED)


def test_what_is_parsed_of_a_page_is_bounded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    import trafilatura

    parsed: list[int] = []

    def note(html: str, **_: object) -> None:
        parsed.append(len(html))

    monkeypatch.setattr(trafilatura, "bare_extraction", note)
    monkeypatch.setattr(trafilatura, "html2txt", lambda html: f"{len(html)} characters")
    site.page("/", "<p>x</p>" * (MAX_HTML_CHARS // 4))
    assert fetch(site, "/", max_bytes=4 << 20).text.endswith(f"{MAX_HTML_CHARS} characters")
    assert parsed == [MAX_HTML_CHARS]
