"""Declared patterns as candidates: each runs like a pair, on one step of the request."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from serve_app.budget import Caps, Deadline
from serve_app.config import AtlasConfig
from serve_app.config.patterns.bound import Bound, bound_of, question_bytes
from serve_app.config.patterns.language import PatternConfig
from serve_app.errors import InvalidRequest, ModelNotFound, ServiceError
from serve_app.models.reply import Choice
from serve_app.orchestrator.decision_client import Decider
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.pairs.runner import PairRunner
from serve_app.orchestrator.patterns import nodes as nodes  # fills the table of nodes
from serve_app.orchestrator.patterns.chain import run_chain
from serve_app.orchestrator.patterns.view import NodeView, PatternParts, Result, Status
from serve_app.schemas import PATTERN_PREFIX, ChatCall, StopReason

logger = logging.getLogger(__name__)

_MARGIN_S = 0.1
"""Time kept back at most, so that a partial answer is still in time; a twentieth of short ones."""
_NOT_WITH_PATTERNS = ("response_format", "logprobs", "stop")


@dataclass(frozen=True)
class Composed:
    """The answer of a pattern."""

    choices: list[Choice]
    stop: StopReason = StopReason.ANSWERED
    is_partial: bool = False
    sources: tuple[dict[str, Any], ...] = ()


def check_call(call: ChatCall) -> None:
    """Refuse what an answer of several calls cannot give.

    Raises:
        InvalidRequest: If the call has tools of its own, wants several choices, or says how the
            text of one model has to be.
    """
    if call.tools:
        raise InvalidRequest("tools: a pattern uses its own; leave them out", "tools")
    if call.sampling.get("n", 1) > 1:
        raise InvalidRequest("n: a pattern gives one answer", "n")
    for name in _NOT_WITH_PATTERNS:
        if call.sampling.get(name):
            raise InvalidRequest(f"{name}: not with a pattern, whose answer has parts", name)


def can_be_pattern(call: ChatCall) -> bool:
    """Whether a pattern may answer a call."""
    try:
        check_call(call)
    except InvalidRequest:
        return False
    return True


class PatternRunner:
    """Runs declared patterns; one per gateway replica."""

    def __init__(self, pairs: PairRunner, decider: Decider, config: AtlasConfig) -> None:
        """Know the patterns of a configuration.

        Args:
            pairs: Runs pairs.
            decider: Asks the router.
            config: The deployment.
        """
        self._pairs = pairs
        self._decider = decider
        self.use(config)

    def use(self, config: AtlasConfig) -> None:
        """Take over a changed pool; requests under way keep what they began with."""
        patterns = {pattern.name: pattern for pattern in config.patterns}
        self._parts = PatternParts(self._pairs, self._decider, config, patterns)

    async def run(self, work: PairWork) -> Composed:
        """Run a pattern on a request.

        Args:
            work: As of a pair whose model is `pattern:<name>`.

        Raises:
            ModelNotFound: If there is no such pattern any more.
            AtlasError: If it has no answer.
        """
        name = work.pair.model_id.removeprefix(PATTERN_PREFIX)
        pattern = self._parts.patterns.get(name)
        if pattern is None:
            raise ModelNotFound(f"the pattern {name!r} does not exist any more", "model")
        check_call(work.call)
        view = NodeView(self._parts, work, work.budget, work.span, streams=True)
        result = await run_pattern(pattern, view)
        if result.status is Status.FAILED:
            raise result.failure or ServiceError(f"the pattern {name!r} failed")
        choices = _choices(result)
        if not result.is_sent:
            await work.send([choice.as_piece() for choice in choices])
        elif any(choice.finish_reason is None for choice in result.choices):
            await work.send([choice.ending() for choice in choices])  # its end was not sent
        return Composed(choices, result.stop, result.status is Status.PARTIAL, result.sources)


async def run_pattern(pattern: PatternConfig, view: NodeView) -> Result:
    """Run a pattern within its worst case and its own limits.

    Args:
        pattern: A checked pattern.
        view: Of whatever asks it; the pattern sees none of its results.
    """
    asked = question_bytes(view.work.call.messages)
    bound = bound_of(pattern, view.parts.config, asked)
    left_s = view.budget.seconds_left
    seconds = max(0.0, left_s - min(_MARGIN_S, left_s / 20))
    deadline = Deadline.after(min(seconds, bound.seconds))
    budget = view.budget.child(deadline, _caps(bound))
    inner = replace(view, budget=budget, results={})
    return await run_chain(pattern.do, inner, answer=pattern.answer)


def _caps(bound: Bound) -> Caps:
    return Caps(bound.usd, bound.tokens, bound.model_calls, bound.tool_calls)


def _choices(result: Result) -> list[Choice]:
    """A result as the choices of a completion; a model's reply is passed on unchanged."""
    is_cut = result.status is Status.PARTIAL
    if not result.choices:
        return [Choice(0, result.text, finish_reason="length" if is_cut else "stop")]
    if is_cut:
        return [replace(choice, finish_reason="length") for choice in result.choices]
    return list(result.choices)
