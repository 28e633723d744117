"""The protocol's own conformance suite against a real gateway.

What the suite calls are tools of its own names, so tools of those names stand behind the gateway.
Needs Node and `npm ci --prefix tests/npm`; skipped where either is missing.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import ToolFailed
from serve_app.orchestrator.direct import DirectTools
from serve_app.tools.base import NO_PARAMETERS, Function, ToolResult
from tests.gateway_fakes import running_gateway

NPM = Path(__file__).parents[2] / "npm"
SUITE = NPM / "node_modules/@modelcontextprotocol/conformance/dist/index.js"
NODE = shutil.which("node")

MANY_KEYWORDS = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "$defs": {"address": {"type": "object", "properties": {"street": {"type": "string"}}}},
    "properties": {"name": {"type": "string"}, "address": {"$ref": "#/$defs/address"}},
    "additionalProperties": False,
}
PARAMETERS = {
    "test_simple_text": NO_PARAMETERS,
    "test_error_handling": NO_PARAMETERS,
    "json_schema_2020_12_tool": MANY_KEYWORDS,
}


class TheSuitesTools:
    """Stands where the runner of tools does."""

    def functions(self, tool_id: str) -> tuple[Function, ...]:
        if tool_id not in PARAMETERS:
            raise ToolFailed("no such tool")
        return (Function(tool_id, "A tool that the suite calls.", PARAMETERS[tool_id]),)

    async def run(self, tool_id: str, arguments: dict[str, Any], **options: Any) -> ToolResult:
        if tool_id == "test_error_handling":
            raise ToolFailed("This tool intentionally returns an error for testing")
        return ToolResult("This is a simple text response for testing.")


@pytest.mark.skipif(NODE is None, reason="Node is not installed")
@pytest.mark.skipif(not SUITE.is_file(), reason="run npm ci --prefix tests/npm")
def test_lifecycle_and_tools_conform_and_the_rest_fails_for_reasons_that_are_written_down(
    tmp_path: Path,
) -> None:
    assert NODE is not None
    tools = [{"type": "calculator", "tool_id": tool_id, "exposed": True} for tool_id in PARAMETERS]
    with running_gateway(tmp_path, tools=tools) as gateway:
        gateway.orchestrator.tools = DirectTools(TheSuitesTools())  # type: ignore[arg-type]
        suite = subprocess.run(
            [
                *(NODE, "--import", NPM / "without_glob.mjs", SUITE, "server", "--suite", "all"),
                *("--url", f"{gateway.url}/mcp", "--output-dir", tmp_path / "results"),
                *("--expected-failures", NPM / "expected_failures.yaml"),
            ],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert suite.returncode == 0, suite.stdout[-4000:] + suite.stderr[-2000:]
    for scenario in ("server-initialize", "ping", "tools-list", "tools-call-simple-text"):
        assert f"✓ {scenario}: 1 passed, 0 failed" in suite.stdout
