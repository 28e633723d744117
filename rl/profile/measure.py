"""One run of one pair on a question, scored: what profiles and live rollouts are made of."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from serve_app.errors import AtlasError, EngineError, InvalidRequest, NoAnswer, NoCandidate
from serve_app.orchestrator.pairs.paid import WITH_LOGPROBS
from serve_app.orchestrator.planning import PLANNER_SAMPLING, planner_messages
from serve_app.questions import Question
from serve_app.schemas import ChatCall, Limits, Pair, Report
from serve_app.scoring import GivenAnswer, score
from serve_app.store import ProfileOutcome, ProfileThought

_GRACE_S = 10.0
"""Beyond a request's own deadline, before the wait for it is given up."""

Run = Callable[[ChatCall], Awaitable[tuple[Report, AtlasError | None]]]
"""Runs a pinned request, as `Gateway.measure` does."""


@dataclass(frozen=True)
class RunSettings:
    """How a pair is run and scored."""

    judge: Pair | None = None
    """Judges answers to questions of the metric `judge`."""
    deadline_s: float = 120.0
    """Of one run."""
    temperature: float = 0.0
    owner: str = "profile"
    """Whom the runs are for; also what their request ids begin with."""


def gateway_handle() -> Any:
    """Handle of the gateway of this process's cluster; whoever sends many requests keeps it."""
    # Not above: whoever brings a `Run` of its own needs nothing of the graph.
    from serve_app.gateway.deployment import Gateway
    from serve_app.running import deployment_handle

    return deployment_handle(Gateway.__name__)


async def at_gateway(call: ChatCall, gateway: Any = None) -> tuple[Report, AtlasError | None]:
    """Run a request on the graph of this process's cluster.

    Args:
        call: The request.
        gateway: As `gateway_handle` gives it; `None` makes one.

    Raises:
        NoCandidate: If the pair's model does not answer now.
        TimeoutError: If nothing came back in time.
    """
    response = (gateway or gateway_handle()).measure.remote(call)
    timeout_s = call.limits.deadline_s + _GRACE_S
    reported: tuple[Report, AtlasError | None] = await asyncio.to_thread(
        response.result, timeout_s=timeout_s
    )
    return reported


async def ask_pair(
    messages: Sequence[dict[str, Any]],
    pair: Pair,
    settings: RunSettings,
    *,
    note: str | None = None,
    run: Run = at_gateway,
) -> tuple[Report, AtlasError | None]:
    """One pinned run; log-probabilities are left out where there are none to give.

    Args:
        messages: OpenAI messages.
        pair: Who is to answer.
        settings: How.
        note: What the planner said of the question.
        run: What runs it.

    Returns:
        What happened, and what it failed with, if it did.
    """
    sampling = {"temperature": settings.temperature}
    for extra in ({},) if pair.is_pattern else (WITH_LOGPROBS, {}):
        call = _call(messages, pair, sampling | extra, settings)
        report, failure = await run(replace(call, note=note))
        if not isinstance(failure, InvalidRequest):
            break
    return report, failure


async def ask_planner(
    query: str,
    answers: Sequence[str],
    planner: Pair,
    settings: RunSettings,
    *,
    run: Run = at_gateway,
) -> tuple[Report, AtlasError | None]:
    """Let the planner think, as it does in serving.

    Args:
        query: The question.
        answers: What pairs answered so far.
        planner: Who thinks.
        settings: Deadline and owner of the run.
        run: What runs it.

    Returns:
        What happened, and what it failed with, if it did.
    """
    return await run(_call(planner_messages(query, answers), planner, PLANNER_SAMPLING, settings))


def _call(
    messages: Sequence[dict[str, Any]],
    pair: Pair,
    sampling: dict[str, Any],
    settings: RunSettings,
) -> ChatCall:
    return ChatCall(
        request_id=f"{settings.owner}_{uuid.uuid4().hex}",
        model=str(pair),
        messages=tuple(messages),
        sampling=sampling,
        limits=Limits(alpha=0.0, deadline_s=settings.deadline_s),
        owner=settings.owner,
    )


async def measure_thought(
    question: Question,
    planner: Pair,
    mark: str,
    settings: RunSettings,
    *,
    run: Run = at_gateway,
) -> ProfileThought | None:
    """Let the planner think about a question that nobody has answered yet.

    Args:
        question: What is asked.
        planner: Who thinks.
        mark: Fingerprint of the planner's settings.
        settings: How.
        run: What runs it.

    Returns:
        What it said; `None` where it could not run.
    """
    try:
        report, failure = await ask_planner(question.query, (), planner, settings, run=run)
    except NoCandidate:
        return None
    if _was_away(failure):
        return None
    answer = report.steps[-1].answer if report.steps and failure is None else None
    return ProfileThought(
        question_key=question.key,
        fingerprint=mark,
        model_id=planner.model_id,
        thought=answer or None,
        prompt_tokens=report.usage.prompt_tokens,
        completion_tokens=report.usage.completion_tokens,
        cost_usd=report.usage.cost_usd,
        seconds=report.seconds,
        error=failure.message if failure is not None else None,
        created_unix_s=time.time(),
    )


async def measure_pair(
    question: Question,
    pair: Pair,
    mark: str,
    settings: RunSettings,
    *,
    note: str | None = None,
    run: Run = at_gateway,
) -> ProfileOutcome | None:
    """Run a pair on a question and score its answer.

    Args:
        question: What to ask, and what is right.
        pair: Whom to ask.
        mark: Fingerprint of the pair's settings.
        settings: How.
        note: What the planner said of the question.
        run: What runs it.

    Returns:
        The outcome; `None` where the pair could not run.
    """
    try:
        report, failure = await ask_pair(_asked(question.query), pair, settings, note=note, run=run)
    except NoCandidate:
        return None
    if _was_away(failure):
        return None
    steps = report.steps
    answer = steps[-1].answer if steps and failure is None else None
    calls = tuple(call for step in steps for call in step.tool_calls)

    async def judge(prompt: str) -> str:
        assert settings.judge is not None
        said, error = await ask_pair(_asked(prompt), settings.judge, settings, run=run)
        if error is not None:
            raise error
        return said.steps[-1].answer or ""

    scored = await score(question, GivenAnswer(answer, calls), judge=judge)
    return ProfileOutcome(
        question_key=question.key,
        model_id=pair.model_id,
        tool_id=pair.tool_id,
        fingerprint=mark,
        score=scored.score,
        prompt_tokens=report.usage.prompt_tokens,
        completion_tokens=report.usage.completion_tokens,
        cost_usd=report.usage.cost_usd,
        seconds=report.seconds,
        mean_logprob=steps[-1].mean_logprob if steps else None,
        tool_errors=sum(not call.ok for call in calls),
        answer=answer,
        error=failure.message if failure is not None else None,
        judge_agreed=scored.judge_agreed,
        created_unix_s=time.time(),
        signals=steps[-1].signals if steps else None,
    )


def _was_away(failure: AtlasError | None) -> bool:
    """Whether the engine is to blame, and not what the model wrote."""
    return isinstance(failure, EngineError) and not isinstance(failure, NoAnswer)


def _asked(query: str) -> tuple[dict[str, Any], ...]:
    return ({"role": "user", "content": query},)
