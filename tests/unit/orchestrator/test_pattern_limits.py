"""Deadlines of patterns hold whatever hangs, and nothing of a pattern outlives its request."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import AtlasError, DeadlineExceeded
from serve_app.orchestrator.answer import text_of
from serve_app.orchestrator.patterns.declared import Composed
from serve_app.schemas import StopReason
from serve_app.tools.base import ToolResult
from tests.clock import LoopClock
from tests.pattern_fakes import PatternBench

SECONDS = 1.5
"""Given to each request."""
LATEST_S = 0.25
"""After the deadline an answer may come."""
GONE_S = 3.0
"""Within which all that a request began has ended."""

Body = dict[str, Any]


class Hanging:
    """Engines and tools that hang, and count how many of them still do."""

    def __init__(self) -> None:
        self.begun = 0
        self.running = 0

    def politely(self, _: Any) -> Awaitable[str]:
        """Hangs until it is ended."""
        return self._hang(0.0)

    def stubbornly(self, _: Any) -> Awaitable[str]:
        """Hangs, and goes on for a while after it is ended."""
        return self._hang(0.5)

    async def _hang(self, ignores_s: float) -> str:
        self.begun += 1
        self.running += 1
        try:
            await asyncio.Event().wait()
            return "never"
        except asyncio.CancelledError:
            until_s = time.monotonic() + ignores_s
            while (left_s := until_s - time.monotonic()) > 0:
                try:
                    await asyncio.sleep(left_s)
                except asyncio.CancelledError:
                    continue
            raise
        finally:
            self.running -= 1

    async def is_up(self, count: int = 1) -> None:
        """Waits until so many have begun."""
        async with asyncio.timeout(20):
            while self.begun < count:
                await asyncio.sleep(0)


@pytest.fixture
def hanging() -> Hanging:
    return Hanging()


@pytest.fixture
async def _leaves_nothing(loop_clock: LoopClock) -> AsyncIterator[None]:
    """No task is left of what a test ran."""
    before = asyncio.all_tasks()
    yield
    async with asyncio.timeout(GONE_S):
        while asyncio.all_tasks() - before - {asyncio.current_task()}:
            await asyncio.sleep(0.01)


pytestmark = pytest.mark.usefixtures("_leaves_nothing")

SMALL, LARGE, LEAD = ({"ask": {"pair": pair}} for pair in ("small", "large", "lead"))
DRAFT = {"ask": {"id": "x", "pair": "large"}}
CHECK = {"verify": {"of": "draft", "check": "verifier", "verifier": "judge"}}
PATTERNS: dict[str, list[Any]] = {
    "ask": [SMALL],
    "chain": [DRAFT, SMALL],
    "route": [{"ask": {"pair": "route"}}],
    "nested": [{"ask": {"pair": "pattern:inner"}}],
    "branch": [{"branch": {"cases": [{"when": {"question": {"empty": False}}, "do": [SMALL]}]}}],
    "parallel": [{"parallel": {"do": [SMALL, LARGE, SMALL]}}],
    "first": [{"parallel": {"do": [SMALL, SMALL], "join": "first"}}],
    "vote": [{"vote": {"of": [SMALL, LARGE, SMALL], "weights": "equal"}}],
    "cascade": [{"cascade": {"of": [LARGE, SMALL, SMALL], "accept": {"agrees": True}}}],
    "draft": [{"critique": {"draft": SMALL, "critics": [LARGE], "revise": LARGE}}],
    "critic": [{"critique": {"draft": LARGE, "critics": [SMALL, SMALL], "revise": LARGE}}],
    "check": [{"critique": {"draft": LARGE, "critics": [CHECK], "revise": LARGE}}],
    "revision": [{"critique": {"draft": LARGE, "critics": [LARGE], "revise": SMALL}}],
    "lead": [{"plan": {"lead": SMALL, "worker": LARGE}}],
    "workers": [{"plan": {"lead": LEAD, "worker": SMALL, "join": LARGE}}],
    "join": [{"plan": {"lead": LEAD, "worker": LARGE, "join": SMALL}}],
    "deep": [{"parallel": {"do": [{"vote": {"of": [SMALL, {"ask": {"pair": "pattern:inner"}}]}}]}}],
}
PLANNED = json.dumps({"subtasks": [{"id": "a", "ask": "x"}, {"id": "b", "ask": "of {{a}}"}]})


def bench_of(folder: Path, do: list[Any], hang: Callable[[Any], Any]) -> PatternBench:
    """A pattern before an engine that hangs, two that answer, and a judge that hangs too."""
    inner = json.dumps({"name": "inner", "do": [SMALL]})
    outer = json.dumps({"name": "outer", "routable": False, "do": do})
    says = {"small": hang, "judge": hang, "large": "5", "lead": PLANNED}
    return PatternBench(folder, outer, inner, says=says)


async def ended(bench: PatternBench, **how: Any) -> tuple[Composed | AtlasError, float]:
    """How a run ends, and how long after its deadline."""
    began_s = time.monotonic()
    try:
        result: Composed | AtlasError = await bench.run(seconds=SECONDS, **how)
    except AtlasError as failure:
        result = failure
    return result, time.monotonic() - began_s - SECONDS


PARTIAL = {"chain", "parallel", "vote", "cascade", "critic", "check", "revision", "join"}
"""Patterns that have something to give when their time is up."""


@pytest.mark.parametrize("name", PATTERNS)
async def test_nothing_answers_late_though_an_engine_does_not_end(
    tmp_path: Path, hanging: Hanging, name: str
) -> None:
    bench = bench_of(tmp_path, PATTERNS[name], hanging.stubbornly)
    result, late_s = await ended(bench)
    assert late_s < LATEST_S
    if name in PARTIAL:
        assert isinstance(result, Composed), result
        assert (result.is_partial, result.stop) == (True, StopReason.DEADLINE)
        assert text_of(result.choices)
    elif name == "route":
        assert isinstance(result, Composed)  # the next pair answers
    else:
        assert isinstance(result, DeadlineExceeded), result


@pytest.mark.parametrize(
    "node",
    [
        {"tool": {"tool": "calculator"}},
        {"retrieve": {"corpus": "handbook"}},
        {"verify": {"of": "x", "check": "examples", "tool": "debug"}},
    ],
    ids=["tool", "retrieve", "verify"],
)
async def test_a_tool_that_hangs_leaves_the_answer_in_time(
    tmp_path: Path, hanging: Hanging, node: Any
) -> None:
    bench = bench_of(tmp_path, [DRAFT, node], hanging.politely)

    async def run(tool_id: str, arguments: Any, **_: Any) -> ToolResult:
        return ToolResult(await hanging.stubbornly(arguments))

    bench.tools.run = run  # type: ignore[method-assign]
    result, late_s = await ended(bench, question="f(1) == 2")
    assert isinstance(result, Composed)
    assert (text_of(result.choices), result.stop) == ("5", StopReason.DEADLINE)
    assert late_s < LATEST_S


async def test_a_router_that_hangs_leaves_the_answer_in_time(
    tmp_path: Path, hanging: Hanging
) -> None:
    bench = bench_of(tmp_path, [DRAFT, {"ask": {"pair": "route"}}], hanging.politely)
    bench.chooser.decide = lambda *_: hanging.politely(None)  # type: ignore[method-assign,assignment]
    result, late_s = await ended(bench)
    assert isinstance(result, Composed)
    assert (text_of(result.choices), result.stop) == ("5", StopReason.DEADLINE)
    assert late_s < LATEST_S


async def test_a_router_that_hangs_does_not_keep_a_vote(tmp_path: Path, hanging: Hanging) -> None:
    bench = bench_of(tmp_path, [{"vote": {"of": [LARGE, LARGE]}}], hanging.politely)
    bench.chooser.decide = lambda *_: hanging.politely(None)  # type: ignore[method-assign,assignment]
    composed = await bench.run(seconds=2.0)
    assert (text_of(composed.choices), composed.stop) == ("5", StopReason.ANSWERED)


def slow_function(texts: list[str]) -> str:
    time.sleep(1.5)
    return "late"


async def test_a_function_that_hangs_leaves_the_answer_in_time(
    tmp_path: Path, hanging: Hanging
) -> None:
    node = {"parallel": {"do": [LARGE], "function": f"{__name__}:slow_function"}}
    bench = bench_of(tmp_path, [DRAFT, node], hanging.politely)
    result, late_s = await ended(bench)
    assert isinstance(result, Composed)
    assert result.stop is StopReason.DEADLINE
    assert late_s < LATEST_S


async def test_a_request_without_time_asks_nothing(tmp_path: Path, hanging: Hanging) -> None:
    bench = bench_of(tmp_path, [SMALL], hanging.politely)
    with pytest.raises(DeadlineExceeded):
        await bench.run(seconds=-1.0)
    assert hanging.begun == 0


# --- callers that leave -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "route"])
async def test_a_caller_that_leaves_ends_every_call(
    tmp_path: Path, hanging: Hanging, name: str
) -> None:
    bench = bench_of(tmp_path, PATTERNS[name], hanging.politely)
    run = asyncio.create_task(bench.run(seconds=60))
    await hanging.is_up()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert hanging.running == 0


@pytest.mark.parametrize("name", ["ask", "deep", "workers"])
async def test_a_caller_that_leaves_does_not_wait_for_a_stubborn_engine(
    tmp_path: Path, hanging: Hanging, name: str
) -> None:
    bench = bench_of(tmp_path, PATTERNS[name], hanging.stubbornly)
    run = asyncio.create_task(bench.run(seconds=60))
    await hanging.is_up()
    run.cancel()
    done, _ = await asyncio.wait({run}, timeout=20)
    assert done
    assert run.cancelled()
    assert hanging.running > 0  # it goes on by itself, and the fixture sees its end


async def test_what_a_caller_left_is_settled(tmp_path: Path, hanging: Hanging) -> None:
    bench = bench_of(tmp_path, PATTERNS["parallel"], hanging.politely)
    run = asyncio.create_task(bench.run(seconds=60))
    await hanging.is_up(2)
    run.cancel()
    await asyncio.wait({run})
    assert bench.budget.spent.model_calls == 3
    assert bench.budget._reserved == pytest.approx((0, 0, 0, 0))


async def test_the_losers_of_a_race_are_ended(tmp_path: Path, hanging: Hanging) -> None:
    node = {"parallel": {"do": [SMALL, LARGE, SMALL], "join": "first"}}
    bench = bench_of(tmp_path, [node], hanging.politely)
    assert await bench.ask(seconds=60) == "5"
    assert hanging.running == 0


async def test_the_end_of_a_stubborn_call_gives_its_reservation_back(
    tmp_path: Path, hanging: Hanging
) -> None:
    node = {"parallel": {"do": [SMALL, LARGE], "join": "first"}}
    bench = bench_of(tmp_path, [node], hanging.stubbornly)
    assert await bench.ask(seconds=60) == "5"
    assert bench.budget._reserved.model_calls == 1
    async with asyncio.timeout(GONE_S):
        while bench.budget._reserved.model_calls:
            await asyncio.sleep(0.01)
