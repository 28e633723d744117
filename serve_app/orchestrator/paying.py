"""Calls that cost money: models and tools, each within the budget that it is given.

Before a call the most that it may cost is reserved: every byte of the prompt as a token, and all
the tokens that the model may write, for each sample. A model is told to write no more tokens than
the budget covers. After the call the cost is settled by what the engine reports.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any

from serve_app.budget import Budget, Reservation
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
        with self._reserve(model_id, body, budget) as held:
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
        most_usd = sum(self._most_usd(model_id, body) for body in bodies)
        with budget.reserve(most_usd, f"asking {model_id!r} {len(bodies)} times") as held:
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
                costs_usd = [
                    self._add(model_id, task.result().get("usage"), result)
                    for task in tasks
                    if not task.cancelled() and task.exception() is None
                ]
                known_usd = [cost_usd for cost_usd in costs_usd if cost_usd is not None]
                held.settle(sum(known_usd) if len(known_usd) == len(costs_usd) else None)
        return completions

    def _affordable(self, model_id: str, body: ChatBody, budget: Budget) -> ChatBody:
        """The request with no more tokens than the budget covers; one at least."""
        price = self._models[model_id].price.usd_per_1m_completion_tokens / 1e6
        left_usd = budget.left_usd
        if math.isinf(left_usd) or price == 0:
            return body
        left_usd -= self._most_usd(model_id, body | {"max_tokens": 0})
        covered = int(left_usd / (price * body.get("n", 1)))
        return body | {"max_tokens": max(1, min(body["max_tokens"], covered))}

    def _reserve(self, model_id: str, body: ChatBody, budget: Budget) -> Reservation:
        most_usd = 0.0 if math.isinf(budget.left_usd) else self._most_usd(model_id, body)
        return budget.reserve(most_usd, f"a call of the model {model_id!r}")

    def _most_usd(self, model_id: str, body: ChatBody) -> float:
        """What a request may cost: no tokenizer makes more tokens of a text than it has bytes."""
        text = json.dumps([body["messages"], body.get("tools", [])], ensure_ascii=False)
        prompt_tokens = len(text.encode("utf-8", "surrogatepass"))
        return self._cost_usd(model_id, prompt_tokens, body["max_tokens"] * body.get("n", 1))

    def _cost_usd(self, model_id: str, prompt_tokens: int, completion_tokens: int) -> float:
        price = self._models[model_id].price
        return (
            prompt_tokens * price.usd_per_1m_prompt_tokens
            + completion_tokens * price.usd_per_1m_completion_tokens
        ) / 1e6

    def _add(self, model_id: str, usage: dict[str, Any] | None, result: StepResult) -> float | None:
        """Put what an engine reports on the bill; the dollars, `None` if it reports nothing."""
        if not usage:
            return None
        prompt, completion = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
        cost_usd = self._cost_usd(model_id, prompt, completion)
        result.usage.add(Usage(prompt, completion, cost_usd))
        return cost_usd

    def _charge(
        self,
        model_id: str,
        usage: dict[str, Any] | None,
        result: StepResult,
        held: Reservation,
    ) -> None:
        held.settle(self._add(model_id, usage, result))


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
        with budget.reserve(price_usd, f"a call of the tool {pair.tool_id!r}") as held:
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
            held.settle(outcome.cost_usd)
        result.usage.add(Usage(cost_usd=outcome.cost_usd))
        result.tool_calls.append(
            ToolCall(pair.tool_id, arguments, True, outcome.text, outcome.seconds, outcome.data)
        )
        return outcome.text
