"""The pool's own tools for MCP clients: those that the configuration marks `exposed`.

Each function of such a tool is an MCP tool. No model and no router take part, so a call leaves no
outcome; keys, rate and concurrency limits, deadline, log line and price are those of every request.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from mcp_types import CallToolResult, Tool

from serve_app.budget import Deadline
from serve_app.config.tools import ToolConfig
from serve_app.errors import ToolFailed
from serve_app.gateway.edge.exchange import Exchange
from serve_app.gateway.handlers import RequestRunner, in_time
from serve_app.gateway.mcp.tool import ExposedTool, Json, hints, result
from serve_app.schemas import Effects
from serve_app.telemetry import GATEWAY_COST_USD, TOOL_CALLS, TOOL_SECONDS, MetricSink
from serve_app.tools.base import Function

logger = logging.getLogger(__name__)


class ExposedTools:
    """Makes an MCP tool of every function that clients may call.

    Invariants:
        - A function that must not run twice is not offered: a client that hears no answer calls
          again, and MCP has no key that would tell both calls to be one.
    """

    def __init__(self, orchestrator: RequestRunner, deadline_s: float, metrics: MetricSink) -> None:
        """Call the pool's tools.

        Args:
            orchestrator: Runs the calls.
            deadline_s: Seconds a call may take; a tool's own `timeout_s` holds as well.
            metrics: Where costs go.
        """
        self._orchestrator = orchestrator
        self._deadline_s = deadline_s
        self._metrics = metrics
        self._told_left_out: set[str] = set()

    def tools(self, configs: tuple[ToolConfig, ...]) -> Iterator[ExposedTool]:
        """The functions that are offered now.

        Args:
            configs: Every tool of the pool.
        """
        for config in configs:
            for function in self._functions(config) if config.exposed else ():
                if function.effects is Effects.ONCE:
                    self._tell_left_out(function)
                else:
                    yield self._tool(config.tool_id, function)

    def strongest(self, configs: tuple[ToolConfig, ...]) -> Effects:
        """The strongest effects of all functions, exposed or not: models may call each of them."""
        effects = [f.effects for config in configs for f in self._functions(config)]
        return max(effects, key=list(Effects).index, default=Effects.NONE)

    def _functions(self, config: ToolConfig) -> tuple[Function, ...]:
        """What a tool offers; nothing where it is no function, or does not answer now."""
        if config.kind != "function":
            return ()
        try:
            return self._orchestrator.tools.functions(config.tool_id)
        except ToolFailed:
            return ()

    def _tell_left_out(self, function: Function) -> None:
        if function.name not in self._told_left_out:
            self._told_left_out.add(function.name)
            logger.warning("%s is not exposed at /mcp: its effects are 'once'", function.name)

    def _tool(self, tool_id: str, function: Function) -> ExposedTool:
        listed = Tool(
            name=function.name,
            description=function.description,
            input_schema=function.parameters,
            annotations=hints(function.name, function.effects),
        )

        async def call(exchange: Exchange, arguments: Json) -> CallToolResult:
            exchange.line.model = f"tool:{tool_id}"
            exchange.ends_s = exchange.started_s + self._deadline_s
            deadline = Deadline(exchange.ends_s)
            async with in_time(exchange):
                outcome = await self._orchestrator.tools.call(
                    tool_id, function, arguments, deadline
                )
            exchange.line.cost_usd = outcome.cost_usd
            called = exchange.line.model
            self._metrics.record(GATEWAY_COST_USD, outcome.cost_usd, candidate=called)
            self._metrics.record(TOOL_CALLS, tool=tool_id, outcome="ok")
            self._metrics.record(TOOL_SECONDS, outcome.seconds, tool=tool_id)
            return result(exchange, outcome.text)

        return ExposedTool(listed, call)
