"""A tool that fails now and then, so that asking again is worth something.

An entry of a configuration: `type: custom`, `import_path: benchmarks.nano.flaky:Flaky`, and as
`settings` the share of calls that fail and the settings of the tool behind it.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from serve_app.config.tools import CustomToolConfig, ToolConfig
from serve_app.errors import ToolFailed
from serve_app.tools.base import Function, Tool, ToolResult
from serve_app.tools.registry import build_tool

_ROOT = Path(__file__).parents[2]
_PATHS = ("database",)
"""Settings that name a file of this repository."""


class Flaky(Tool):
    """Another tool, some of whose calls fail before they begin; no call knows which."""

    def __init__(self, config: CustomToolConfig, fails: float, tool: dict[str, Any]) -> None:
        """Make the tool behind it.

        Args:
            config: Of this tool; the one behind it has its name.
            fails: Share of the calls, in [0, 1].
            tool: Settings of the tool behind it; files are relative to the repository's root.

        Raises:
            ValueError: If the share or the settings are none.
        """
        super().__init__(config)
        if not 0 <= fails <= 1:
            raise ValueError(f"fails={fails!r} is no share in [0, 1]")
        files = {name: str(_ROOT / tool[name]) for name in _PATHS if name in tool}
        settings = tool | files | {"tool_id": config.tool_id}
        self._tool = build_tool(TypeAdapter[Any](ToolConfig).validate_python(settings))
        self._fails = fails

    def functions(self) -> tuple[Function, ...]:
        """Those of the tool behind it."""
        return self._tool.functions()

    def warm(self) -> None:
        """Load what the tool behind it needs."""
        self._tool.warm()

    def run(self, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        """Run the tool behind it, or fail.

        Raises:
            ToolFailed: If this call is one that fails; else as the tool behind it.
        """
        if random.random() < self._fails:
            raise ToolFailed(f"the {self.tool_id} is out of order")
        return self._tool.run(arguments, deadline_s)
