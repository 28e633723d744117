"""An MCP client and the running graph: through Serve's own servers, real engines, a tool on Ray."""

from __future__ import annotations

import pytest
from mcp import Client

from tests.conftest import Graph

pytestmark = pytest.mark.serve


@pytest.mark.parametrize("era", ["legacy", "auto"])
async def test_a_client_asks_decides_and_calls_a_tool(graph: Graph, era: str) -> None:
    question = {"question": "What is 15% of 240?", "model": "nano-math@calculator"}
    async with Client(f"{graph.url}/mcp", mode=era) as client:
        listed = [tool.name for tool in (await client.list_tools()).tools]
        asked = await client.call_tool("ask", question)
        decided = await client.call_tool("route", {"question": "What is the capital of France?"})
        called = await client.call_tool("calculator", {"expression": "15% of 240"})
        refused = await client.call_tool("calculator", {"expression": 5})
    assert listed == ["ask", "route", "calculator"]
    assert asked.structured_content is not None
    assert "36" in asked.structured_content["answer"]
    assert asked.structured_content["pair"] == "nano-math@calculator"
    assert decided.structured_content is not None
    assert decided.structured_content["pair"] == "nano-facts@none"
    assert called.model_dump()["content"][0]["text"] == "36"
    assert refused.is_error
    assert "is not of type 'string'" in refused.model_dump()["content"][0]["text"]
