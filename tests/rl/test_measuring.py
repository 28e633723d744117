"""What a run of one pair on a question is to a profile."""

from __future__ import annotations

import pytest

from rl.profile.measure import RunSettings, measure_pair
from serve_app.errors import (
    AtlasError,
    EngineError,
    NoAnswer,
    ReplicaDied,
    ToolFailed,
    UnreadableCall,
)
from serve_app.questions import PlainMetric, Question
from serve_app.schemas import ChatCall, DecidedBy, Decision, Pair, Report, Usage
from serve_app.store import ProfileOutcome

PAIR = Pair("m", "t")
QUESTION = Question(id="q", query="2 + 2?", gold="4", metric=PlainMetric(name="exact"))


async def measure(failure: AtlasError) -> ProfileOutcome | None:
    async def run(call: ChatCall) -> tuple[Report, AtlasError | None]:
        decision = Decision((), DecidedBy.PINNED, 1.0, 1.0, 0, 1)
        report = Report(call.request_id, decision, (), Usage(10, 5, 1e-5), 0.1, call.query, None)
        return report, failure

    return await measure_pair(QUESTION, PAIR, "mark", RunSettings(), run=run)


@pytest.mark.parametrize("failure", [EngineError("it is away"), ReplicaDied("it died")])
async def test_what_the_engine_failed_at_is_missing_still(failure: AtlasError) -> None:
    assert await measure(failure) is None


@pytest.mark.parametrize(
    "failure", [NoAnswer("calls alone"), UnreadableCall("no call"), ToolFailed("no result")]
)
async def test_what_the_pair_failed_at_is_a_wrong_answer(failure: AtlasError) -> None:
    outcome = await measure(failure)
    assert outcome is not None
    assert (outcome.score, outcome.error) == (0.0, failure.message)


@pytest.mark.parametrize(("pair", "asked"), [(PAIR, True), (Pair("pattern:p", "none"), False)])
async def test_log_probabilities_are_asked_of_models_alone(pair: Pair, asked: bool) -> None:
    calls: list[ChatCall] = []

    async def run(call: ChatCall) -> tuple[Report, AtlasError | None]:
        calls.append(call)
        decision = Decision((), DecidedBy.PINNED, 1.0, 1.0, 0, 1)
        report = Report(call.request_id, decision, (), Usage(10, 5, 1e-5), 0.1, call.query, None)
        return report, None

    await measure_pair(QUESTION, pair, "mark", RunSettings(), run=run)
    assert ["logprobs" in call.sampling for call in calls] == [asked]
