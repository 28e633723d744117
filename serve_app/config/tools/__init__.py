"""Typed settings of every kind of tool; imports pydantic only, so they load anywhere."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from serve_app.config.tools.base import (
    MAX_DESCRIPTION_CHARS,
    TOOL_ID_PATTERN,
    Examples,
    ManyFunctionsSettings,
    ToolSettings,
)
from serve_app.config.tools.builtin import (
    BestOfConfig,
    CalculatorConfig,
    DebugConfig,
    EncoderConfig,
    NoneConfig,
    PythonConfig,
    RetrievalConfig,
)
from serve_app.config.tools.composed import CustomToolConfig, ToolsetConfig
from serve_app.config.tools.files import FilesConfig
from serve_app.config.tools.mcp import McpConfig
from serve_app.config.tools.ocr import OcrConfig
from serve_app.config.tools.openapi import OpenApiConfig
from serve_app.config.tools.sql import SqlConfig
from serve_app.config.tools.web import FetchConfig, WebSearchConfig, WebSettings

ToolConfig = Annotated[
    NoneConfig
    | CalculatorConfig
    | PythonConfig
    | DebugConfig
    | RetrievalConfig
    | BestOfConfig
    | ToolsetConfig
    | CustomToolConfig
    | FetchConfig
    | WebSearchConfig
    | OpenApiConfig
    | SqlConfig
    | FilesConfig
    | OcrConfig
    | McpConfig,
    Field(discriminator="type"),
]
"""Any tool's settings, told apart by `type`."""

__all__ = [
    "MAX_DESCRIPTION_CHARS",
    "TOOL_ID_PATTERN",
    "BestOfConfig",
    "CalculatorConfig",
    "CustomToolConfig",
    "DebugConfig",
    "EncoderConfig",
    "Examples",
    "FetchConfig",
    "FilesConfig",
    "ManyFunctionsSettings",
    "McpConfig",
    "NoneConfig",
    "OcrConfig",
    "OpenApiConfig",
    "PythonConfig",
    "RetrievalConfig",
    "SqlConfig",
    "ToolConfig",
    "ToolSettings",
    "ToolsetConfig",
    "WebSearchConfig",
    "WebSettings",
]
