"""No tool at all, as a tool: plain generation is one of the choices."""

from __future__ import annotations

from typing import Any

from serve_app.config.tools import NoneConfig
from serve_app.errors import ToolFailed
from serve_app.tools.base import Tool, ToolResult


class NoTool(Tool):
    """Nothing to call."""

    config: NoneConfig

    def run(self, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        """Not callable.

        Args:
            arguments: Ignored.
            deadline_s: Ignored.

        Raises:
            ToolFailed: Always.
        """
        raise ToolFailed("tool 'none' cannot be called")
