"""Conversations that stay on their candidate: the price of switching, and the whole path."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest

from serve_app.config import AtlasConfig
from serve_app.orchestrator.sessions import Sessions
from serve_app.schemas import (
    Candidate,
    ChatCall,
    DecidedBy,
    Decision,
    Limits,
    Pair,
    Report,
    Step,
    Usage,
)
from tests.clock import LoopClock
from tests.path2_fakes import path2, plain_snapshot

USD = {"cheap": 1e-5, "dear": 1e-3}
"""Of a question alone."""
PRICES = {"cheap": 1.0, "dear": 100.0}
LONG = "word " * 20_000


@pytest.fixture
def sessions(loop_clock: LoopClock) -> Sessions:
    return sessions_of()


def sessions_of(**cached: float) -> Sessions:
    remote = {"type": "remote", "base_url": "http://127.0.0.1:1/v1", "remote_model": "x"}
    models = [
        remote
        | {
            "model_id": name,
            "price": {
                "usd_per_1m_prompt_tokens": usd,
                "usd_per_1m_cached_prompt_tokens": cached.get(name),
            },
        }
        for name, usd in PRICES.items()
    ]
    made = Sessions()
    made.use(AtlasConfig.model_validate({"models": models}).models)
    return made


def candidate(model_id: str, quality: float, alpha: float) -> Candidate:
    cost = math.log(USD[model_id] / USD["cheap"]) / math.log(100)
    utility = (1 - alpha) * quality - alpha * cost
    return Candidate(Pair(model_id, "none"), utility, quality, cost, cost_usd=USD[model_id])


def call(text: str = LONG, *, alpha: float = 0.3, session: str = "s") -> ChatCall:
    limits = Limits(alpha=alpha, deadline_s=30)
    return ChatCall("r", "atlas", ({"role": "user", "content": text},), {}, limits, session=session)


def answered(
    sessions: Sessions, model_id: str, tokens: int = 30_000, session: str = "s", **step: Any
) -> None:
    pair, usage = Pair(model_id, "none"), Usage(tokens, 0)
    decision = Decision((Candidate(pair, 0, 0, 0),), DecidedBy.CLUSTERS, 1, 1, 1, 1)
    done = Step(pair, DecidedBy.CLUSTERS, 1.0, usage, 0.1, answer="yes", **step)
    sessions.answered(session, Report("r", decision, (done,), usage, 0.1, "q", None))


def decided(
    first: float, second: float, alpha: float = 0.3, path: DecidedBy = DecidedBy.CLUSTERS
) -> Decision:
    """A decision for `dear` before `cheap`, of these qualities."""
    candidates = (candidate("dear", first, alpha), candidate("cheap", second, alpha))
    return Decision(candidates, path, 1.0, 0.9, 1, 1)


async def test_a_conversation_stays_while_switching_costs_more(sessions: Sessions) -> None:
    answered(sessions, "cheap")
    decision = decided(0.95, 0.5)
    assert decision.candidates[0].utility > decision.candidates[1].utility
    stays = sessions_of(cheap=0.0)
    answered(stays, "cheap")
    kept = stays.stay(call(), decision)
    assert [of.pair.model_id for of in kept.candidates] == ["cheap", "dear"]
    assert (kept.path, kept.propensity) == (DecidedBy.SESSION, 1.0)
    # Without a discount the conversation is read at full price on both sides.
    assert sessions.stay(call(), decision) is decision


async def test_a_large_gain_in_quality_switches(sessions: Sessions) -> None:
    stays = sessions_of(cheap=0.0)
    answered(stays, "cheap")
    decision = decided(1.0, 0.1, alpha=0.05)
    assert stays.stay(call(alpha=0.05), decision) is decision


async def test_a_short_conversation_has_nothing_to_lose(sessions: Sessions) -> None:
    stays = sessions_of(cheap=0.0)
    answered(stays, "cheap")
    decision = decided(0.95, 0.5)
    assert stays.stay(call("Hello"), decision) is decision
    answered(stays, "cheap", tokens=2)
    assert stays.stay(call(), decision) is decision


_OTHERS = [
    path
    for path in DecidedBy
    if path not in (DecidedBy.COLD_START, DecidedBy.CLUSTERS, DecidedBy.OUT_OF_DISTRIBUTION)
]


@pytest.mark.parametrize("path", _OTHERS)
async def test_only_what_was_learned_of_single_questions_is_outweighed(path: DecidedBy) -> None:
    stays = sessions_of(cheap=0.0)
    answered(stays, "cheap")
    decision = decided(0.95, 0.5, path=path)
    assert stays.stay(call(), decision) is decision


async def test_who_does_not_answer_now_holds_nobody(sessions: Sessions) -> None:
    stays = sessions_of(cheap=0.0)
    answered(stays, "cheap")
    decision = decided(0.95, 0.5)
    alone = Decision(decision.candidates[:1], DecidedBy.CLUSTERS, 1.0, 0.9, 1, 1)
    assert stays.stay(call(), alone) is alone
    answered(sessions, "cheap", error="it failed")
    assert sessions.stay(call(), decision) is decision


async def test_a_conversation_is_forgotten_in_the_end(loop_clock: LoopClock) -> None:
    stays = sessions_of(cheap=0.0)
    answered(stays, "cheap")
    decision = decided(0.95, 0.5)
    assert stays.stay(call(session="another"), decision) is decision
    await asyncio.sleep(3500)
    assert stays.stay(call(), decision) is not decision
    await asyncio.sleep(200)
    assert stays.stay(call(), decision) is decision


async def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.orchestrator.sessions._MAX_SESSIONS", 3)
    stays = sessions_of(cheap=0.0)
    for number in range(5):
        answered(stays, "cheap", session=f"s{number}")
    decision = decided(0.95, 0.5)
    kept = [stays.stay(call(session=f"s{n}"), decision) is not decision for n in range(5)]
    assert kept == [False, False, True, True, True]


async def test_a_session_goes_to_the_models_and_holds_the_next_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATLAS_DATA_DIR", str(tmp_path))
    async with path2(tmp_path) as graph:
        await graph.promote(plain_snapshot())
        limits = {"alpha": 0.5}
        best = await graph.orchestrator.decide(graph.call("topic 1", limits=limits))
        other = best.candidates[1].pair
        long = ({"role": "user", "content": LONG}, {"role": "user", "content": "topic 1"})
        graph.engines.says = {
            other.model_id: lambda body: {
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": "yes"},
                        "finish_reason": "stop",
                    }
                ],
                "usage": {"prompt_tokens": 50_000, "completion_tokens": 1},
            }
        }
        await graph.ask(model=other.model_id, messages=long, session="one")
        assert graph.engines.sessions == ["one"]
        monkeypatch.setattr(  # what it has in its cache costs nothing
            graph.orchestrator._sessions,
            "_usd",
            lambda pair, tokens, cached=False: 0.0 if cached else tokens * 1e-2,
        )
        _, report = await graph.ask(messages=long, session="one", limits=limits)
        assert (report.pair, report.decision.path) == (other, DecidedBy.SESSION)
        for session in ("", "two"):
            _, report = await graph.ask(messages=long, session=session, limits=limits)
            assert (report.pair, report.decision.path) == (best.pair, best.path)
