"""From settings to tools: the one place that knows which class a `type` means."""

from __future__ import annotations

from typing import assert_never

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


def build_tool(config: ToolConfig) -> Tool:
    """Make the tool that these settings describe; cheap, heavy state comes with `warm` or `run`.

    Args:
        config: Settings of any tool.

    Returns:
        The tool.

    Raises:
        ConfigError: If there is no such tool: a class that cannot be imported or made.
    """
    # Imported on use: reading a tool's schema must not load another tool's libraries.
    match config:
        case NoneConfig():
            from serve_app.tools.builtin.none import NoTool

            return NoTool(config)
        case CalculatorConfig():
            from serve_app.tools.builtin.calculator import Calculator

            return Calculator(config)
        case PythonConfig():
            from serve_app.tools.builtin.python import PythonTool

            return PythonTool(config)
        case DebugConfig():
            from serve_app.tools.builtin.debug import DebugTool

            return DebugTool(config)
        case RetrievalConfig():
            from serve_app.tools.builtin.retrieval import Retrieval

            return Retrieval(config)
        case BestOfConfig():
            from serve_app.tools.builtin.best_of import BestOf

            return BestOf(config)
        case ToolsetConfig():
            from serve_app.tools.builtin.toolset import Toolset

            return Toolset(config)
        case CustomToolConfig():
            from serve_app.tools.builtin.custom import load_custom

            return load_custom(config)
        case FetchConfig():
            from serve_app.tools.web.fetch import Fetch

            return Fetch(config)
        case WebSearchConfig():
            from serve_app.tools.web.search import WebSearch

            return WebSearch(config)
        case OpenApiConfig():
            from serve_app.tools.openapi.tool import OpenApiTool

            return OpenApiTool(config)
        case SqlConfig():
            from serve_app.tools.builtin.sql import SqlTool

            return SqlTool(config)
        case FilesConfig():
            from serve_app.tools.builtin.files import FilesTool

            return FilesTool(config)
        case OcrConfig():
            from serve_app.tools.builtin.ocr import Ocr

            return Ocr(config)
        case McpConfig():
            from serve_app.tools.mcp.tool import McpTool

            return McpTool(config)
        case _:
            assert_never(config)
