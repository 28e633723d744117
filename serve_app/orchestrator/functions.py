"""Models with tools to call: the pair's own function tool, or the caller's tools."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from serve_app.budget import Budget
from serve_app.errors import BudgetExceeded, EngineError, ToolRetry, UnreadableCall
from serve_app.orchestrator.paying import PaidEngines, PaidTools
from serve_app.orchestrator.result import Delta, StepResult, finish, text_only, whole_delta
from serve_app.orchestrator.tool_calls import (
    UNREADABLE,
    ReplyGate,
    looks_like_call,
    read_arguments,
)
from serve_app.schemas import ChatCall, Pair, ToolCall
from serve_app.tools.base import Tool

_REPAIR = (
    "That reply cannot be used: {reason}. Reply again. Either call one of the tools ({names}), "
    "with a JSON object as its arguments, or answer in plain text without any call in it."
)


@dataclass
class _Offer:
    """Tools offered to a model, and how far it may err."""

    tools: list[dict[str, Any]]
    tool_choice: Any
    passes_calls: bool
    """Whether a call is the caller's to run, and so part of the answer."""
    repaired: bool = False
    """Whether the model was told of a call that could not be read."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tool["function"]["name"] for tool in self.tools)

    @property
    def fields(self) -> dict[str, Any]:
        chosen = {} if self.tool_choice is None else {"tool_choice": self.tool_choice}
        return {"tools": self.tools} | chosen

    def fault(self, choice: dict[str, Any]) -> str | None:
        """Why a reply is neither an answer nor a call; `None` if it is one."""
        message = choice["message"]
        text = message.get("content") or ""
        if message.get("tool_calls"):
            return None
        if looks_like_call(text, self.names):
            return "it looks like a tool call, and cannot be read as one"
        has_thought = bool(message.get("reasoning") or message.get("reasoning_content"))
        # vLLM's parser keeps a streamed call that it cannot read to itself.
        return None if text.strip() or has_thought or self.passes_calls else "it is empty"


class FunctionRunner:
    """Runs models that have tools to call."""

    def __init__(self, engines: PaidEngines, tools: PaidTools, max_rounds: int) -> None:
        """Join the parts.

        Args:
            engines: Ask models.
            tools: Run what models call.
            max_rounds: Replies with calls in them before the model has to answer.
        """
        self._engines = engines
        self._tools = tools
        self._max_rounds = max_rounds

    async def with_function(
        self,
        pair: Pair,
        tool: Tool,
        call: ChatCall,
        messages: list[dict[str, Any]],
        budget: Budget,
        result: StepResult,
        *,
        stream: bool,
    ) -> AsyncGenerator[Delta, None]:
        """Offer the pair's tool; run what the model calls; stop when it answers.

        Raises:
            UnreadableCall: If its calls cannot be read.
            EngineError: If it does not answer.
            AtlasError: If the engine or the tool fails, or the budget does not cover them.
        """
        offer = _Offer([tool.schema()], "auto", passes_calls=False)
        for _ in range(self._max_rounds + 1):
            replies = self._reply(pair, call, messages, offer, budget, result, stream=stream)
            async with aclosing(replies) as deltas:
                async for delta in deltas:
                    texts = [text for text in map(text_only, delta.choices) if text]
                    if texts:
                        yield Delta(texts)
            message = result.choices[0]["message"]
            calls = message.get("tool_calls") or []
            if not calls:
                if stream:
                    yield Delta([finish(choice) for choice in result.choices])
                return
            messages.append(
                {"role": "assistant", "content": message.get("content") or "", "tool_calls": calls}
            )
            for tool_call in calls:
                text = await self._call(pair, tool_call, budget, result)
                messages.append({"role": "tool", "tool_call_id": tool_call["id"], "content": text})
        result.choices = []
        raise EngineError(
            f"the model called {pair.tool_id} more than {self._max_rounds} times without an answer"
        )

    def with_callers_tools(
        self,
        pair: Pair,
        call: ChatCall,
        messages: list[dict[str, Any]],
        budget: Budget,
        result: StepResult,
        *,
        stream: bool,
    ) -> AsyncGenerator[Delta, None]:
        """Offer the caller's tools; a call is an answer, and one that cannot be read is none.

        Raises:
            AtlasError: As `with_function`.
        """
        offer = _Offer(list(call.tools), call.tool_choice, passes_calls=True)
        return self._reply(pair, call, messages, offer, budget, result, stream=stream)

    async def _reply(
        self,
        pair: Pair,
        call: ChatCall,
        messages: list[dict[str, Any]],
        offer: _Offer,
        budget: Budget,
        result: StepResult,
        *,
        stream: bool,
    ) -> AsyncGenerator[Delta, None]:
        """One reply that is an answer or a call; a model that gives neither is told so, once.

        Where the caller's own `max_tokens` cut a call short, asking again is of no use: the reply
        has no text, and ends for the reason `length`.

        Raises:
            UnreadableCall: If the second try is neither, or if pieces went on before that was
                known.
        """
        while True:
            body = self._engines.body(pair.model_id, call.sampling, messages) | offer.fields
            gate = ReplyGate(offer.names, passes_calls=offer.passes_calls)
            generates = self._engines.generate(pair.model_id, body, budget, result, stream=stream)
            async with aclosing(generates) as deltas:
                async for delta in deltas:
                    for passed in gate.feed(delta):
                        yield passed
            faults = [fault for fault in map(offer.fault, result.choices) if fault]
            if not faults:
                if offer.passes_calls or not result.choices[0]["message"].get("tool_calls"):
                    for held in gate.rest():
                        yield held
                return
            if _is_cut(call, result.choices) and not gate.is_open:
                result.choices = [_withheld(c) if offer.fault(c) else c for c in result.choices]
                if stream and offer.passes_calls:
                    yield whole_delta(result.choices)
                return
            text = result.choices[0]["message"].get("content") or ""
            result.choices = []
            if not offer.passes_calls:
                result.tool_calls.append(ToolCall(pair.tool_id, {}, False, UNREADABLE, 0.0))
            if offer.repaired or gate.is_open:
                raise UnreadableCall(UNREADABLE)
            offer.repaired = True
            wrong = _REPAIR.format(reason=faults[0], names=", ".join(offer.names))
            messages += [
                {"role": "assistant", "content": text},
                {"role": "user", "content": wrong},
            ]

    async def _call(
        self, pair: Pair, tool_call: dict[str, Any], budget: Budget, result: StepResult
    ) -> str:
        """Run one call the model made; a call it got wrong comes back as text it can act on."""
        function = tool_call["function"]
        began_s = time.monotonic()
        arguments: dict[str, Any] = {}
        try:
            if function["name"] != pair.tool_id:
                raise ToolRetry(
                    f"there is no tool {function['name']!r}; the tool offered is {pair.tool_id!r}"
                )
            arguments = read_arguments(function["arguments"])
            return await self._tools.run(pair, arguments, budget, result)
        except BudgetExceeded:
            refusal = "the request's budget covers no further call; answer without it"
        except ToolRetry as error:
            refusal = error.message
        seconds = time.monotonic() - began_s
        result.tool_calls.append(ToolCall(pair.tool_id, arguments, False, refusal, seconds))
        return f"Error: {refusal}"


def _is_cut(call: ChatCall, choices: list[dict[str, Any]]) -> bool:
    """Whether the caller's limit on tokens ended a reply."""
    is_limited = call.sampling.get("max_tokens") is not None
    return is_limited and any(choice.get("finish_reason") == "length" for choice in choices)


def _withheld(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice without its text."""
    return {**choice, "message": {**choice["message"], "content": ""}, "logprobs": None}
