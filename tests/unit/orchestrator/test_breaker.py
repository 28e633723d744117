"""Breakers of models: unit by unit on the loop's clock, and in the whole path of a request."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import (
    AtlasError,
    DeadlineExceeded,
    EngineBusy,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    NoCandidate,
    ReplicaDied,
)
from serve_app.orchestrator.breaker import Breakers, BreakerState
from serve_app.schemas import Pair
from tests.clock import LoopClock
from tests.path2_fakes import Engines, path2, plain_snapshot

NUM_FAILURES = 5
AWAY = EngineUnavailable("503")


@pytest.fixture
def engines() -> Engines:
    return Engines()


@pytest.fixture
def breakers(engines: Engines, loop_clock: LoopClock) -> Breakers:
    return Breakers(engines, NUM_FAILURES)


def fail(breakers: Breakers, failure: AtlasError = AWAY, times: int = NUM_FAILURES) -> None:
    for _ in range(times):
        breakers.failed("m", failure)


async def probed(breakers: Breakers) -> None:
    """Have a due probe made, and wait for its end."""
    breakers.open_models()
    assert breakers.states() == {"m": BreakerState.HALF_OPEN}
    while breakers.states() == {"m": BreakerState.HALF_OPEN}:
        await asyncio.sleep(0)


@pytest.mark.parametrize("failure", [AWAY, EngineError("500"), EngineBusy("429", None, 1.0)])
async def test_a_model_that_fails_for_everybody_is_left_alone(
    breakers: Breakers, failure: AtlasError
) -> None:
    fail(breakers, failure, NUM_FAILURES - 1)
    assert not breakers.open_models()
    fail(breakers, failure, 1)
    assert breakers.open_models() == {"m"}
    assert breakers.states() == {"m": BreakerState.OPEN}


@pytest.mark.parametrize("failure", [ReplicaDied(""), DeadlineExceeded(""), InvalidRequest("")])
async def test_what_is_not_the_models_fault_opens_no_breaker(
    breakers: Breakers, failure: AtlasError
) -> None:
    fail(breakers, failure, 50)
    assert not breakers.open_models()


async def test_an_answer_in_between_keeps_a_breaker_closed(breakers: Breakers) -> None:
    for _ in range(5):
        fail(breakers, times=NUM_FAILURES - 1)
        breakers.answered("m")
    assert not breakers.open_models()


@pytest.mark.parametrize("says", ["Hello.", InvalidRequest("it does not greet")])
async def test_a_probe_that_is_answered_closes_a_breaker(
    breakers: Breakers, engines: Engines, says: Any
) -> None:
    engines.says = {"m": says}
    fail(breakers)
    await asyncio.sleep(7)
    assert breakers.open_models() == {"m"}  # until the probe is answered
    assert breakers.open_models() == {"m"}
    await asyncio.sleep(0.01)
    assert not breakers.open_models()
    assert len(engines.asked("m")) == 1


async def test_a_breaker_whose_probes_fail_opens_longer_each_time(
    breakers: Breakers, engines: Engines, loop_clock: LoopClock
) -> None:
    engines.says = {"m": AWAY}
    fail(breakers)
    for least_s in (3.75, 7.5, 15.0, 30.0, 45.0, 45.0):
        began_s = loop_clock()
        while breakers.states() == {"m": BreakerState.OPEN}:
            await asyncio.sleep(0.05)
            breakers.open_models()
        assert least_s <= loop_clock() - began_s <= least_s / 0.75 * 1.25 + 0.1
        while breakers.states() == {"m": BreakerState.HALF_OPEN}:
            await asyncio.sleep(0)


async def test_a_pause_that_a_model_asks_for_is_kept(breakers: Breakers, engines: Engines) -> None:
    fail(breakers, EngineBusy("429", None, 300.0))
    await asyncio.sleep(299)
    breakers.open_models()
    assert not engines.bodies
    await asyncio.sleep(2)
    await probed(breakers)
    assert not breakers.states()


async def test_an_open_breaker_is_in_no_decision_and_no_fallback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATLAS_DATA_DIR", str(tmp_path))
    only = {"name": "only", "routable": False, "do": [{"ask": {"pair": "math@none"}}]}
    async with path2(tmp_path, patterns=[only]) as graph:
        await graph.promote(plain_snapshot())
        graph.engines.says = {"math": EngineError("500")}
        assert (await graph.ask("topic 1"))[1].steps[0].pair == Pair("math", "none")
        for _ in range(NUM_FAILURES):
            with pytest.raises(EngineError):  # who names it gets it
                await graph.ask("topic 1", model="math")
        assert graph.orchestrator.breakers() == {"math": "open"}
        assert graph.orchestrator._left_alone() == {"math", "pattern:only"}
        asked = len(graph.engines.asked("math"))
        decision = await graph.orchestrator.decide(graph.call("topic 1", explain=True))
        assert Pair("math", "none") not in [of.pair for of in decision.candidates]
        graph.engines.says |= {"cheap": EngineError("500"), "strong": EngineError("500")}
        with pytest.raises(EngineError):
            await graph.ask("topic 1")
        assert len(graph.engines.asked("math")) == asked
        with pytest.raises(NoCandidate) as refused:
            await graph.ask("topic 1", limits={"models": frozenset({"math"})})
        assert refused.value.retry_after_s
        # Its caller named it, and it answers again.
        graph.engines.says = {}
        await graph.ask("topic 1", model="math")
        assert graph.orchestrator.breakers() == {}
