"""What MCP clients may call: a description, and what a call does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from mcp_types import CallToolResult, TextContent, Tool, ToolAnnotations

from serve_app.gateway.edge.exchange import Exchange
from serve_app.schemas import Effects

Json = dict[str, Any]

REQUEST_ID = "atlas/request_id"
"""Key of the request's id in a result's `_meta`."""


@dataclass(frozen=True)
class ExposedTool:
    """One tool of the MCP server."""

    listed: Tool
    """What `tools/list` says of the tool."""

    call: Callable[[Exchange, Json], Awaitable[CallToolResult]]
    """Runs one call: takes the request and the arguments, and raises an `AtlasError` where the
    call fails."""


def hints(title: str, effects: Effects) -> ToolAnnotations:
    """The hints that MCP clients ask a person by, before they call a tool.

    Args:
        title: The tool's name for people.
        effects: What a call does. What has effects may destroy something: nobody declares more.
    """
    return ToolAnnotations(
        title=title,
        read_only_hint=effects is Effects.NONE,
        idempotent_hint=effects is not Effects.ONCE,
        destructive_hint=effects is not Effects.NONE,
    )


def result(exchange: Exchange, text: str, structured: Json | None = None) -> CallToolResult:
    """The result of a call that succeeded.

    Args:
        exchange: The request.
        text: For the model that called.
        structured: The same and more as an object; `None`: there is only the text.
    """
    return CallToolResult(
        content=[TextContent(text=text)],
        structured_content=structured,
        _meta={REQUEST_ID: exchange.request_id},
    )
