"""The tool of an MCP server, as far as it is known without the server."""

from __future__ import annotations

from typing import Any

from serve_app.errors import ToolFailed
from serve_app.tools.base import Function, ManyFunctions, ToolResult


class McpTool(ManyFunctions):
    """Settings only: functions come from the server's session, which also makes the calls."""

    def functions(self) -> tuple[Function, ...]:
        """None: the session tells them (`serve_app.tools.mcp.actor`)."""
        return ()

    def call(self, function: str, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        """Refuse: calls go through the session.

        Raises:
            ToolFailed: Always.
        """
        raise ToolFailed(f"tool {self.tool_id!r} runs in its server's session")
