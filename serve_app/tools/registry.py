"""From settings to tools: the one place that knows which class a `type` means."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from serve_app.config.tools import (
    BestOfConfig,
    CalculatorConfig,
    CustomToolConfig,
    DebugConfig,
    FetchConfig,
    FilesConfig,
    McpConfig,
    NoneConfig,
    OcrConfig,
    OpenApiConfig,
    PythonConfig,
    RetrievalConfig,
    SqlConfig,
    ToolConfig,
    ToolsetConfig,
    WebSearchConfig,
)
from serve_app.tools.base import Tool

_MADE_BY: Mapping[type[ToolConfig], tuple[str, str]] = {
    NoneConfig: ("serve_app.tools.builtin.none", "NoTool"),
    CalculatorConfig: ("serve_app.tools.builtin.calculator", "Calculator"),
    PythonConfig: ("serve_app.tools.builtin.python", "PythonTool"),
    DebugConfig: ("serve_app.tools.builtin.debug", "DebugTool"),
    RetrievalConfig: ("serve_app.tools.builtin.retrieval", "Retrieval"),
    BestOfConfig: ("serve_app.tools.builtin.best_of", "BestOf"),
    ToolsetConfig: ("serve_app.tools.builtin.toolset", "Toolset"),
    CustomToolConfig: ("serve_app.tools.builtin.custom", "load_custom"),
    FetchConfig: ("serve_app.tools.web.fetch", "Fetch"),
    WebSearchConfig: ("serve_app.tools.web.search", "WebSearch"),
    OpenApiConfig: ("serve_app.tools.openapi.tool", "OpenApiTool"),
    SqlConfig: ("serve_app.tools.builtin.sql", "SqlTool"),
    FilesConfig: ("serve_app.tools.builtin.files", "FilesTool"),
    OcrConfig: ("serve_app.tools.builtin.ocr", "Ocr"),
    McpConfig: ("serve_app.tools.mcp.tool", "McpTool"),
}
"""Module of each kind of tool, and what in it makes the tool. Imported on use: reading a tool's
schema must not load another tool's libraries."""


def build_tool(config: ToolConfig) -> Tool:
    """Make the tool that these settings describe; cheap, heavy state comes with `warm` or `run`.

    Args:
        config: Settings of any tool.

    Returns:
        The tool.

    Raises:
        ConfigError: If there is no such tool: a class that cannot be imported or made.
    """
    module, name = _MADE_BY[type(config)]
    tool: Tool = getattr(importlib.import_module(module), name)(config)
    return tool
