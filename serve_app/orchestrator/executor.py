"""How `model@tool` runs: plain generation, function tools, context tools, sampling tools.

One asynchronous generator serves streamed and whole answers, so that there is one way a pair works.
It yields `Delta`s of the answer and fills one `StepResult`; nothing re-writes what the model said.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from serve_app.budget import Budget
from serve_app.config import AtlasConfig
from serve_app.errors import InvalidRequest, ToolRetry, UnfitForPair
from serve_app.orchestrator.engines import ModelClients
from serve_app.orchestrator.functions import FunctionRunner
from serve_app.orchestrator.paying import PaidEngines, PaidTools
from serve_app.orchestrator.planning import with_note
from serve_app.orchestrator.result import Delta, StepResult, whole_delta
from serve_app.orchestrator.sampling import sample
from serve_app.schemas import ChatCall, Pair
from serve_app.tools.builtin.retrieval import MAX_QUERY_CHARS, query_line, with_question
from serve_app.tools.config import BestOfConfig
from serve_app.tools.runner import ToolRunner


class PairExecutor:
    """Runs pairs; one per gateway replica."""

    def __init__(
        self, config: AtlasConfig, clients: ModelClients, runner: ToolRunner | None = None
    ) -> None:
        """Take the configured tools; `start` gets their workers ready.

        Args:
            config: The deployment.
            clients: Handles to the models.
            runner: Runs the tools; `None` makes one.
        """
        self._engines = PaidEngines(clients)
        self._engines.use(config.models)
        self._runner = runner or ToolRunner(config.tools, config.data_path() / "cache")
        self._tools = PaidTools(self._runner)
        self._functions = FunctionRunner(
            self._engines, self._tools, config.gateway.limits.max_tool_rounds
        )

    def use(self, config: AtlasConfig) -> None:
        """Take over a changed pool; what was there stays usable for requests under way."""
        self._engines.use(config.models)
        self._runner.use(config.tools)

    async def start(self) -> None:
        """Start the tools' workers and keep them warm."""
        await self._runner.start()

    def close(self) -> None:
        """Let go of the tools' workers."""
        self._runner.close()

    def kind(self, tool_id: str) -> str:
        """How a tool joins a model."""
        return self._runner.tool(tool_id).kind if tool_id in self._runner else "none"

    async def run(
        self, pair: Pair, call: ChatCall, budget: Budget, result: StepResult, *, stream: bool
    ) -> AsyncGenerator[Delta, None]:
        """Run a pair on a request.

        Args:
            pair: A configured pair.
            call: The request.
            budget: When the step must be done, and what it may cost.
            result: Filled with the outcome; complete once the generator ends.
            stream: Whether to ask the engine for pieces; otherwise one delta per answer comes at
                the end.

        Yields:
            Pieces of the answer as they are known to be final.

        Raises:
            InvalidRequest: If the engine refuses the request.
            UnfitForPair: If another pair may take the request: this one's context, its tool or its
                price does not fit.
            EngineError, ToolFailed, DeadlineExceeded: If the step fails.
        """
        kind, num_choices = self.kind(pair.tool_id), call.sampling.get("n", 1)
        if kind in ("function", "sampling") and num_choices > 1:
            raise InvalidRequest(f"n: the pair {pair} gives one answer, got {num_choices}", "n")
        messages = [dict(message) for message in call.messages]
        if kind == "context":
            await self._add_context(pair, call, messages, budget, result)
        _add_note(messages, call)
        if kind == "sampling":
            settings = self._runner.tool(pair.tool_id).config
            assert isinstance(settings, BestOfConfig)
            await sample(self._engines, settings, pair, call, messages, budget, result)
            if stream:
                yield whole_delta(result.choices)
            return
        if kind == "function":
            runs = self._functions.with_function(
                pair,
                self._runner.tool(pair.tool_id),
                call,
                messages,
                budget,
                result,
                stream=stream,
            )
        elif call.tools and call.tool_choice != "none":
            runs = self._functions.with_callers_tools(
                pair, call, messages, budget, result, stream=stream
            )
        else:
            body = self._engines.body(pair.model_id, call.sampling, messages)
            if call.tools:
                body |= {"tools": list(call.tools), "tool_choice": "none"}
            runs = self._engines.generate(pair.model_id, body, budget, result, stream=stream)
        async with aclosing(runs) as deltas:
            async for delta in deltas:
                yield delta

    async def _add_context(
        self,
        pair: Pair,
        call: ChatCall,
        messages: list[dict[str, Any]],
        budget: Budget,
        result: StepResult,
    ) -> None:
        """Put what the tool finds for the query before it in the last user message."""
        query = call.query[:MAX_QUERY_CHARS]
        try:
            text = await self._tools.run(pair, {"query": query}, budget, result)
        except ToolRetry:
            # The query is the caller's, and no model can mend it.
            raise UnfitForPair(
                "messages: the last user message holds nothing to look for; say it in words, or "
                "name a pair without retrieval",
                "messages",
            ) from None
        for message in reversed(messages):
            if message["role"] == "user":
                message["content"] = with_question(text.removesuffix(query_line(query)), call.query)
                return


def _add_note(messages: list[dict[str, Any]], call: ChatCall) -> None:
    """Put what the planner said before the question, whatever else stands there."""
    if call.note is None:
        return
    for message in reversed(messages):
        if message["role"] == "user":
            message["content"] = with_note(call.note, message.get("content") or "")
            return
