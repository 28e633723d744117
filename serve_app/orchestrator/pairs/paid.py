"""Calls that cost something: of models and tools, each within the budget that it is given.

Before a call the most that it may use is reserved: every byte of the prompt as a token, and all
the tokens that the model may write, for each sample. A model is told to write no more tokens than
the budget covers. After the call its use is settled by what the engine reports. A call that fails
is made again where the table of recovery says so.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from serve_app.budget import Budget, Reservation, Use
from serve_app.config import ModelConfig, RemoteModelConfig
from serve_app.config.context import ContextConfig
from serve_app.config.tools import RetrievalConfig
from serve_app.content import PICTURE_TOKENS, without_pictures
from serve_app.errors import (
    AtlasError,
    ContextTooLong,
    DeadlineExceeded,
    EngineBusy,
    EngineError,
    InvalidRequest,
    KeyRequired,
    ReplicaDied,
    ToolFailed,
    ToolRetry,
    ToolWorkerDied,
    UnfitForPair,
)
from serve_app.models.clients import ModelClients
from serve_app.models.protocol import ChatBody
from serve_app.models.reply import Choice, ChunkMerger, ModelReply, read_chunk, read_reply
from serve_app.orchestrator.answer import text_of
from serve_app.orchestrator.breaker import Breakers
from serve_app.orchestrator.context import ContextFitter
from serve_app.orchestrator.evidence import turn_of
from serve_app.orchestrator.likeness import TextLikeness
from serve_app.orchestrator.pairs.base import Emit, PairWork
from serve_app.orchestrator.pairs.selection import Embed
from serve_app.orchestrator.recovery import (
    LOADS,
    LONGEST_PAUSE_S,
    Fault,
    Move,
    RetryBudget,
    fault_of,
    pause_s,
)
from serve_app.orchestrator.summary import Summarizer
from serve_app.orchestrator.tokens import TokenCounter
from serve_app.orchestrator.trace import Span, SpanKind
from serve_app.schemas import ChatCall, Effects, Pair, ToolCall, Usage
from serve_app.tools.base import Function, Tool, ToolResult
from serve_app.tools.runner import ToolRunner

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

WITH_LOGPROBS = {"logprobs": True, "top_logprobs": 4}
"""What a request has whose answer is to be judged: the entropy takes the likeliest tokens."""
_CHARS_PER_TOKEN = 4
"""About."""


class PaidModels:
    """The pool's models, and what their tokens cost."""

    def __init__(
        self,
        clients: ModelClients,
        context: ContextConfig | None = None,
        embed: Embed | None = None,
        breaker_failures: int = 5,
    ) -> None:
        """Know no model yet.

        Args:
            clients: Handles to the models.
            context: How conversations are made to fit; `None`: by the defaults.
            embed: The deployment's encoder; `None`: words alone say which turns are kept.
            breaker_failures: Calls in a row that fail before a model's breaker opens.
        """
        context = context or ContextConfig()
        self._counter = TokenCounter()
        summarizer = Summarizer(context.summarizer, self) if context.summarizer else None
        self._context = ContextFitter(context, self._counter, TextLikeness(embed), summarizer)
        self._clients = clients
        self._models: dict[str, ModelConfig] = {}
        self._retries = RetryBudget()
        self.breakers = Breakers(clients, breaker_failures)
        """Of the pool's models."""
        self._no_logprobs: set[str] = set()
        """Models whose engines refused a request for log-probabilities, and took it without."""

    def use(self, models: Iterable[ModelConfig]) -> None:
        """Take over a changed pool; models that left stay known for requests under way."""
        known = {model.model_id: model for model in models}
        self._models |= known
        self._counter.use(known.values())

    def close(self) -> None:
        """Give up what is under way."""
        self.breakers.close()
        self._counter.close()

    def sees(self, model_id: str) -> bool:
        """Whether a model takes pictures itself."""
        return self._models[model_id].capabilities.vision

    def worth_trying(self, pair: Pair, failed: Pair, failure: AtlasError) -> bool:
        """Whether another candidate may answer where one failed.

        Args:
            pair: The other candidate.
            failed: The one that failed.
            failure: What it failed with.
        """
        if self.breakers.is_open(pair.model_id):
            return False
        if not isinstance(failure, ContextTooLong) or pair.is_pattern:
            return True
        own, least = self.window(pair.model_id), self.window(failed.model_id)
        return own > least or (math.isinf(own) and pair.model_id != failed.model_id)

    def window(self, model_id: str) -> float:
        """Tokens of prompt and answer that a model takes together; infinite: not known."""
        model = self._models.get(model_id)
        return math.inf if model is None else model.able().context_tokens

    def body(
        self, model_id: str, sampling: dict[str, Any], messages: Sequence[dict[str, Any]]
    ) -> ChatBody:
        """An engine's request, with the model's own limit on tokens."""
        most = self._models[model_id].max_completion_tokens
        max_tokens = min(most, sampling.get("max_tokens", most))
        return {**sampling, "messages": list(messages), "max_tokens": max_tokens}

    async def generate(
        self, work: PairWork, body: ChatBody, outlet: Callable[[], Emit] | None
    ) -> list[Choice]:
        """One reply of the pair's model, with log-probabilities where they are wanted.

        Args:
            work: The run of the pair.
            body: The request. Its messages are shortened to the model's context, and `max_tokens`
                is lowered to what context and budget cover.
            outlet: Makes what takes the reply's pieces, anew for each try; `None`: the reply is
                wanted whole, as it is wherever the run's answer is.

        Returns:
            The reply's choices.

        Raises:
            ContextTooLong: If it cannot be shortened to fit.
            BudgetExceeded: If not one token is covered.
            AtlasError: What the engine fails with.
        """
        model_id, before = work.pair.model_id, work.num_sent
        body = await self._context.fitted(work, body, self.window(model_id))
        asks = (
            work.wants_logprobs and not body.get("logprobs") and model_id not in self._no_logprobs
        )
        if not asks:
            return await self._reply(work, body, outlet)
        try:
            return await self._reply(work, body | WITH_LOGPROBS, outlet)
        except UnfitForPair:
            raise
        except InvalidRequest:
            sent = work.num_sent > before
            if work.recovery.move(Fault.EXTRA, sent=sent, again=True) is not Move.AGAIN:
                raise
        choices = await self._reply(work, body, outlet)
        self._no_logprobs.add(model_id)
        return choices

    async def complete_all(
        self,
        work: PairWork,
        model_id: str,
        bodies: Sequence[ChatBody],
        budget: Budget,
        span: Span,
    ) -> list[ModelReply]:
        """Whole answers of another model side by side; all of them, or none is waited for.

        Raises:
            BudgetExceeded: If the budget does not cover them all.
            AtlasError: What the first of them to fail fails with.
        """

        async def complete(body: ChatBody) -> ModelReply:
            return read_reply(await self._clients.complete(model_id, body, budget.deadline))

        def ask(body: ChatBody) -> Awaitable[ModelReply]:
            return self._recovered(work, model_id, budget, lambda: complete(body))

        with (
            await self._hold(model_id, bodies, budget) as held,
            span.child(SpanKind.MODEL, model_id) as calls,
        ):
            tasks = [asyncio.ensure_future(ask(body)) for body in bodies]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                used = [
                    self._priced(model_id, task.result().usage)
                    for task in tasks
                    if not task.cancelled() and task.exception() is None
                ]
                total = Usage()
                for usage in used:
                    total.add(usage or Usage())
                calls.charge(total)
                held.settle(None if None in used else total)

    async def _reply(
        self, work: PairWork, body: ChatBody, outlet: Callable[[], Emit] | None
    ) -> list[Choice]:
        def ask() -> Awaitable[list[Choice]]:
            return self._call(work, body, outlet() if outlet and work.emit else None)

        return await self._recovered(work, work.pair.model_id, work.budget, ask)

    async def _recovered(
        self, work: PairWork, model_id: str, budget: Budget, ask: Callable[[], Awaitable[_T]]
    ) -> _T:
        """Ask a model, and ask it the same again where the table says so."""
        config = self._models[model_id]
        most = config.max_retries if isinstance(config, RemoteModelConfig) else 0
        self._retries.earn()
        is_pairs = model_id == work.pair.model_id
        before, tries = work.num_sent, 0
        while True:
            try:
                result = await ask()
            except InvalidRequest as refusal:
                self.breakers.answered(model_id)
                if isinstance(refusal, ContextTooLong):
                    self._context.refused(model_id)
                raise
            except EngineError as failure:
                tries += 1
                self.breakers.failed(model_id, failure)
                fault, wait_s = fault_of(failure), pause_s(failure, tries)
                can = wait_s < budget.deadline.remaining_s()
                if isinstance(failure, ReplicaDied):
                    work.recovery.deaths += is_pairs
                elif fault in LOADS:
                    can = can and tries <= most and self._may_wait(model_id, failure)
                move = work.recovery.move(
                    fault,
                    sent=work.num_sent > before,
                    again=can,
                    another=work.has_next or not is_pairs,  # the majority stands in for a verifier
                )
                if move is not Move.AGAIN or (fault in LOADS and not self._retries.spend()):
                    raise
                logger.warning("model %s: %s; asking again", model_id, failure.message)
                await asyncio.sleep(wait_s)
            else:
                self.breakers.answered(model_id)
                return result

    def _may_wait(self, model_id: str, failure: EngineError) -> bool:
        """Whether a model may be asked again, and the pause that it asks for can be waited for."""
        if self.breakers.is_open(model_id):
            return False
        if not isinstance(failure, EngineBusy):
            return True
        return failure.retry_after_s is not None and failure.retry_after_s <= LONGEST_PAUSE_S

    async def _call(self, work: PairWork, body: ChatBody, emit: Emit | None) -> list[Choice]:
        """One call of the pair's model; its pieces go to `emit`, `None`: it is asked as a whole."""
        model_id, deadline = work.pair.model_id, work.budget.deadline
        body = self._affordable(model_id, body, work.budget)
        session = {"session": work.call.session} if work.call.session else {}
        with (
            await self._hold(model_id, [body], work.budget) as held,
            work.span.child(SpanKind.MODEL, model_id) as span,
        ):
            if emit is None:
                try:
                    said = await self._clients.complete(model_id, body, deadline, **session)
                except (asyncio.CancelledError, DeadlineExceeded):
                    if work.budget.is_metered:  # nobody says how far the engine came
                        self._charge(model_id, self._most_tokens(body), span, held)
                    raise
                reply = read_reply(said)
                choices, usage = reply.choices, reply.usage
                text = text_of(choices)
                self._charge(model_id, usage, span, held, None if usage else _about(body, text))
                self._learn(model_id, body, usage)
                span.said(text)
                span.turn = turn_of(choices)
                return choices
            merger, usage = ChunkMerger(), None
            try:
                async with aclosing(
                    self._clients.stream(model_id, body, deadline, **session)
                ) as chunks:
                    async for chunk in chunks:
                        pieces, told = read_chunk(chunk)
                        usage = told or usage
                        merger.add(pieces)
                        if pieces:
                            await emit(pieces)
            except BaseException:
                sent = text_of(merger.choices())
                if usage or sent:
                    self._charge(model_id, usage or _about(body, sent), span, held)
                raise
            choices = merger.choices()
            text = text_of(choices)
            self._charge(model_id, usage, span, held, None if usage else _about(body, text))
            self._learn(model_id, body, usage)
            if not choices:
                raise EngineError("the engine gave no choice")
            span.said(text)
            span.turn = turn_of(choices)
            return choices

    def _learn(self, model_id: str, body: ChatBody, usage: Usage | None) -> None:
        """Have the context's count learn from what a prompt took, where there is a window."""
        taken = usage.prompt_tokens if usage else 0
        if taken and not math.isinf(self.window(model_id)):
            self._context.told(model_id, body, taken)

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

    async def _hold(self, model_id: str, bodies: Sequence[ChatBody], budget: Budget) -> Reservation:
        if not budget.is_metered:
            most = Use(model_calls=len(bodies))  # the prompts need not be measured
        else:
            each = [self._most(model_id, body) for body in bodies]
            most = Use(sum(use.usd for use in each), sum(use.tokens for use in each), len(bodies))
        work = "a call" if len(bodies) == 1 else f"{len(bodies)} calls"
        return await budget.hold(most, f"{work} of the model {model_id!r}")

    def _most(self, model_id: str, body: ChatBody) -> Use:
        """What a request may use: no tokenizer makes more tokens of a text than it has bytes."""
        most = self._most_tokens(body)
        return Use(self._cost_usd(model_id, most), most.prompt_tokens + most.completion_tokens)

    @staticmethod
    def _most_tokens(body: ChatBody) -> Usage:
        text, num_pictures = _prompt(body)
        prompt_tokens = len(text.encode("utf-8", "surrogatepass")) + PICTURE_TOKENS * num_pictures
        completion_tokens = body["max_tokens"] * body.get("n", 1)
        return Usage(prompt_tokens, completion_tokens)

    def _cost_usd(self, model_id: str, usage: Usage) -> float:
        price = self._models[model_id].price
        return (
            usage.prompt_tokens * price.usd_per_1m_prompt_tokens
            + usage.completion_tokens * price.usd_per_1m_completion_tokens
        ) / 1e6

    def _priced(self, model_id: str, usage: Usage | None) -> Usage | None:
        """What a call used, with what that costs; `None`: the engine does not say."""
        if usage is None:
            return None
        return replace(usage, cost_usd=self._cost_usd(model_id, usage))

    def _charge(
        self,
        model_id: str,
        usage: Usage | None,
        span: Span,
        held: Reservation,
        about: Usage | None = None,
    ) -> None:
        """Settle a call and put it on the bill; `about` goes on the bill where nothing is said."""
        held.settle(self._priced(model_id, usage))
        billed = self._priced(model_id, usage or about)
        if billed is not None:
            span.charge(billed)


def _prompt(body: ChatBody) -> tuple[str, int]:
    """What a model reads, as text, and how many pictures."""
    messages, num_pictures = without_pictures(body["messages"])
    return json.dumps([messages, body.get("tools", [])], ensure_ascii=False), num_pictures


def _about(body: ChatBody, answer: str | None) -> Usage:
    """About what a call has used whose engine did not say so: no answer is free."""
    text, num_pictures = _prompt(body)
    prompt_tokens = len(text) // _CHARS_PER_TOKEN + PICTURE_TOKENS * num_pictures
    completion_tokens = math.ceil(len(answer or "") / _CHARS_PER_TOKEN)
    return Usage(prompt_tokens, completion_tokens)


class PaidTools:
    """The pool's tools, and what their calls cost."""

    def __init__(self, runner: ToolRunner) -> None:
        """Pay for a runner's calls."""
        self._runner = runner

    def tool(self, tool_id: str) -> Tool:
        """A tool's description and settings."""
        return self._runner.tool(tool_id)

    def functions(self, tool_id: str) -> tuple[Function, ...]:
        """What a tool offers a model."""
        return self._runner.functions(tool_id)

    def check_key(self, tool_id: str, call: ChatCall) -> None:
        """Refuse a request that cannot use a tool, because each of its functions acts once.

        Raises:
            KeyRequired: If the request has no idempotency key.
        """
        functions = self.functions(tool_id) if tool_id in self._runner else ()
        if functions and all(f.effects is Effects.ONCE for f in functions):
            _require_key(tool_id, call)

    async def run(
        self, work: PairWork, arguments: dict[str, Any], function: str | None = None
    ) -> ToolResult:
        """Run the pair's tool as a Ray task; again where its worker died and the table allows it.

        Args:
            work: The run of the pair.
            arguments: Of the call.
            function: Which of the tool's functions; `None`: the one that has the tool's name.

        Raises:
            BudgetExceeded: If the budget does not cover the call.
            KeyRequired: If the call acts once, and the request has no idempotency key.
            EffectRefused: If the call acts once, and that cannot be put on record.
            ToolRetry: If the arguments are wrong.
            ToolFailed: If the call fails.
        """
        try:
            return await self._call(work, arguments, function)
        except ToolWorkerDied:
            can = not work.budget.deadline.is_over()
            if work.recovery.move(Fault.TOOL_DIED, again=can) is not Move.AGAIN:
                raise
            logger.warning("tool %s: its worker died; calling it again", work.pair.tool_id)
        return await self._call(work, arguments, function)

    async def _call(
        self, work: PairWork, arguments: dict[str, Any], function: str | None
    ) -> ToolResult:
        tool_id = work.pair.tool_id
        called = function or tool_id
        tool = self._runner.owner(tool_id, called)
        effects = next(
            (f.effects for f in self._runner.functions(tool_id) if f.name == called),
            tool.config.effects,
        )
        most = Use(usd=tool.config.price_usd_per_call, tool_calls=1)
        with (
            await work.budget.hold(most, f"a call of the tool {tool_id!r}") as held,
            work.span.child(SpanKind.TOOL, called) as span,
        ):
            span.attributes["tool"] = tool.tool_id
            if isinstance(tool.config, RetrievalConfig):
                span.attributes["type"] = tool.config.type
            began_s = span.began_s
            work.recovery.begin(effects)
            try:
                if effects is Effects.ONCE:
                    await self._begin_effect(work.call, tool_id, arguments, called)
                outcome = await self._runner.run(
                    tool_id,
                    arguments,
                    deadline_s=work.budget.deadline.remaining_s(),
                    function=function,
                )
            except (ToolRetry, ToolFailed) as error:
                if isinstance(error, ToolRetry):
                    work.recovery.take_back(effects)  # it comes before any effect
                seconds = time.monotonic() - began_s
                span.called(
                    ToolCall(
                        tool.tool_id,
                        tool.recorded(arguments),
                        False,
                        error.message,
                        seconds,
                        function=called,
                    )
                )
                raise
            used = Usage(cost_usd=outcome.cost_usd)
            held.settle(used)
            span.charge(used)
            span.called(
                ToolCall(
                    tool.tool_id,
                    tool.recorded(arguments),
                    True,
                    outcome.text,
                    outcome.seconds,
                    outcome.data,
                    called,
                )
            )
        return outcome

    async def _begin_effect(
        self, call: ChatCall, tool_id: str, arguments: dict[str, Any], function: str
    ) -> None:
        """Put on record that a call begins that must not be made twice."""
        begin_effect = _require_key(function, call)
        self._runner.check(tool_id, arguments, function)  # what is refused has no effect
        await begin_effect()


def _require_key(name: str, call: ChatCall) -> Callable[[], Awaitable[None]]:
    """What puts an effect of a request on record.

    Raises:
        KeyRequired: If the request has no idempotency key.
    """
    if call.begin_effect is None:
        raise KeyRequired(
            f"a call of {name!r} must not be made twice: send the request with an Idempotency-Key "
            "header",
            "Idempotency-Key",
        )
    return call.begin_effect
