"""Web search: what a SearXNG server finds, as numbered titles, addresses and excerpts."""

from __future__ import annotations

import json
from typing import Any, ClassVar
from urllib.parse import urlencode

from serve_app.config.tools import WebSearchConfig
from serve_app.errors import ToolFailed, ToolRetry
from serve_app.tools.base import Tool, ToolResult
from serve_app.tools.builtin.retrieval import MAX_QUERY_CHARS, NO_SOURCES, query_line
from serve_app.tools.web.addresses import WebError, allowed_entry
from serve_app.tools.web.client import WebClient, WebReply
from serve_app.tools.web.page import MAX_TITLE_CHARS, UNTRUSTED, one_line

_MAX_URL_CHARS = 500
_MAX_EXCERPT_CHARS = 500


class WebSearch(Tool):
    """Searches by a server that the settings name."""

    config: WebSearchConfig

    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "query": {
                "type": "string",
                "description": "What to look for, in words.",
                "maxLength": MAX_QUERY_CHARS,
            }
        },
        "required": ["query"],
        "additionalProperties": False,
    }

    def __init__(self, config: WebSearchConfig, client: WebClient | None = None) -> None:
        """Prepare.

        Args:
            config: The tool's settings.
            client: Sends the requests; `None`: as the settings say.
        """
        super().__init__(config)
        self._client = client or WebClient(config, also_allow=[allowed_entry(config.base_url)])

    def run(self, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        """Search.

        Args:
            arguments: `query`.
            deadline_s: Seconds from now for the exchange.

        Returns:
            A line of warning, then `[1] title`, address and excerpt of each result, and where it
            fits `query_line`; `data["sources"]` as the retrieval tool has them.

        Raises:
            ToolRetry: If the query is empty.
            ToolFailed: If the server does not answer as it should.
        """
        query = " ".join(str(arguments["query"]).split())
        if not query:
            raise ToolRetry("the query is empty; say in words what to look for")
        found = _sources(self._ask(query, deadline_s))[: self.config.num_results]
        if not found:
            return ToolResult(NO_SOURCES, {"sources": []})
        entries = [
            f"[{number}] {source['title']}\n{source['id']}\n{source['text']}".rstrip()
            for number, source in enumerate(found, start=1)
        ]
        text = "\n".join([UNTRUSTED, *entries])
        with_query = text + query_line(str(arguments["query"]))
        fits = len(with_query) <= self.config.max_result_chars
        return ToolResult(with_query if fits else self.clip(text), {"sources": found})

    def _ask(self, query: str, deadline_s: float) -> WebReply:
        asked = {
            "q": query,
            "format": "json",
            "categories": ",".join(self.config.categories),
            "language": self.config.language,
        }
        try:
            parameters = urlencode(asked)
        except UnicodeEncodeError:
            raise ToolRetry("the query is not valid text") from None
        url = f"{self.config.base_url.rstrip('/')}/search?{parameters}"
        try:
            reply = self._client.send(
                "GET", url, deadline_s=deadline_s, headers={"Accept": "application/json"}
            )
        except WebError as error:
            raise ToolFailed(f"tool {self.tool_id!r}: {error}") from None
        if reply.status == 403:
            raise ToolFailed(
                f"tool {self.tool_id!r}: the search server refuses (403); its settings must list "
                "json in search.formats"
            )
        if reply.status != 200:
            raise ToolFailed(f"tool {self.tool_id!r}: the search server answers {reply.status}")
        return reply


def _sources(reply: WebReply) -> list[dict[str, Any]]:
    """The results that can be used, in the server's order.

    Raises:
        ToolFailed: If the reply is none of SearXNG.
    """
    try:
        results = json.loads(reply.body)["results"]
        entries = [entry for entry in results if isinstance(entry, dict)]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise ToolFailed("the search server's answer is not SearXNG's JSON") from None
    return [
        {
            "id": entry["url"],
            "title": _line(entry.get("title"), MAX_TITLE_CHARS) or entry["url"],
            "score": score if isinstance(score := entry.get("score"), int | float) else 0.0,
            "similarity": None,
            "text": _line(entry.get("content"), _MAX_EXCERPT_CHARS),
        }
        for entry in entries
        if _is_address(entry.get("url"))
    ]


def _is_address(url: object) -> bool:
    is_short = isinstance(url, str) and len(url) <= _MAX_URL_CHARS and url.isprintable()
    return is_short and str(url).startswith(("http://", "https://"))


def _line(value: object, max_chars: int) -> str:
    text = value if isinstance(value, str) else ""
    clean = text.encode("utf-8", "replace").decode()  # JSON may hold halves of characters
    return one_line("".join(c if c.isprintable() else " " for c in clean), max_chars)
