"""Models with tools to call: the pair's own function tool, or the caller's tools."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

from serve_app.config.tools import ManyFunctionsSettings
from serve_app.errors import BudgetExceeded, NoAnswer, ToolRetry, UnreadableCall
from serve_app.models.reply import Choice, ChoicePiece, FunctionRequest
from serve_app.orchestrator.pairs.base import Emit, PairWork
from serve_app.orchestrator.pairs.join import JoinParts
from serve_app.orchestrator.pairs.tool_calls import (
    UNREADABLE,
    ReplyGate,
    looks_like_call,
    read_arguments,
)
from serve_app.orchestrator.recovery import Fault, Move, fault_of
from serve_app.orchestrator.trace import SpanKind
from serve_app.schemas import ChatCall, Effects
from serve_app.tools.base import Function

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
    functions: tuple[Function, ...] = ()
    """What the tools stand for, where they are the pair's."""
    repaired: bool = False
    """Whether the model was told of a call that could not be read."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tool["function"]["name"] for tool in self.tools)

    @property
    def fields(self) -> dict[str, Any]:
        chosen = {} if self.tool_choice is None else {"tool_choice": self.tool_choice}
        return {"tools": self.tools} | chosen

    def fault(self, choice: Choice) -> str | None:
        """Why a reply is neither an answer nor a call; `None` if it is one."""
        text = choice.text or ""
        if choice.calls:
            return None
        if looks_like_call(text, self.names):
            return "it looks like a tool call, and cannot be read as one"
        # vLLM's parser keeps a streamed call that it cannot read to itself.
        return None if text.strip() or choice.has_thought or self.passes_calls else "it is empty"


async def run(work: PairWork, parts: JoinParts) -> list[Choice]:
    """Offer the pair's tool; run what the model calls; stop when it answers.

    Raises:
        UnreadableCall: If its calls cannot be read.
        NoAnswer: If it does not answer.
        AtlasError: If the engine or the tool fails, or the budget does not cover them.
    """
    work.add_note()
    functions = await _fitting(work, parts)
    offer = _Offer([f.schema() for f in functions], "auto", False, functions)

    async def send_texts(choices: Sequence[ChoicePiece]) -> None:
        texts = [text for choice in choices if (text := choice.text_only())]
        if texts:
            await work.send(texts)

    for _ in range(parts.max_tool_rounds + 1):
        choices = await _reply(work, parts, offer, send_texts)
        text, calls = choices[0].text or "", choices[0].calls
        if not calls:
            await work.send([choice.ending() for choice in choices])
            return choices
        said = [called.written() for called in calls]
        work.messages.append({"role": "assistant", "content": text, "tool_calls": said})
        texts = await _call_all(work, parts, offer, calls)
        work.messages += [
            {"role": "tool", "tool_call_id": called.id, "content": text}
            for called, text in zip(calls, texts, strict=True)
        ]
    raise NoAnswer(
        f"the model called {work.pair.tool_id} more than {parts.max_tool_rounds} times without an "
        "answer"
    )


async def _fitting(work: PairWork, parts: JoinParts) -> tuple[Function, ...]:
    """The functions of the pair's tool that are offered."""
    tool_id = work.pair.tool_id
    functions, settings = parts.tools.functions(tool_id), parts.tools.tool(tool_id).config
    if not isinstance(settings, ManyFunctionsSettings):
        return functions
    return await parts.selector.select(
        tool_id,
        functions,
        settings.top_k,
        work.call.query,
        work.budget.deadline,
        work.embedding,
        settings.phrases,
    )


async def with_callers_tools(work: PairWork, parts: JoinParts) -> list[Choice]:
    """Offer the caller's tools; a call is an answer, and one that cannot be read is none.

    Raises:
        AtlasError: As `run`.
    """
    offer = _Offer(list(work.call.tools), work.call.tool_choice, passes_calls=True)
    return await _reply(work, parts, offer, work.send)


async def _reply(work: PairWork, parts: JoinParts, offer: _Offer, send: Emit) -> list[Choice]:
    """One reply that is an answer or a call; a model that gives neither is told so, once.

    Where the caller's own `max_tokens` cut a call short, asking again is of no use: the reply has
    no text, and ends for the reason `length`.

    Raises:
        UnreadableCall: If the second try is neither, or if pieces went on before that was known.
    """
    gate = ReplyGate(offer.names, passes_calls=offer.passes_calls)

    def gated() -> Emit:
        nonlocal gate
        gate = ReplyGate(offer.names, passes_calls=offer.passes_calls)

        async def emit(choices: Sequence[ChoicePiece]) -> None:
            for passed in gate.feed(choices):
                await send(passed)

        return emit

    while True:
        body = parts.models.body(work.pair.model_id, work.call.sampling, work.messages)
        choices = await parts.models.generate(work, body | offer.fields, gated)
        faults = [fault for fault in map(offer.fault, choices) if fault]
        if not faults:
            if offer.passes_calls or not choices[0].calls:
                for held in gate.rest():
                    await send(held)
            return choices
        if _is_cut(work.call, choices) and not gate.is_open:
            choices = [replace(c, text="", logprobs=None) if offer.fault(c) else c for c in choices]
            if offer.passes_calls:
                await send([choice.as_piece() for choice in choices])
            return choices
        work.span.child(SpanKind.VALIDATION, work.pair.model_id).end(faults[0])
        if not offer.passes_calls:
            work.refused({}, UNREADABLE)
        again = not offer.repaired
        if work.recovery.move(Fault.UNREADABLE, sent=gate.is_open, again=again) is not Move.AGAIN:
            raise UnreadableCall(UNREADABLE)
        offer.repaired = True
        wrong = _REPAIR.format(reason=faults[0], names=", ".join(offer.names))
        work.messages += [
            {"role": "assistant", "content": choices[0].text or ""},
            {"role": "user", "content": wrong},
        ]


async def _call_all(
    work: PairWork, parts: JoinParts, offer: _Offer, calls: Sequence[FunctionRequest]
) -> list[str]:
    """Run the calls of a reply: side by side where none has an effect, else one after the other.

    Returns:
        What the model is told of each, in the order of the calls.
    """
    most = parts.max_calls_per_reply
    taken, over = calls[:most], calls[most:]
    effects = {function.name: function.effects for function in offer.functions}
    called = {effects.get(call.name, Effects.NONE) for call in taken}
    works = [functools.partial(_call, work, parts, offer, call) for call in taken]
    if called == {Effects.NONE}:
        texts = await _side_by_side(works)
    else:
        texts = [await run_one() for run_one in works]
    if over:
        refusal = f"at most {most} calls of one reply are run; this one was not"
        work.refused({}, f"{len(over)} calls beyond the {most} of one reply were not run")
        texts += [f"Error: {refusal}"] * len(over)
    return texts


async def _side_by_side(works: Sequence[Callable[[], Coroutine[Any, Any, str]]]) -> list[str]:
    """The results of all, in their order; the first failure ends the others."""
    tasks = [asyncio.create_task(work()) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _call(work: PairWork, parts: JoinParts, offer: _Offer, called: FunctionRequest) -> str:
    """Run one call the model made; a call it got wrong comes back as text it can act on."""
    name, arguments = called.name, dict[str, Any]()
    try:
        if name not in offer.names:
            offered = ", ".join(map(repr, offer.names))
            raise ToolRetry(f"there is no tool {name!r}; offered: {offered}")
        arguments = read_arguments(called.arguments)
    except ToolRetry as error:
        work.refused(arguments, error.message, name if name in offer.names else None)
        return _told(work, error)
    try:
        return (await parts.tools.run(work, arguments, name)).text
    except BudgetExceeded:
        refusal = "the request's budget covers no further call; answer without it"
        work.refused(arguments, refusal, name)
        return f"Error: {refusal}"
    except ToolRetry as error:
        return _told(work, error)


def _told(work: PairWork, error: ToolRetry) -> str:
    """What the model reads of its wrong call, if it may call again."""
    if work.recovery.move(fault_of(error), again=True) is not Move.AGAIN:
        raise error
    return f"Error: {error.message}"


def _is_cut(call: ChatCall, choices: list[Choice]) -> bool:
    """Whether the caller's limit on tokens ended a reply."""
    is_limited = call.sampling.get("max_tokens") is not None
    return is_limited and any(choice.finish_reason == "length" for choice in choices)
