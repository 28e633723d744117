"""One gateway without Ray, before a counting MCP server whose function acts once.

The HTTP API, keys, orchestrator, store and MCP session are the real ones; the model is scripted: it
calls the function with the user's last message, and then answers with the function's result. How to
run: `python -m benchmarks.tools.gateway PORT COUNTER_PORT FOLDER`. Gateways of one folder share its
store.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import Any

from benchmarks.hostile.gateway import serve_gateway
from serve_app.budget import Deadline
from serve_app.config import AtlasConfig
from serve_app.config.tools import McpConfig
from serve_app.models.clients import ModelClients
from serve_app.models.protocol import ChatBody
from serve_app.tools.base import Function, ToolResult
from serve_app.tools.mcp.session import McpSession
from serve_app.tools.runner import ToolRunner

MODEL = "m@till"
LEASE_S = 1.0


def config_of(counter_port: int, folder: Path) -> AtlasConfig:
    """A model with the counting server."""
    model = {
        "type": "remote",
        "model_id": "m",
        "base_url": "http://127.0.0.1:1/v1",
        "remote_model": "x",
        "tools": ["none", "till"],
    }
    till = {
        "type": "mcp",
        "tool_id": "till",
        "url": f"http://127.0.0.1:{counter_port}/mcp",
        "effects": "once",
        "max_concurrency": 64,
    }
    return AtlasConfig.model_validate(
        {
            "models": [model],
            "tools": [till],
            "gateway": {"idempotency": {"lease_s": LEASE_S}, "limits": {"adapt_to_load": False}},
            "data_dir": str(folder),
        }
    )


class _Scripted(ModelClients):
    """The model: calls the function once, then says what came of it."""

    async def complete(
        self, model_id: str, body: ChatBody, deadline: Deadline, session: str = ""
    ) -> dict[str, Any]:
        last = body["messages"][-1]
        message: dict[str, Any] = {"role": "assistant", "content": last["content"]}
        if last["role"] != "tool":
            arguments = json.dumps({"order": last["content"]})
            function = {"name": "till__charge", "arguments": arguments}
            call = {"id": "call_1", "type": "function", "function": function}
            message |= {"content": None, "tool_calls": [call]}
        reason = "stop" if last["role"] == "tool" else "tool_calls"
        choice = {"index": 0, "message": message, "finish_reason": reason}
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        return {"choices": [choice], "usage": usage}


class _HereSession:
    """The session in this process, where the deployed graph has an actor."""

    def __init__(self, config: McpConfig) -> None:
        self._session = McpSession(config)

    async def functions(self) -> tuple[Function, ...]:
        self._session.start()
        await self._session.first_try()
        known = self._session.state().definitions
        self._session.allow({name: sha256 for name, (sha256, _) in known.items()})
        return self._session.functions()

    def call(
        self, function: str, arguments: dict[str, Any], deadline_s: float
    ) -> asyncio.Task[ToolResult]:
        return asyncio.create_task(self._session.call(function, arguments, deadline_s))

    def forget(self) -> None: ...


def main() -> None:
    """Run the gateway."""
    port, counter_port, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    logging.disable(logging.CRITICAL)
    config = config_of(counter_port, folder)
    (till,) = config.tools
    assert isinstance(till, McpConfig)

    async def run() -> None:
        runner = ToolRunner(config.tools)
        runner._entries["till"].session = _HereSession(till)  # type: ignore[assignment]
        await serve_gateway(config, port, _Scripted(), runner)

    asyncio.run(run())


if __name__ == "__main__":
    main()
