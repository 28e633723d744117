"""Pairs that sample: several answers at once, of which the best one wins."""

from __future__ import annotations

import logging
import time
from typing import Any

from serve_app.budget import Budget, Use
from serve_app.errors import AtlasError
from serve_app.models.verifier import read_score, scoring_body
from serve_app.orchestrator.paying import PaidEngines
from serve_app.orchestrator.result import StepResult
from serve_app.schemas import ChatCall, Pair, ToolCall, Usage
from serve_app.tools.builtin.best_of import best_rated, vote
from serve_app.tools.config import BestOfConfig

logger = logging.getLogger(__name__)

_VERIFIER_SHARE = 0.9
"""Share of a step's time left that a verifier may take."""


async def sample(
    engines: PaidEngines,
    settings: BestOfConfig,
    pair: Pair,
    call: ChatCall,
    messages: list[dict[str, Any]],
    budget: Budget,
    result: StepResult,
) -> None:
    """Draw the samples and keep the best one in `result`, see `BestOfConfig.vote`.

    Raises:
        BudgetExceeded: If the budget does not cover the samples and the tool's price.
        AtlasError: What the engine fails with.
    """
    body = engines.body(pair.model_id, call.sampling, messages) | {
        "n": settings.num_samples,
        "temperature": call.sampling.get("temperature") or settings.temperature,
    }
    began_s = time.monotonic()
    price = Usage(cost_usd=settings.price_usd_per_call)
    most = Use(usd=price.cost_usd, tool_calls=1)
    with budget.reserve(most, f"a call of the tool {pair.tool_id!r}") as held:
        async for _ in engines.generate(pair.model_id, body, budget, result, stream=False):
            pass
        answers = [choice["message"].get("content") or "" for choice in result.choices]
        data: dict[str, Any] = {"answers": answers}
        failure: str | None = None
        winner = vote(answers)
        if settings.verifier is not None:
            try:
                data["scores"] = await _rate(
                    engines, settings.verifier, call.query, answers, budget, result
                )
                winner = best_rated(data["scores"])
            except AtlasError as error:
                logger.warning("verifier %s: %s", settings.verifier, error.message)
                failure = f"the verifier did not answer ({error.message}); the majority decided"
        held.settle(price)
    seconds = time.monotonic() - began_s
    result.usage.add(price)
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
    engines: PaidEngines,
    verifier: str,
    question: str,
    answers: list[str],
    budget: Budget,
    result: StepResult,
) -> list[float]:
    """What a verifier thinks of each answer, in their order; an empty one is worth nothing.

    Raises:
        AtlasError: If it does not rate them all while there is time to go on without it.
    """
    asked = [number for number, answer in enumerate(answers) if answer.strip()]
    bodies = [
        engines.body(verifier, {}, scoring_body(question, answers[number])["messages"])
        for number in asked
    ]
    completions = await engines.complete_all(verifier, bodies, budget.part(_VERIFIER_SHARE), result)
    scores = [0.0] * len(answers)
    for number, completion in zip(asked, completions, strict=True):
        scores[number] = read_score(completion)
    return scores
