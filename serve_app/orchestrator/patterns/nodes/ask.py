"""`ask`: a pair, the router's choice of one, or another pattern."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jsonschema

from serve_app.budget import Budget
from serve_app.config.patterns.bound import ROUTED_TRIES
from serve_app.config.patterns.check import QUESTION
from serve_app.config.patterns.language import ROUTE, AskNode
from serve_app.config.patterns.template import references_in
from serve_app.content import last_question, pictures_of, text_of_content, with_pictures
from serve_app.errors import AtlasError, EngineError, NoCandidate
from serve_app.models.reply import ChoicePiece, ChunkMerger
from serve_app.orchestrator.answer import mean_logprob_of, text_of
from serve_app.orchestrator.decision_client import facts_of
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.patterns.view import NodeView, Result, Status, by_deadline, is_cap
from serve_app.orchestrator.recovery import FIRST_TRY_SHARE, Move, fault_of
from serve_app.orchestrator.trace import SpanKind
from serve_app.schemas import PATTERN_PREFIX, ChatCall, Decision, Limits, Pair
from serve_app.tools.builtin.retrieval import with_question

logger = logging.getLogger(__name__)

_PASSED_ON = ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty")
"""Of the caller's sampling parameters."""
_CITATION = re.compile(r"\[(\d{1,3})\]")
_MAX_FAULT_CHARS = 300


async def run(
    node: AskNode,
    view: NodeView,
    *,
    wants_logprobs: bool = False,
    repairs: tuple[Result, str] | None = None,
) -> Result:
    """Ask, and once more where the answer does not fit the schema that is asked for.

    Args:
        node: Says whom, and what.
        view: What it sees.
        wants_logprobs: Whether to have the engine's log-probabilities.
        repairs: An earlier answer to the same, and what was wrong with it.

    Raises:
        AtlasError: If there is no answer.
    """
    call = call_of(node, view)
    if repairs is not None:
        call = _told(call, *repairs)
    result = await _asked(node, view, call, wants_logprobs)
    if node.output is None or not result.is_usable:
        return result
    data, fault = read_json(result.text, node.output)
    if fault is not None:
        view.span.child(SpanKind.VALIDATION, "output").end(fault)
        call = _told(
            call,
            result,
            f"{fault}. Answer with JSON alone that fits this schema: {json.dumps(node.output)}",
        )
        result = await _asked(node, view, call, wants_logprobs)
        if not result.is_usable:
            return result
        data, fault = read_json(result.text, node.output)
    if fault is not None:
        raise EngineError(f"the answer does not fit the schema that was asked for: {fault}")
    return replace(result, data=data)


def _told(call: ChatCall, result: Result, fault: str) -> ChatCall:
    """The same call with the answer to it, and what is wrong with that answer."""
    again = (
        {"role": "assistant", "content": result.shown},
        {"role": "user", "content": f"That does not fit: {fault}"},
    )
    return replace(call, messages=(*call.messages, *again))


async def _asked(node: AskNode, view: NodeView, call: ChatCall, wants_logprobs: bool) -> Result:
    if node.pair.startswith(PATTERN_PREFIX):
        # Not at the top: patterns run nodes, and this node runs patterns.
        from serve_app.orchestrator.patterns.declared import run_pattern

        name = node.pair.removeprefix(PATTERN_PREFIX)
        if name not in view.parts.patterns:
            raise NoCandidate(f"the pattern {name!r} does not exist any more")
        work = replace(view.work, call=call)
        inner = replace(view, work=work, streams=_streams(node, view))
        result = await run_pattern(view.parts.patterns[name], inner)
        if node.cite is not None and result.is_usable:
            result = _citing(result, view.results[node.cite].sources)
        return replace(result, max_bytes=node.max_bytes)
    pairs = [Pair.parse(node.pair)]
    if node.pair == ROUTE:
        pairs = await _routed(node, view, call)
    while pairs:
        pair = pairs.pop(0)
        has_next = bool(pairs)
        budget = view.budget.part(FIRST_TRY_SHARE) if has_next else view.budget
        try:
            return await _run_pair(node, view, pair, call, budget, has_next, wants_logprobs)
        except AtlasError as failure:
            models = view.parts.pairs.parts.models
            pairs = [other for other in pairs if models.worth_trying(other, pair, failure)]
            another = bool(pairs) and not view.budget.deadline.is_over()
            move = view.work.recovery.move(
                fault_of(failure), sent=view.work.num_sent > 0, another=another
            )
            if move is not Move.ANOTHER:
                raise
            logger.info("request %s: %s failed; another pair", call.request_id, pair)
    raise AssertionError("a node asks at least one pair")


async def _run_pair(
    node: AskNode,
    view: NodeView,
    pair: Pair,
    call: ChatCall,
    budget: Budget,
    has_next: bool,
    wants_logprobs: bool,
) -> Result:
    """One run of a pair.

    Returns:
        Its answer. Where pieces of it are out when it ends too early, what is out: as partial if a
        cap ended it, else as failed.

    Raises:
        AtlasError: If it fails, and no text is out.
    """
    sent, status, ended = ChunkMerger(), Status.OK, None

    async def emit(choices: Sequence[ChoicePiece]) -> None:
        await view.work.send(choices)
        sent.add(choices)

    try:
        with view.span.child(SpanKind.CALL, str(pair)) as span:
            work = PairWork(
                pair=pair,
                call=call,
                budget=budget,
                span=span,
                emit=emit if _streams(node, view) and view.work.emit is not None else None,
                recovery=view.work.recovery,
                has_next=has_next,
                wants_logprobs=wants_logprobs,
            )
            choices = await by_deadline(view.parts.pairs.run(work), budget, f"the pair {pair}")
    except AtlasError as failure:
        choices, ended = sent.choices(), failure
        if not text_of(choices):
            raise
        status = Status.PARTIAL if is_cap(failure) else Status.FAILED
    result = Result(
        status,
        text=text_of(choices) or "",
        choices=tuple(choices),
        pair=pair,
        mean_logprob=mean_logprob_of(choices),
        max_bytes=node.max_bytes,
        failure=ended,
        is_sent=bool(sent.choices()),
    )
    return _citing(result, view.results[node.cite].sources) if node.cite is not None else result


def _streams(node: AskNode, view: NodeView) -> bool:
    """Whether its text may go to the caller before all of it is there."""
    return view.streams and node.output is None and node.stream is not False


def _citing(result: Result, sources: tuple[dict[str, Any], ...]) -> Result:
    """An answer with those of the sources that it cites."""
    return replace(result, sources=cited(result.text, sources), num_citable=len(sources))


async def _routed(node: AskNode, view: NodeView, call: ChatCall) -> list[Pair]:
    """The router's choice, and the next one; in a replay the recorded ones."""
    if call.replay is not None:
        times = call.replay.routes.get(view.span.route(), ())
        time = sum(child.kind is SpanKind.DECISION for child in view.span.children)
        if time < len(times):
            with view.span.child(SpanKind.DECISION, "replay") as span:
                span.attributes["pair"] = str(times[time][0])
            return list(times[time])
    config, asked = view.parts.config, call.limits
    models = {model.model_id for model in config.models}
    for allowed in (node.route.models, asked.models):
        models &= models if allowed is None else set(allowed)
    tools = (
        node.route.tools
        if asked.tools is None or node.route.tools is None
        else tuple(asked.tools & set(node.route.tools))
    )
    left_usd = view.budget.left.usd
    limits = Limits(
        alpha=asked.alpha if node.route.alpha is None else node.route.alpha,
        deadline_s=view.budget.deadline.remaining_s(),
        max_cost_usd=None if left_usd == float("inf") else left_usd,
        models=frozenset(models),
        tools=asked.tools if tools is None else frozenset(tools),
        needs=call.needs,
    )
    with view.span.child(SpanKind.DECISION, "router") as span:
        decision: Decision
        _, decision = await view.parts.decider.decide(
            call.query, limits, view.budget.deadline, fixed=call.fixed, facts=span.attributes
        )
        pairs = [candidate.pair for candidate in decision.candidates[:ROUTED_TRIES]]
        span.attributes |= facts_of(decision)
    return pairs


def call_of(node: AskNode, view: NodeView) -> ChatCall:
    """What the pair is asked: the node's prompt, or the caller's own messages.

    A prompt that holds the question takes the question's pictures along.
    """
    call = view.work.call
    messages = list(call.messages)
    if node.prompt is not None:
        asks = any(of.name == QUESTION for of in references_in(node.prompt))
        pictures = pictures_of(last_question(messages)) if asks else []
        content = with_pictures(view.fill(node.prompt), pictures)
        messages = [{"role": "user", "content": content}]
        if node.system is not None:
            messages.insert(0, {"role": "system", "content": view.fill(node.system)})
    used = [view.results[name].shown for name in node.uses]
    if used:
        messages = _with_sources(messages, "\n".join(used))
    sampling: dict[str, Any] = {
        name: call.sampling[name] for name in _PASSED_ON if name in call.sampling
    }
    sampling["max_tokens"] = node.max_tokens
    if view.streams and "max_tokens" in call.sampling:
        sampling["max_tokens"] = min(node.max_tokens, call.sampling["max_tokens"])
    if node.temperature is not None and call.fixed is None:
        sampling["temperature"] = node.temperature
    if node.output is not None:
        sampling["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": node.id or "output", "schema": node.output},
        }
    return replace(call, messages=tuple(messages), sampling=sampling, tools=(), tool_choice=None)


def _with_sources(messages: list[dict[str, Any]], found: str) -> list[dict[str, Any]]:
    for number in reversed(range(len(messages))):
        if messages[number]["role"] == "user":
            question = messages[number].get("content")
            told = with_question(found, text_of_content(question))
            content = with_pictures(told, pictures_of(question))
            messages[number] = {**messages[number], "content": content}
            break
    return messages


def cited(text: str, sources: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """The sources that a text cites; all of them where it cites none by number."""
    numbers = dict.fromkeys(int(number) for number in _CITATION.findall(text))
    return tuple(sources[n - 1] for n in numbers if 0 < n <= len(sources)) if numbers else sources


def _unfenced(text: str) -> str:
    """What stands in a block of code, if the whole text is one."""
    first, newline, rest = text.partition("\n")
    if newline and first.rstrip() in ("```", "```json") and rest.endswith("```"):
        return rest.removesuffix("```")
    return text


def read_json(text: str, schema: dict[str, Any]) -> tuple[Any, str | None]:
    """A model's JSON, and what is wrong with it; `None`: nothing."""
    try:
        data = json.loads(_unfenced(text.strip()))
        jsonschema.validate(data, schema)
    except json.JSONDecodeError as error:
        return None, f"it is not JSON: {error.msg}"
    except (RecursionError, ValueError):
        return None, "it is not JSON"
    except jsonschema.ValidationError as error:
        where = "".join(f"[{part!r}]" for part in error.absolute_path)
        return None, f"{where or 'it'}: {error.message}"[:_MAX_FAULT_CHARS]
    return data, None
