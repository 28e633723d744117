"""Pairs that sample: several answers at once, of which the best one wins."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

from serve_app.budget import Use
from serve_app.config.tools import BestOfConfig
from serve_app.errors import AtlasError
from serve_app.models.reply import Choice
from serve_app.models.verifier import read_score, scoring_body
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.pairs.join import JoinParts
from serve_app.orchestrator.trace import SpanKind
from serve_app.schemas import ToolCall, Usage
from serve_app.tools.builtin.best_of import best_rated, vote

logger = logging.getLogger(__name__)

_VERIFIER_SHARE = 0.9
"""Share of a step's time left that a verifier may take."""


async def run(work: PairWork, parts: JoinParts) -> list[Choice]:
    """Draw the samples, and return the best one, see `BestOfConfig.vote`.

    Raises:
        BudgetExceeded: If the budget does not cover the samples and the tool's price.
        AtlasError: What the engine fails with.
    """
    work.add_note()
    pair, call = work.pair, work.call
    settings = parts.tools.tool(pair.tool_id).config
    assert isinstance(settings, BestOfConfig)
    body = parts.models.body(pair.model_id, call.sampling, work.messages) | {
        "n": settings.num_samples,
        "temperature": call.sampling.get("temperature") or settings.temperature,
    }
    began_s = time.monotonic()
    price = Usage(cost_usd=settings.price_usd_per_call)
    most = Use(usd=price.cost_usd, tool_calls=1)
    with await work.budget.hold(most, f"a call of the tool {pair.tool_id!r}") as held:
        choices = await parts.models.generate(work, body, outlet=None)
        answers = [choice.text or "" for choice in choices]
        data: dict[str, Any] = {"answers": answers}
        failure: str | None = None
        winner = vote(answers)
        if settings.verifier is not None:
            try:
                data["scores"] = await _rate(work, parts, settings.verifier, answers)
                winner = best_rated(data["scores"])
            except AtlasError as error:
                logger.warning("verifier %s: %s", settings.verifier, error.message)
                failure = f"the verifier did not answer ({error.message}); the majority decided"
        held.settle(price)
    with work.span.child(SpanKind.TOOL, pair.tool_id) as span:
        span.charge(price)
        text, seconds = failure or answers[winner], time.monotonic() - began_s
        span.called(
            ToolCall(pair.tool_id, {"n": len(answers)}, failure is None, text, seconds, data)
        )
    best = replace(choices[winner], number=0)
    await work.send([best.as_piece()])
    return [best]


async def _rate(work: PairWork, parts: JoinParts, verifier: str, answers: list[str]) -> list[float]:
    """What a verifier thinks of each answer, in their order; an empty one is worth nothing.

    Raises:
        AtlasError: If it does not rate them all while there is time to go on without it.
    """
    asked = [number for number, answer in enumerate(answers) if answer.strip()]
    bodies = [
        parts.models.body(verifier, {}, scoring_body(work.call.query, answers[number])["messages"])
        for number in asked
    ]
    with work.span.child(SpanKind.VALIDATION, verifier) as span:
        replies = await parts.models.complete_all(
            work, verifier, bodies, work.budget.part(_VERIFIER_SHARE), span
        )
        scores = [0.0] * len(answers)
        for number, reply in zip(asked, replies, strict=True):
            scores[number] = read_score(reply)
    return scores
