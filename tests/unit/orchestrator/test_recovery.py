"""The table of recovery, cell by cell, as the pattern of candidates and the calls of a pair ask it:
two candidates over one model, the first with a tool; only engine and tool are scripted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from serve_app.budget import Budget, Deadline
from serve_app.config import AtlasConfig
from serve_app.config.tools import CalculatorConfig
from serve_app.errors import (
    AtlasError,
    ContextTooLong,
    DeadlineExceeded,
    EngineBusy,
    EngineError,
    EngineUnavailable,
    Forbidden,
    InvalidRequest,
    KeyReused,
    ModelNotFound,
    NotFound,
    RateLimited,
    ReplicaDied,
    RequestTooLarge,
    ToolFailed,
    ToolRetry,
    ToolWorkerDied,
    UnfitForPair,
)
from serve_app.models.protocol import ChatBody
from serve_app.orchestrator.answer import Answer
from serve_app.orchestrator.channel import Channel
from serve_app.orchestrator.engine import Engine
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.pairs.runner import PairRunner
from serve_app.orchestrator.patterns.declared import PatternRunner
from serve_app.orchestrator.patterns.single import Single
from serve_app.orchestrator.recovery import TABLE, Fault, Move, RetryBudget, fault_of, pause_s
from serve_app.orchestrator.run import Run
from serve_app.orchestrator.trace import Trace
from serve_app.schemas import Candidate, ChatCall, DecidedBy, Decision, Effects, Limits, Pair
from serve_app.tools.base import ToolResult
from serve_app.tools.runner import ToolRunner
from tests.clock import LoopClock
from tests.executor_fakes import Bench, Tools, reply
from tests.path2_fakes import Engines, refuses_logprobs

CALL = '{"expression": "20 * 5"}'
LONG = "word " * 200
"""Longer than what is held back."""


@dataclass
class Broken:
    """A reply that fails, once a text is out."""

    text: str
    failure: Exception


class Scripted(Engines):
    """Engines that give each reply once, and then answer."""

    replies: list[Any]
    events: list[str]
    broken: Exception | None = None
    """What the reply that begins fails with."""

    async def complete(
        self, model_id: str, body: ChatBody, deadline: Deadline, session: str = ""
    ) -> dict[str, Any]:
        self.events.append("first" if body.get("tools") else "second")
        said = self.replies.pop(0) if self.replies else reply("an answer")
        if isinstance(said, Broken):
            self.broken = said.failure
            return reply(said.text)
        self.says = {model_id: said}
        return await super().complete(model_id, body, deadline)

    async def stream(
        self, model_id: str, body: ChatBody, deadline: Deadline, session: str = ""
    ) -> AsyncGenerator[dict[str, Any], None]:
        self.broken = None
        completion = await self.complete(model_id, body, deadline)
        (choice,) = completion["choices"]
        text, calls = choice["message"].get("content") or "", choice["message"].get("tool_calls")
        for begin in range(0, len(text), 300):
            piece = {"index": 0, "delta": {"content": text[begin : begin + 300]}}
            yield {"choices": [piece]}
        if self.broken is not None:
            raise self.broken
        for number, call in enumerate(calls or ()):
            yield {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": number, **call}]}}]}
        last = {"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}
        yield {"choices": [last], "usage": completion["usage"]}


class ScriptedTools(Tools):
    """Tools that fail once with each error, and then work."""

    failures: list[Exception]
    events: list[str]

    async def run(
        self, tool_id: str, arguments: Any, *, deadline_s: float, function: str | None = None
    ) -> ToolResult:
        self.events.append("tool")
        if self.failures:
            raise self.failures.pop(0)
        return await super().run(tool_id, arguments, deadline_s=deadline_s, function=function)


class Scene(Bench):
    """A request with two candidates: `m@calculator` and `m@none`."""

    def __init__(
        self, folder: Path, replies: list[Any], failures: list[Exception], effects: Effects
    ) -> None:
        super().__init__(folder, reply("unused"))
        self.events: list[str] = []
        told = tuple(tool.model_copy(update={"effects": effects}) for tool in self.config.tools)
        config = self.config.model_copy(update={"tools": told})
        engines, tools = Scripted(), ScriptedTools(config)
        engines.replies, engines.events = replies, self.events
        tools.failures, tools.events = failures, self.events
        self.pairs.parts.models._clients = engines
        self.pairs._runner = self.pairs.parts.tools._runner = tools

    async def _begin_effect(self) -> None:
        """The request has an idempotency key."""

    async def answer(self, *, has_next: bool) -> list[Any]:
        """The pieces of the answer, streamed as a client has it."""
        call = ChatCall(
            request_id="req_1",
            model="atlas",
            messages=({"role": "user", "content": "What is 20 * 5?"},),
            sampling={},
            limits=Limits(alpha=0.0, deadline_s=30, max_steps=2),
            begin_effect=self._begin_effect,
        )
        tools = ("calculator", "none") if has_next else ("calculator",)
        candidates = tuple(Candidate(Pair("m", tool), 1.0, 1.0, 0.0) for tool in tools)
        channel: Channel[Any] = Channel()
        run = Run(call, channel)
        run.decision = Decision(candidates, DecidedBy.CLUSTERS, 1.0, 1.0, 1, 1)
        decider: Any = None  # nothing is asked of the router any more
        declared = PatternRunner(self.pairs, decider, self.config)
        pattern = Single(Engine(self.pairs, declared, decider, None))
        return [piece async for piece in channel.read(pattern.run(run))]


@pytest.fixture(autouse=True)
async def no_second_passes(loop_clock: LoopClock) -> None:
    """Pauses are those of production, on the clock of the test's loop."""


class Pool:
    """A request whose candidates are models without a tool, `m0`, `m1`, …"""

    def __init__(self, folder: Path, windows: tuple[int | None, ...] = (None, None)) -> None:
        remote = {"type": "remote", "base_url": "http://127.0.0.1:1/v1", "remote_model": "x"}
        models = [
            remote | {"model_id": f"m{i}", "capabilities": {"context_tokens": window}}
            for i, window in enumerate(windows)
        ]
        self.config = AtlasConfig.model_validate({"models": models, "data_dir": str(folder)})
        self.engines = Engines()
        self.pairs = PairRunner(self.config, self.engines, ToolRunner([]))
        self.breakers = self.pairs.parts.models.breakers

    async def answer(self, text: str = "x") -> Answer:
        """Have the candidates tried in their order."""
        limits = Limits(alpha=0.0, deadline_s=30, max_steps=4)
        call = ChatCall("req_1", "atlas", ({"role": "user", "content": text},), {}, limits)
        run = Run(call)
        candidates = [Candidate(Pair(m.model_id, "none"), 1, 1, 0) for m in self.config.models]
        run.decision = Decision(tuple(candidates), DecidedBy.CLUSTERS, 1.0, 1.0, 1, 1)
        decider: Any = None
        declared = PatternRunner(self.pairs, decider, self.config)
        return await Single(Engine(self.pairs, declared, decider, None)).run(run)


OF_MODELS: dict[Fault, Exception] = {
    Fault.CALLER: InvalidRequest("no"),
    Fault.UNFIT: UnfitForPair("no"),
    Fault.DIED: ReplicaDied("no"),
    Fault.PASSING: EngineUnavailable("no"),
    Fault.BUSY: EngineBusy("no", None, 3.0),
    Fault.ENGINE: EngineError("no"),
    Fault.LATE: DeadlineExceeded("no"),
    Fault.OTHER: RuntimeError("no"),
}
OF_TOOLS: dict[Fault, Exception] = {
    Fault.ARGUMENTS: ToolRetry("no"),
    Fault.TOOL: ToolFailed("no"),
    Fault.TOOL_DIED: ToolWorkerDied("no"),
}


def scene_of(folder: Path, fault: Fault, effects: Effects, *, sent: bool) -> tuple[Scene, int]:
    """A request that fails in this way, and the number of events up to the failure."""
    calls = reply(calls=(CALL,))
    if fault in OF_TOOLS:
        first = reply(LONG if sent else None, calls=(CALL,))
        return Scene(folder, [first], [OF_TOOLS[fault]], effects), 2
    failing: Any = reply("<tool_call>")
    if fault in OF_MODELS:
        failing = Broken(LONG, OF_MODELS[fault]) if sent else OF_MODELS[fault]
    elif sent:
        failing = reply(LONG + "</tool_call>")
    begun = [] if effects is Effects.NONE else [calls]
    return Scene(folder, [*begun, failing], [], effects), 2 * len(begun) + 1


def test_the_table_has_a_cell_for_everything() -> None:
    assert set(TABLE) == {(f, e, s) for f in Fault for e in Effects for s in (False, True)}
    assert set(OF_MODELS) | set(OF_TOOLS) == set(Fault) - {Fault.EXTRA, Fault.UNREADABLE}


@pytest.mark.parametrize("has_next", [False, True])
@pytest.mark.parametrize(
    ("fault", "effects", "sent"),
    # What a tool gives is not sent: only the run of its pair asks for a cell with bytes sent.
    [
        cell
        for cell in TABLE
        if cell[0] is not Fault.EXTRA
        and not (cell[2] and cell[0] in (Fault.ARGUMENTS, Fault.TOOL_DIED))
    ],
)
async def test_every_cell_of_the_table_is_what_happens(
    tmp_path: Path, fault: Fault, effects: Effects, sent: bool, has_next: bool
) -> None:
    scene, num_events = scene_of(tmp_path, fault, effects, sent=sent)
    moves = [m for m in TABLE[fault, effects, sent] if m is Move.AGAIN or has_next]
    if fault is Fault.ARGUMENTS:
        moves = [Move.AGAIN]  # before any effect, whatever effects the tool has
    if not moves:
        with pytest.raises(AtlasError):
            await scene.answer(has_next=has_next)
        assert len(scene.events) == num_events
        return
    assert await scene.answer(has_next=has_next)
    again = "tool" if fault is Fault.TOOL_DIED else "first"
    expected = again if moves[0] is Move.AGAIN else "second"
    assert scene.events[num_events] == expected


@pytest.mark.parametrize("effects", list(Effects))
async def test_log_probabilities_that_an_engine_refuses_are_left_out(
    tmp_path: Path, effects: Effects
) -> None:
    assert TABLE[Fault.EXTRA, effects, False] == (Move.AGAIN,)
    bench = Bench(tmp_path)
    bench.engines.says = {"m": refuses_logprobs}
    bench.recovery.begin(effects)
    work = PairWork(
        Pair("m", "none"),
        ChatCall("req_1", "m", ({"role": "user", "content": "x"},), {}, Limits(0.0, 30)),
        Budget(Deadline.after(30)),
        Trace("req_1").root,
        recovery=bench.recovery,
        wants_logprobs=True,
    )
    assert (await bench.pairs.run(work))[0].text == "plain"


@pytest.mark.parametrize("has_next", [False, True])
async def test_a_call_that_must_not_happen_twice_is_repeated_by_nobody(
    tmp_path: Path, has_next: bool
) -> None:
    for failure in (ToolWorkerDied("lost"), ToolFailed("broken")):
        calls = [reply(calls=(CALL,)) for _ in range(3)]
        scene = Scene(tmp_path, calls, [failure], Effects.ONCE)
        with pytest.raises(ToolFailed):
            await scene.answer(has_next=has_next)
        assert scene.events == ["first", "tool"]


async def test_a_lost_call_without_effects_is_made_again_once(tmp_path: Path) -> None:
    lost: list[Exception] = [ToolWorkerDied("lost"), ToolWorkerDied("lost")]
    scene = Scene(tmp_path, [reply(calls=(CALL,))], lost, Effects.IDEMPOTENT)
    with pytest.raises(ToolWorkerDied):
        await scene.answer(has_next=False)
    assert scene.events == ["first", "tool", "tool"]


async def test_an_endpoint_is_asked_again_as_often_as_its_model_says(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.engines.says = {"m": EngineUnavailable("500")}
    with pytest.raises(EngineUnavailable):
        await bench.run("none")
    assert len(bench.engines.bodies) == 1 + 2
    # It fails for everybody: its breaker opens at the fifth call, and no call is made again.
    for _ in range(40):
        with pytest.raises(EngineUnavailable):
            await bench.run("none")
    assert len(bench.engines.bodies) == 41 + 2 + 1


async def test_of_the_calls_of_a_minute_a_tenth_is_made_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    turn = 0

    def every_other(body: ChatBody) -> Any:
        nonlocal turn
        turn += 1
        return EngineUnavailable("503") if turn % 2 else reply("100")

    bench.engines.says = {"m": every_other}  # a call made again is answered
    failed = 0
    for _ in range(300):
        try:
            await bench.run("none")
        except EngineUnavailable:
            failed += 1
    retries = len(bench.engines.bodies) - 300
    assert failed > 100
    assert 25 <= retries <= 30


async def test_a_pause_is_kept_unless_it_is_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited_s: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        waited_s.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", note)
    bench = Bench(tmp_path, EngineBusy("503", None, 3.0), reply("100"))
    assert (await bench.run("none"))[0] == "100"
    assert 3.0 <= waited_s[0] <= 3.25
    for too_long in (EngineBusy("503", None, 60.0), EngineBusy("it does not say")):
        bench = Bench(tmp_path, too_long, reply("100"))
        with pytest.raises(EngineBusy):
            await bench.run("none")
    assert len(waited_s) == 1


async def test_a_pause_beyond_the_deadline_is_not_waited_for(
    tmp_path: Path, loop_clock: LoopClock
) -> None:
    bench = Bench(tmp_path, EngineBusy("503", None, 3.0), reply("100"))
    began_s = loop_clock()
    with pytest.raises(EngineBusy):
        await bench.run("none", budget=Budget(Deadline.after(2.9)))
    assert loop_clock() == began_s


async def test_the_retry_budget_is_a_share_of_the_calls_of_a_minute(loop_clock: LoopClock) -> None:
    budget = RetryBudget(share=0.5, least=1)
    assert [budget.spend(), budget.spend()] == [True, False]
    for _ in range(4):
        budget.earn()
    assert [budget.spend(), budget.spend()] == [True, False]
    await asyncio.sleep(61)
    assert [budget.spend(), budget.spend()] == [True, False]


@pytest.mark.parametrize(
    ("failure", "most_s"),
    [
        (EngineUnavailable("500"), 0.25),
        (EngineBusy("429", None, 2.0), 0.25),
        (ReplicaDied(""), 0.1),
    ],
)
def test_jitter_is_full(failure: AtlasError, most_s: float) -> None:
    waits = [pause_s(failure, 1) - (failure.retry_after_s or 0.0) for _ in range(200)]
    assert 0 <= min(waits) < most_s / 4
    assert most_s * 3 / 4 < max(waits) <= most_s


@pytest.mark.parametrize(
    "failure",
    [
        InvalidRequest("400"),
        Forbidden("403"),
        NotFound("404"),
        RequestTooLarge("413"),
        KeyReused("422"),
        RateLimited("429, the key's quota"),
    ],
)
async def test_what_is_the_callers_fault_is_never_tried_again(
    tmp_path: Path, failure: AtlasError
) -> None:
    scene = Scene(tmp_path, [failure], [], Effects.NONE)
    with pytest.raises(AtlasError):
        await scene.answer(has_next=True)
    assert scene.events == ["first"]


async def test_a_candidate_that_left_the_pool_is_replaced(tmp_path: Path) -> None:
    assert fault_of(ModelNotFound("gone")) is Fault.OTHER
    scene = Scene(tmp_path, [ModelNotFound("gone")], [], Effects.NONE)
    assert await scene.answer(has_next=True)
    assert scene.events == ["first", "second"]


@pytest.mark.parametrize(
    ("windows", "asked"),
    [
        ((100, 200, 150), ["m0", "m1"]),
        ((100, 100, 150), ["m0", "m2"]),
        ((100, 50, None), ["m0", "m2"]),
        ((100, 100, 50), ["m0"]),
        ((None, None, 50), ["m0", "m1"]),
    ],
)
async def test_after_a_context_too_long_comes_a_longer_one(
    tmp_path: Path, windows: tuple[int | None, ...], asked: list[str]
) -> None:
    pool = Pool(tmp_path, windows)
    pool.engines.says = {"m0": ContextTooLong("no"), "m1": "yes", "m2": "yes"}
    if len(asked) == 1:
        with pytest.raises(ContextTooLong):
            await pool.answer()
    else:
        assert (await pool.answer()).pair.model_id == asked[-1]
    assert [model_id for model_id, _ in pool.engines.bodies] == asked


async def test_what_fits_only_a_longer_context_goes_there_before_any_call(tmp_path: Path) -> None:
    pool = Pool(tmp_path, (100, 80, 2000))
    assert (await pool.answer("word " * 100)).pair.model_id == "m2"
    assert [model_id for model_id, _ in pool.engines.bodies] == ["m2"]
    pool = Pool(tmp_path, (100, 80, 200))
    with pytest.raises(ContextTooLong):
        await pool.answer("word " * 100)
    assert not pool.engines.bodies


def test_ray_repeats_no_call_of_a_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []

    class Remote:
        def __init__(self, function: Any) -> None:
            pass

        def options(self, **options: Any) -> None:
            told.append(options)

    monkeypatch.setattr("ray.remote", Remote)
    ToolRunner([CalculatorConfig(tool_id="calculator")])
    assert [options["max_retries"] for options in told] == [0, 0]
