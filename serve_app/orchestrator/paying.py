"""Calls that cost money: models and tools, each within the budget that it is given.

Before a call the most that it may use is reserved: every byte of the prompt as a token, and all
the tokens that the model may write, for each sample. A model is told to write no more tokens than
the budget covers. After the call its use is settled by what the engine reports.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any

from serve_app.budget import Budget, Reservation, Use
from serve_app.config import ModelConfig
from serve_app.errors import EngineError, ToolFailed
from serve_app.models.protocol import ChatBody
from serve_app.orchestrator.engines import ModelClients
from serve_app.orchestrator.result import ChunkMerger, Delta, StepResult
from serve_app.schemas import Pair, ToolCall, Usage
from serve_app.tools.runner import ToolRunner


class PaidEngines:
    """The pool's models, and what their tokens cost."""

    def __init__(self, clients: ModelClients) -> None:
        """Know no model yet.

        Args:
            clients: Handles to the models.
        """
        self._clients = clients
        self._models: dict[str, ModelConfig] = {}

    def use(self, models: Iterable[ModelConfig]) -> None:
        """Take over a changed pool; models that left stay known for requests under way."""
        self._models |= {model.model_id: model for model in models}

    def body(
        self, model_id: str, sampling: dict[str, Any], messages: Sequence[dict[str, Any]]
    ) -> ChatBody:
        """An engine's request, with the model's own limit on tokens."""
        most = self._models[model_id].max_completion_tokens
        max_tokens = min(most, sampling.get("max_tokens", most))
        return {**sampling, "messages": list(messages), "max_tokens": max_tokens}

    async def generate(
        self, model_id: str, body: ChatBody, budget: Budget, result: StepResult, *, stream: bool
    ) -> AsyncGenerator[Delta, None]:
        """One engine call; leaves its choices in `result`, and its cost.

        Args:
            model_id: Who is asked.
            body: The request; `max_tokens` is lowered to what the budget covers.
            budget: Pays.
            result: Takes the choices.
            stream: Whether to ask for pieces and to yield them.

        Raises:
            BudgetExceeded: If not one token is covered.
            AtlasError: What the engine fails with.
        """
        body = self._affordable(model_id, body, budget)
        with self._reserve(model_id, [body], budget) as held:
            if not stream:
                completion = await self._clients.complete(model_id, body, budget.deadline)
                self._charge(model_id, completion.get("usage"), result, held)
                result.choices = completion["choices"]
                return
            merger, usage = ChunkMerger(), None
            try:
                async with aclosing(
                    self._clients.stream(model_id, body, budget.deadline)
                ) as chunks:
                    async for chunk in chunks:
                        usage = chunk.get("usage") or usage
                        choices = [
                            {**c, "delta": c.get("delta") or {}} for c in chunk.get("choices") or ()
                        ]
                        merger.add(choices)
                        if choices:
                            yield Delta(choices)
            except BaseException:
                if usage:
                    self._charge(model_id, usage, result, held)
                raise
            self._charge(model_id, usage, result, held)
            result.choices = merger.choices()
            if not result.choices:
                raise EngineError("the engine gave no choice")

    async def complete_all(
        self, model_id: str, bodies: Sequence[ChatBody], budget: Budget, result: StepResult
    ) -> list[dict[str, Any]]:
        """Whole completions side by side; all of them, or none is waited for.

        Raises:
            BudgetExceeded: If the budget does not cover them all.
            AtlasError: What the first of them to fail fails with.
        """
        with self._reserve(model_id, bodies, budget) as held:
            tasks = [
                asyncio.ensure_future(self._clients.complete(model_id, body, budget.deadline))
                for body in bodies
            ]
            try:
                completions = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                used = [
                    self._used(model_id, task.result().get("usage"))
                    for task in tasks
                    if not task.cancelled() and task.exception() is None
                ]
                total = Usage()
                for usage in used:
                    total.add(usage or Usage())
                result.usage.add(total)
                held.settle(None if None in used else total)
        return completions

    def _affordable(self, model_id: str, body: ChatBody, budget: Budget) -> ChatBody:
        """The request with no more tokens than the budget covers; one at least."""
        left, covered = budget.left, math.inf
        if math.isinf(left.usd) and math.isinf(left.tokens):
            return body
        prompt = self._most(model_id, body | {"max_tokens": 0})
        price = self._models[model_id].price.usd_per_1m_completion_tokens / 1e6
        if price > 0:
            covered = (left.usd - prompt.usd) / price
        covered = min(covered, left.tokens - prompt.tokens) / body.get("n", 1)
        return body | {"max_tokens": int(max(1, min(body["max_tokens"], covered)))}

    def _reserve(self, model_id: str, bodies: Sequence[ChatBody], budget: Budget) -> Reservation:
        left = budget.left
        if math.isinf(left.usd) and math.isinf(left.tokens):
            most = Use(model_calls=len(bodies))  # the prompts need not be measured
        else:
            each = [self._most(model_id, body) for body in bodies]
            most = Use(sum(use.usd for use in each), sum(use.tokens for use in each), len(bodies))
        work = "a call" if len(bodies) == 1 else f"{len(bodies)} calls"
        return budget.reserve(most, f"{work} of the model {model_id!r}")

    def _most(self, model_id: str, body: ChatBody) -> Use:
        """What a request may use: no tokenizer makes more tokens of a text than it has bytes."""
        text = json.dumps([body["messages"], body.get("tools", [])], ensure_ascii=False)
        prompt_tokens = len(text.encode("utf-8", "surrogatepass"))
        completion_tokens = body["max_tokens"] * body.get("n", 1)
        usd = self._cost_usd(model_id, prompt_tokens, completion_tokens)
        return Use(usd, prompt_tokens + completion_tokens)

    def _cost_usd(self, model_id: str, prompt_tokens: int, completion_tokens: int) -> float:
        price = self._models[model_id].price
        return (
            prompt_tokens * price.usd_per_1m_prompt_tokens
            + completion_tokens * price.usd_per_1m_completion_tokens
        ) / 1e6

    def _used(self, model_id: str, usage: dict[str, Any] | None) -> Usage | None:
        """What an engine says that a call used; `None`: it does not say."""
        if not usage:
            return None
        prompt, completion = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
        return Usage(prompt, completion, self._cost_usd(model_id, prompt, completion))

    def _charge(
        self,
        model_id: str,
        usage: dict[str, Any] | None,
        result: StepResult,
        held: Reservation,
    ) -> None:
        """Settle a call and put it on the bill."""
        used = self._used(model_id, usage)
        held.settle(used)
        result.usage.add(used or Usage())


class PaidTools:
    """The pool's tools, and what their calls cost."""

    def __init__(self, runner: ToolRunner) -> None:
        """Pay for a runner's calls."""
        self._runner = runner

    async def run(
        self, pair: Pair, arguments: dict[str, Any], budget: Budget, result: StepResult
    ) -> str:
        """Run the pair's tool as a Ray task; records the call and its price.

        Raises:
            BudgetExceeded: If the budget does not cover the call.
            ToolRetry: If the arguments are wrong.
            ToolFailed: If the call fails.
        """
        price_usd = self._runner.tool(pair.tool_id).config.price_usd_per_call
        began_s = time.monotonic()
        most = Use(usd=price_usd, tool_calls=1)
        with budget.reserve(most, f"a call of the tool {pair.tool_id!r}") as held:
            try:
                outcome = await self._runner.run(
                    pair.tool_id, arguments, deadline_s=budget.deadline.remaining_s()
                )
            except ToolFailed as error:
                seconds = time.monotonic() - began_s
                result.tool_calls.append(
                    ToolCall(pair.tool_id, arguments, False, error.message, seconds)
                )
                raise
            used = Usage(cost_usd=outcome.cost_usd)
            held.settle(used)
        result.usage.add(used)
        result.tool_calls.append(
            ToolCall(pair.tool_id, arguments, True, outcome.text, outcome.seconds, outcome.data)
        )
        return outcome.text
