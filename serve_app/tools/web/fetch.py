"""Fetch: the page at an address as text."""

from __future__ import annotations

from typing import Any, ClassVar

from serve_app.config.tools import FetchConfig
from serve_app.errors import ToolRetry
from serve_app.tools.base import Tool, ToolResult
from serve_app.tools.web.addresses import MAX_URL_CHARS, WebError
from serve_app.tools.web.client import MAX_REDIRECTS, WebClient
from serve_app.tools.web.page import UNTRUSTED, read_page

EXCERPT_CHARS = 500
"""What a source of a result keeps of the page."""
_ACCEPTED = "text/html, application/xhtml+xml, text/*;q=0.9, application/json;q=0.9"


class Fetch(Tool):
    """Reads pages. Whatever fails is a matter of the address, so another one may be tried."""

    config: FetchConfig

    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "url": {
                "type": "string",
                "description": "Address of the page: http or https.",
                "maxLength": MAX_URL_CHARS,
            },
            "start_char": {
                "type": "integer",
                "description": "Where in the page's text to begin; 0 is its start.",
                "minimum": 0,
                "maximum": 100_000_000,
            },
        },
        "required": ["url"],
        "additionalProperties": False,
    }

    def __init__(self, config: FetchConfig, client: WebClient | None = None) -> None:
        """Prepare.

        Args:
            config: The tool's settings.
            client: Sends the requests; `None`: as the settings say.
        """
        super().__init__(config)
        self._client = client or WebClient(config)

    def run(self, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        """Fetch a page.

        Args:
            arguments: `url`; `start_char`.
            deadline_s: Seconds from now for the exchange.

        Returns:
            A line of warning, title and address, then the text from `start_char`; what was left
            out is said. `data["sources"]` has the page.

        Raises:
            ToolRetry: If the address is refused, or holds no text that can be read.
            ToolTimeout: If time ran out.
        """
        try:
            reply = self._client.send(
                "GET",
                str(arguments["url"]),
                deadline_s=deadline_s,
                headers={"Accept": _ACCEPTED},
                max_redirects=MAX_REDIRECTS,
            )
            if reply.status >= 400:
                raise WebError(f"the server answers {reply.status}")
            title, text = read_page(reply)
        except WebError as error:
            raise ToolRetry(str(error)) from None
        start = int(arguments.get("start_char", 0))
        if start and start >= len(text):
            raise ToolRetry(f"start_char: the page has {len(text)} characters")
        head = [UNTRUSTED, *([f"Title: {title}"] if title else []), f"URL: {reply.url}", "", ""]
        source = {
            "id": reply.url,
            "title": title or reply.url,
            "score": 1.0,
            "similarity": None,
            "text": text[start : start + EXCERPT_CHARS],
        }
        shown = self._part("\n".join(head), text, start)
        return ToolResult(shown, {"sources": [source]})

    def _part(self, head: str, text: str, start: int) -> str:
        """The text from a character on, as much as a result may hold."""
        whole = head + (text[start:] or "[the page has no text]")
        limit = self.config.max_result_chars
        if len(whole) <= limit:
            return whole
        widest = f"\n[characters {start} to {len(text)} of {len(text)}; continue with start_char]"
        end = start + limit - len(head) - len(widest)
        if end <= start:
            return self.clip(whole)
        note = f"\n[characters {start} to {end} of {len(text)}; continue with start_char]"
        return head + text[start:end] + note
