"""Web search in front of a stub of SearXNG: a real server on loopback with SearXNG's JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from pydantic import ValidationError

from serve_app.config.tools import WebSearchConfig
from serve_app.errors import ToolFailed, ToolRetry, ToolTimeout
from serve_app.tools.base import ToolResult
from serve_app.tools.builtin.retrieval import NO_SOURCES
from serve_app.tools.web.page import UNTRUSTED
from serve_app.tools.web.search import WebSearch
from tests.web_fakes import Names, Site, raw_server, running_site

SALMON = {
    "url": "https://fish.example/salmon",
    "title": "Salmon",
    "content": "Salmon return\nto their river.",
    "engine": "stub",
    "score": 3.5,
    "category": "general",
}
TROUT = {"url": "https://fish.example/trout", "title": "Trout", "content": "Trout stay."}


@pytest.fixture
def stub() -> Iterator[Site]:
    """A stub of SearXNG."""
    with running_site() as running:
        yield running


def answer(stub: Site, results: Any, **settings: Any) -> None:
    body = json.dumps({"query": "q", "results": results, "answers": [], "suggestions": []})
    stub.page("/search", body, "application/json", **settings)


def search(stub: Site, query: str = "salmon", **settings: Any) -> ToolResult:
    config = WebSearchConfig(tool_id="web", base_url=stub.url, **settings)
    return WebSearch(config).run({"query": query}, 60.0)


def test_results_come_numbered_with_their_sources(stub: Site) -> None:
    answer(stub, [SALMON, TROUT])
    result = search(stub, "where do salmon go?")
    assert result.text == (
        f"{UNTRUSTED}\n[1] Salmon\nhttps://fish.example/salmon\nSalmon return to their river.\n"
        "[2] Trout\nhttps://fish.example/trout\nTrout stay.\nQuery: where do salmon go?"
    )
    assert result.data["sources"] == [
        {
            "id": "https://fish.example/salmon",
            "title": "Salmon",
            "score": 3.5,
            "similarity": None,
            "text": "Salmon return to their river.",
        },
        {
            "id": "https://fish.example/trout",
            "title": "Trout",
            "score": 0.0,
            "similarity": None,
            "text": "Trout stay.",
        },
    ]


def test_server_is_asked_as_the_settings_say(stub: Site) -> None:
    answer(stub, [])
    search(stub, "a&format=html#\u00e4", categories=("general", "science"), language="de-CH")
    asked = parse_qs(urlsplit(stub.requests[0].path).query)
    assert asked == {
        "q": ["a&format=html#\u00e4"],
        "format": ["json"],
        "categories": ["general,science"],
        "language": ["de-CH"],
    }


def test_no_more_results_than_wanted_and_no_more_characters(stub: Site) -> None:
    long = {**SALMON, "content": "x" * 10_000, "title": "t" * 10_000}
    answer(stub, [long] * 40)
    result = search(stub, num_results=3, max_result_chars=1000)
    assert len(result.data["sources"]) == 3
    assert len(result.text) <= 1000
    assert max(len(source["text"]) for source in result.data["sources"]) <= 500


def test_nothing_found_says_so(stub: Site) -> None:
    answer(stub, [])
    assert search(stub) == ToolResult(NO_SOURCES, {"sources": []})


def test_results_that_are_none_are_left_out(stub: Site) -> None:
    broken = [
        None,
        "text",
        {},
        {"url": 5},
        {"url": "javascript:alert(1)"},
        {"url": "https://a.example/\nIgnore"},
        {"url": "https://a.example/" + "x" * 5000},
        {"url": "https://fish.example/pike", "title": 3, "content": ["x"], "score": "high"},
        {"url": "https://fish.example/eel", "title": "E\u0000el\ud800", "content": None},
    ]
    answer(stub, broken)
    assert [source["title"] for source in search(stub).data["sources"]] == [
        "https://fish.example/pike",
        "E el?",
    ]


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ("<html>search</html>", 200, "not SearXNG's JSON"),
        ("[]", 200, "not SearXNG's JSON"),
        ('{"results": 5}', 200, "not SearXNG's JSON"),
        ("{", 200, "not SearXNG's JSON"),
        ('{"results": ' + "[" * 100_000, 200, "not SearXNG's JSON"),
        ('{"results": [' + "9" * 5000 + "]}", 200, "not SearXNG's JSON"),
        ("", 403, "search.formats"),
        ("", 429, "answers 429"),
        ("", 500, "answers 500"),
        ("", 302, "answers 302"),
    ],
)
def test_a_server_that_does_not_answer_as_it_should_fails(
    stub: Site, body: str, status: int, reason: str
) -> None:
    stub.page("/search", body, "application/json", status, Location="http://127.0.0.1:9/")
    with pytest.raises(ToolFailed, match=reason):
        search(stub)


def test_no_server_fails_and_a_slow_one_ends_at_the_deadline() -> None:
    with running_site() as gone:
        pass
    with pytest.raises(ToolFailed, match="no answer"):
        search(gone)
    with raw_server(lambda: iter(lambda: b"", None)) as port:
        tool = WebSearch(WebSearchConfig(tool_id="web", base_url=f"http://127.0.0.1:{port}"))
        with pytest.raises(ToolTimeout):
            tool.run({"query": "x"}, 0.3)


@pytest.mark.parametrize("query", ["", "  \n"])
def test_an_empty_query_is_for_the_model_to_change(stub: Site, query: str) -> None:
    with pytest.raises(ToolRetry, match="empty"):
        search(stub, query)


def test_a_query_that_is_no_text_is_for_the_model_to_change(stub: Site) -> None:
    with pytest.raises(ToolRetry, match="not valid text"):
        search(stub, "\ud800")


def test_search_can_be_a_context_tool() -> None:
    config = WebSearchConfig(tool_id="web", base_url="http://search.internal", kind="context")
    assert WebSearch(config).kind == "context"


@pytest.mark.parametrize(
    "settings",
    [
        {"base_url": "ftp://search.internal"},
        {"base_url": "http://user:secret@search.internal"},
        {"base_url": "http://search.internal/?q="},
        {"base_url": "search.internal"},
        {"categories": ["a,b"]},
        {"language": "en&x=y"},
        {"num_results": 0},
        {"kind": "sampling"},
        {"allow": ["http://a"]},
        {"allow": ["10.0.0.0/8"]},
        {"allow": ["*"]},
        {"ports": [0]},
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    whole = {"tool_id": "web", "base_url": "http://search.internal", **settings}
    with pytest.raises(ValidationError):
        WebSearchConfig.model_validate(whole)


def test_the_servers_name_may_not_lead_to_metadata() -> None:
    from serve_app.tools.web.client import WebClient

    config = WebSearchConfig(tool_id="web", base_url="http://search.internal")
    names = Names(search_internal=[["169.254.169.254"]])
    client = WebClient(config, also_allow=["search.internal"], resolve=names)
    with pytest.raises(ToolFailed, match="no public address"):
        WebSearch(config, client).run({"query": "x"}, 60.0)
