"""How `model@tool` runs: plain generation, function tools, context tools, sampling tools.

One asynchronous generator serves streamed and whole answers, so that there is one way a pair works.
It yields `Delta`s of the answer and ends with one `StepResult`; nothing re-writes what the model
said.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from serve_app.config import AtlasConfig
from serve_app.errors import AtlasError, EngineError, ToolFailed, ToolRetry
from serve_app.models.protocol import ChatBody
from serve_app.models.verifier import read_score, scoring_body
from serve_app.orchestrator.engines import Deadline, ModelClients
from serve_app.orchestrator.planning import with_note
from serve_app.schemas import ChatCall, Pair, ToolCall, Usage
from serve_app.tools.best_of import best_rated, vote
from serve_app.tools.config import BestOfConfig
from serve_app.tools.retrieval import with_question
from serve_app.tools.runner import ToolRunner

logger = logging.getLogger(__name__)

_CHARS_PER_TOKEN = 3
"""A low guess, so that a cost limit errs on the side of the caller."""
_VERIFIER_SHARE = 0.9
"""Share of a step's time left that a verifier may take."""


@dataclass(frozen=True)
class Delta:
    """Choices of one OpenAI chunk, on their way to the caller."""

    choices: list[dict[str, Any]]


@dataclass
class StepResult:
    """What one run of a pair produced, or a failed run until it failed."""

    choices: list[dict[str, Any]] = field(default_factory=list)
    """Choices of an OpenAI completion: message, finish_reason, logprobs."""
    usage: Usage = field(default_factory=Usage)
    tool_calls: list[ToolCall] = field(default_factory=list)

    @property
    def answer(self) -> str | None:
        """The text of the first choice."""
        return self.choices[0]["message"].get("content") if self.choices else None

    @property
    def mean_logprob(self) -> float | None:
        """Mean token log-probability of the first choice, where it was asked for."""
        tokens = (
            (self.choices[0].get("logprobs") or {}).get("content") if self.choices else None
        ) or []
        return sum(token["logprob"] for token in tokens) / len(tokens) if tokens else None


class PairExecutor:
    """Runs pairs; one per gateway replica."""

    def __init__(self, config: AtlasConfig, clients: ModelClients) -> None:
        """Take the configured tools; `start` gets their workers ready.

        Args:
            config: The deployment.
            clients: Handles to the models.
        """
        self._models = {model.model_id: model for model in config.models}
        self._max_tool_rounds = config.gateway.limits.max_tool_rounds
        self._clients = clients
        self._runner = ToolRunner(config.tools, config.data_path() / "cache")

    def use(self, config: AtlasConfig) -> None:
        """Take over a changed pool; what was there stays usable for requests under way."""
        self._models |= {model.model_id: model for model in config.models}
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
        self, pair: Pair, call: ChatCall, deadline: Deadline, result: StepResult, *, stream: bool
    ) -> AsyncGenerator[Delta, None]:
        """Run a pair on a request.

        Args:
            pair: A configured pair.
            call: The request.
            deadline: When the step must be done.
            result: Filled with the outcome; complete once the generator ends.
            stream: Whether to ask the engine for pieces; otherwise one delta per answer comes at
                the end.

        Yields:
            Pieces of the answer as they are known to be final.

        Raises:
            InvalidRequest: If the engine refuses the request.
            EngineError, ToolFailed, DeadlineExceeded: If the step fails.
        """
        messages = [dict(message) for message in call.messages]
        kind = self.kind(pair.tool_id)
        if kind == "sampling":
            _add_note(messages, call)
            await self._sample(pair, call, messages, deadline, result)
            if stream:
                yield whole_delta(result.choices)
            return
        if kind == "function":
            _add_note(messages, call)
            runs = self._with_function(pair, call, messages, deadline, result, stream=stream)
        else:
            if kind == "context":
                await self._add_context(pair, call, messages, deadline, result)
            _add_note(messages, call)
            body = self._body(pair, call, messages, result)
            if call.tools:
                body |= {"tools": list(call.tools)}
                if call.tool_choice is not None:
                    body["tool_choice"] = call.tool_choice
            runs = self._generate(pair, body, deadline, result, stream=stream)
        async with aclosing(runs) as deltas:
            async for delta in deltas:
                yield delta

    def _body(
        self, pair: Pair, call: ChatCall, messages: list[dict[str, Any]], result: StepResult
    ) -> ChatBody:
        """The engine's request, with the token limit that the model and the caller's budget leave.

        Raises:
            ToolFailed: If the budget leaves nothing.
        """
        model = self._models[pair.model_id]
        max_tokens = min(
            model.max_completion_tokens,
            call.sampling.get("max_tokens", model.max_completion_tokens),
        )
        if call.limits.max_cost_usd is not None and model.price.usd_per_1m_completion_tokens > 0:
            prompt_tokens = len(json.dumps(messages)) / _CHARS_PER_TOKEN
            left_usd = call.limits.max_cost_usd - result.usage.cost_usd
            left_usd -= prompt_tokens * model.price.usd_per_1m_prompt_tokens / 1e6
            affordable = int(left_usd / model.price.usd_per_1m_completion_tokens * 1e6)
            if affordable < 1:
                raise ToolFailed("the request's max_cost_usd does not cover this pair")
            max_tokens = min(max_tokens, affordable)
        return {**call.sampling, "messages": messages, "max_tokens": max_tokens}

    async def _generate(
        self, pair: Pair, body: ChatBody, deadline: Deadline, result: StepResult, *, stream: bool
    ) -> AsyncGenerator[Delta, None]:
        """One engine call; leaves its choices in `result`."""
        if not stream:
            completion = await self._clients.complete(pair.model_id, body, deadline)
            self._charge(pair.model_id, completion.get("usage"), result)
            result.choices = completion.get("choices") or []
            if not result.choices:
                raise EngineError("the engine gave no choice")
            return
        merged: dict[int, dict[str, Any]] = {}
        async with aclosing(self._clients.stream(pair.model_id, body, deadline)) as chunks:
            async for chunk in chunks:
                self._charge(pair.model_id, chunk.get("usage"), result)
                choices = [{**c, "delta": c.get("delta") or {}} for c in chunk.get("choices", ())]
                for choice in choices:
                    merge_choice(merged.setdefault(choice["index"], {}), choice)
                if choices:
                    yield Delta(choices)
        result.choices = [merged[index] for index in sorted(merged)]
        if not result.choices:
            raise EngineError("the engine gave no choice")

    async def _with_function(
        self,
        pair: Pair,
        call: ChatCall,
        messages: list[dict[str, Any]],
        deadline: Deadline,
        result: StepResult,
        *,
        stream: bool,
    ) -> AsyncGenerator[Delta, None]:
        """Offer the tool; run what the model calls; stop when it answers.

        In a stream, the pieces of a round are held back until they are known to be answer text, not
        a call.
        """
        schema = self._runner.tool(pair.tool_id).schema()
        rounds = self._max_tool_rounds
        for _ in range(rounds + 1):
            body = self._body(pair, call, messages, result) | {
                "tools": [schema],
                "tool_choice": "auto",
            }
            async with aclosing(
                self._generate(pair, body, deadline, result, stream=stream)
            ) as deltas:
                async for delta in deltas:
                    texts = [text for text in map(_text_only, delta.choices) if text]
                    if texts:
                        yield Delta(texts)
            message = result.choices[0]["message"]
            calls = message.get("tool_calls") or []
            if not calls:
                if stream:
                    yield Delta([_finish(choice) for choice in result.choices])
                return
            messages.append(
                {"role": "assistant", "content": message.get("content") or "", "tool_calls": calls}
            )
            for tool_call in calls:
                text = await self._call_function(pair, tool_call, deadline, result)
                messages.append({"role": "tool", "tool_call_id": tool_call["id"], "content": text})
        raise ToolFailed(
            f"the model called {pair.tool_id} more than {rounds} times without an answer"
        )

    async def _call_function(
        self, pair: Pair, tool_call: dict[str, Any], deadline: Deadline, result: StepResult
    ) -> str:
        """Run one call the model made; a call it got wrong comes back as text it can act on."""
        function = tool_call["function"]
        began_s = time.monotonic()
        arguments: Any = {}
        try:
            if function["name"] != pair.tool_id:
                raise ToolRetry(
                    f"there is no tool {function['name']!r}; the tool offered is {pair.tool_id!r}"
                )
            try:
                arguments = json.loads(function["arguments"] or "{}")
            except json.JSONDecodeError as error:
                raise ToolRetry(f"the arguments are not JSON: {error.msg}") from None
            if not isinstance(arguments, dict):
                raise ToolRetry("the arguments must be a JSON object")
            return await self._run_tool(pair, arguments, deadline, result)
        except ToolRetry as error:
            seconds = time.monotonic() - began_s
            shown = arguments if isinstance(arguments, dict) else {}
            result.tool_calls.append(ToolCall(pair.tool_id, shown, False, error.message, seconds))
            return f"Error: {error.message}"

    async def _run_tool(
        self, pair: Pair, arguments: dict[str, Any], deadline: Deadline, result: StepResult
    ) -> str:
        """Run the pair's tool as a Ray task; records the call and its price."""
        began_s = time.monotonic()
        try:
            outcome = await self._runner.run(
                pair.tool_id, arguments, deadline_s=deadline.remaining_s()
            )
        except ToolFailed as error:
            seconds = time.monotonic() - began_s
            result.tool_calls.append(
                ToolCall(pair.tool_id, arguments, False, error.message, seconds)
            )
            raise
        result.usage.add(Usage(cost_usd=outcome.cost_usd))
        result.tool_calls.append(
            ToolCall(pair.tool_id, arguments, True, outcome.text, outcome.seconds, outcome.data)
        )
        return outcome.text

    async def _add_context(
        self,
        pair: Pair,
        call: ChatCall,
        messages: list[dict[str, Any]],
        deadline: Deadline,
        result: StepResult,
    ) -> None:
        """Put what the tool finds for the query before it in the last user message."""
        text = await self._run_tool(pair, {"query": call.query}, deadline, result)
        for message in reversed(messages):
            if message["role"] == "user":
                message["content"] = with_question(text, call.query)
                return

    async def _sample(
        self,
        pair: Pair,
        call: ChatCall,
        messages: list[dict[str, Any]],
        deadline: Deadline,
        result: StepResult,
    ) -> None:
        """Several answers at once; the best one wins, see `BestOfConfig.vote`."""
        settings = self._runner.tool(pair.tool_id).config
        assert isinstance(settings, BestOfConfig)
        body = self._body(pair, call, messages, result)
        body |= {
            "n": settings.num_samples,
            "temperature": call.sampling.get("temperature") or settings.temperature,
        }
        began_s = time.monotonic()
        async for _ in self._generate(pair, body, deadline, result, stream=False):
            pass
        answers = [choice["message"].get("content") or "" for choice in result.choices]
        data: dict[str, Any] = {"answers": answers}
        failure: str | None = None
        winner = vote(answers)
        if settings.verifier is not None:
            try:
                data["scores"] = await self._rate(
                    settings.verifier, call.query, answers, deadline, result
                )
                winner = best_rated(data["scores"])
            except AtlasError as error:
                logger.warning("verifier %s: %s", settings.verifier, error.message)
                failure = f"the verifier did not answer ({error.message}); the majority decided"
        seconds = time.monotonic() - began_s
        result.usage.add(Usage(cost_usd=settings.price_usd_per_call))
        result.tool_calls.append(
            ToolCall(
                pair.tool_id,
                {"n": len(answers)},
                failure is None,
                failure or answers[winner],
                seconds,
                data,
            )
        )
        result.choices = [{**result.choices[winner], "index": 0}]

    async def _rate(
        self,
        verifier: str,
        question: str,
        answers: list[str],
        deadline: Deadline,
        result: StepResult,
    ) -> list[float]:
        """What a verifier thinks of each answer, in their order; an empty one is worth nothing.

        Raises:
            AtlasError: If it does not rate them all while there is time to go on without it.
        """
        patience = deadline.sooner(_VERIFIER_SHARE * deadline.remaining_s())
        asked = [number for number, answer in enumerate(answers) if answer.strip()]
        completions = await asyncio.gather(
            *(
                self._clients.complete(verifier, scoring_body(question, answers[n]), patience)
                for n in asked
            )
        )
        scores = [0.0] * len(answers)
        for number, completion in zip(asked, completions, strict=True):
            self._charge(verifier, completion.get("usage"), result)
            scores[number] = read_score(completion)
        return scores

    def _charge(self, model_id: str, usage: dict[str, Any] | None, result: StepResult) -> None:
        if not usage:
            return
        price = self._models[model_id].price
        prompt, completion = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
        cost_usd = (
            prompt * price.usd_per_1m_prompt_tokens
            + completion * price.usd_per_1m_completion_tokens
        )
        result.usage.add(Usage(prompt, completion, cost_usd / 1e6))


def merge_choice(merged: dict[str, Any], choice: dict[str, Any]) -> None:
    """Add one streamed choice to what came before it, giving the choice of a whole completion."""
    merged["index"] = choice["index"]
    message = merged.setdefault("message", {"role": "assistant", "content": None})
    delta = choice["delta"]
    if delta.get("content"):
        message["content"] = (message["content"] or "") + delta["content"]
    for piece in delta.get("tool_calls") or ():
        calls = message.setdefault("tool_calls", [])
        while len(calls) <= piece["index"]:
            calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call = calls[piece["index"]]
        call["id"] = call["id"] or piece.get("id") or ""
        function = piece.get("function") or {}
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""
    if (choice.get("logprobs") or {}).get("content"):
        merged.setdefault("logprobs", {"content": []})["content"] += choice["logprobs"]["content"]
    if choice.get("finish_reason"):
        merged["finish_reason"] = choice["finish_reason"]


def _text_only(choice: dict[str, Any]) -> dict[str, Any] | None:
    """A streamed choice without tool calls and ending, or `None` where no text is left."""
    content = choice["delta"].get("content")
    if not content:
        return None
    kept = {"index": choice["index"], "delta": {"content": content}}
    return kept | ({"logprobs": choice["logprobs"]} if choice.get("logprobs") else {})


def whole_delta(choices: list[dict[str, Any]]) -> Delta:
    """The choices of a whole completion as one streamed piece."""
    pieces = []
    for choice in choices:
        piece = _finish(choice) | {"delta": {"content": choice["message"].get("content") or ""}}
        if choice.get("logprobs"):
            piece["logprobs"] = choice["logprobs"]
        pieces.append(piece)
    return Delta(pieces)


def _add_note(messages: list[dict[str, Any]], call: ChatCall) -> None:
    """Put what the planner said before the question, whatever else stands there."""
    if call.note is None:
        return
    for message in reversed(messages):
        if message["role"] == "user":
            message["content"] = with_note(call.note, message.get("content") or "")
            return


def _finish(choice: dict[str, Any]) -> dict[str, Any]:
    return {
        "index": choice["index"],
        "delta": {},
        "finish_reason": choice.get("finish_reason") or "stop",
    }
