"""Calls that must not be made twice: only in a request with an idempotency key, and only once that
is on record. The real orchestrator and pair runner; engine and tool do as they are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import EffectRefused, KeyRequired
from serve_app.orchestrator.orchestrator import Orchestrator
from serve_app.schemas import ChatCall, Effects, Limits, Pair, Report, StopReason
from serve_app.tools.base import Function
from tests.executor_fakes import Bench, reply
from tests.path2_fakes import Controller, Handle
from tests.pattern_fakes import PatternBench

CALL = '{"expression": "20 * 5"}'


class Record:
    """What an idempotency key's effects are put on."""

    def __init__(self, bench: Any, failure: Exception | None = None) -> None:
        self._bench = bench
        self._failure = failure
        self.called_before: list[int] = []
        """Calls of tools that had been made, at each time."""

    async def begin(self) -> None:
        self.called_before.append(len(self._bench.tools.arguments))
        if self._failure is not None:
            raise self._failure


def acting(folder: Path, *replies: Any) -> Bench:
    return Bench(folder, *replies, effects="once")


async def test_without_a_key_the_call_is_not_made_and_the_caller_is_told(tmp_path: Path) -> None:
    bench = acting(tmp_path, reply(calls=(CALL,)), reply("never"))
    with pytest.raises(KeyRequired) as caught:
        await bench.run()
    assert caught.value.param == "Idempotency-Key"
    assert caught.value.status_code == 400
    assert bench.tools.arguments == []
    assert len(bench.engines.bodies) == 1


async def test_a_call_is_on_record_before_it_is_made(tmp_path: Path) -> None:
    bench = acting(tmp_path, reply(calls=(CALL,)), reply("It is 100."))
    record = Record(bench)
    assert (await bench.run(begin_effect=record.begin))[0] == "It is 100."
    assert record.called_before == [0]
    assert len(bench.tools.arguments) == 1


@pytest.mark.parametrize("effects", ["none", "idempotent"])
async def test_what_may_be_repeated_needs_no_key_and_no_record(
    tmp_path: Path, effects: str
) -> None:
    bench = Bench(tmp_path, reply(calls=(CALL,)), reply("It is 100."), effects=effects)
    assert (await bench.run())[0] == "It is 100."
    record = Record(bench)
    bench.replies[:] = [reply(calls=(CALL,)), reply("It is 100.")]
    await bench.run(begin_effect=record.begin)
    assert record.called_before == []


async def test_a_call_that_cannot_be_put_on_record_is_not_made(tmp_path: Path) -> None:
    bench = acting(tmp_path, reply(calls=(CALL,)), reply("never"))
    with pytest.raises(EffectRefused):
        await bench.run(begin_effect=Record(bench, EffectRefused("no")).begin)
    assert bench.tools.arguments == []


async def test_a_call_with_wrong_arguments_begins_nothing(tmp_path: Path) -> None:
    wrong = reply(calls=('{"expression": 5}',))
    bench = acting(tmp_path, wrong, reply(calls=(CALL,)), reply("It is 100."))
    record = Record(bench)
    assert (await bench.run(begin_effect=record.begin))[0] == "It is 100."
    assert record.called_before == [0]
    assert [call.ok for call in bench.result.tool_calls] == [False, True]


async def test_a_context_tool_that_acts_needs_a_key_too(tmp_path: Path) -> None:
    bench = acting(tmp_path, reply("never"))
    with pytest.raises(KeyRequired):
        await bench.run("lookup")
    assert bench.engines.bodies == []


# In patterns.


@pytest.mark.parametrize(
    "node",
    [
        "tool: {tool: calculator, arguments: {expression: '1 + 1'}}",
        "parallel: {do: [{ask: {pair: large}}, {tool: {tool: calculator, arguments: "
        "{expression: '1 + 1'}}}], quorum: 1, join: concat}",
        "cascade: {of: [{ask: {pair: small@calculator}}, {ask: {pair: large}}], "
        "accept: {agrees: true}}",
        "vote: {of: [{ask: {pair: small@calculator}}, {ask: {pair: large}}, {ask: {pair: lead}}]}",
    ],
    ids=["tool", "parallel", "cascade", "vote"],
)
async def test_a_pattern_does_not_make_up_for_a_missing_key(tmp_path: Path, node: str) -> None:
    bench = PatternBench(tmp_path, f"name: acts\ndo:\n  - {node}", says={"small": calls_once})
    once(bench)
    with pytest.raises(KeyRequired):
        await bench.run()
    assert bench.tools.calls == []


def calls_once(body: Any) -> Any:
    return reply(calls=(CALL,))


def once(bench: PatternBench) -> None:
    """Have the calculator act."""
    entry = bench.tools._entries["calculator"]
    entry.functions = tuple(replace(f, effects=Effects.ONCE) for f in entry.functions)


# As a request.


class Deployment:
    """The orchestrator with the pool of a bench."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.reports: list[Report] = []
        nobody = Handle(None)
        self.orchestrator = Orchestrator(
            bench.config,
            nobody,
            nobody,
            Handle(Controller(bench.config)),
            lambda report, alpha: self.reports.append(report),
            bench.engines,
        )
        pairs = self.orchestrator._pairs
        pairs._runner = pairs.parts.tools._runner = bench.tools

    def call(self, **changes: Any) -> ChatCall:
        return ChatCall(
            request_id="req_1",
            model=changes.pop("model", "m@calculator"),
            messages=({"role": "user", "content": "What is 20 * 5?"},),
            sampling={},
            limits=Limits(alpha=0.0, deadline_s=30),
            **changes,
        )


@pytest.fixture
async def deployment(tmp_path: Path) -> Any:
    made = Deployment(acting(tmp_path, reply(calls=(CALL,)), reply("It is 100.")))
    watcher = made.orchestrator._watcher
    await watcher.first()
    yield made
    watcher._task.cancel()


async def test_a_named_pair_that_can_only_act_is_refused_before_its_model_is_asked(
    deployment: Deployment,
) -> None:
    with pytest.raises(KeyRequired):
        await deployment.orchestrator.complete(deployment.call())
    with pytest.raises(KeyRequired):
        async for _ in deployment.orchestrator.stream(deployment.call(events=True)):
            pass
    report, failure = await deployment.orchestrator.measure(deployment.call())
    assert isinstance(failure, KeyRequired)
    assert report.stop is StopReason.REFUSED
    assert deployment.bench.engines.bodies == []
    assert [report.stop for report in deployment.reports] == [StopReason.REFUSED] * 2


async def test_a_decision_alone_needs_no_key(deployment: Deployment) -> None:
    decision = await deployment.orchestrator.decide(deployment.call())
    assert decision.pair == Pair("m", "calculator")


async def test_a_named_pair_of_which_something_is_harmless_is_asked(
    deployment: Deployment,
) -> None:
    entry = deployment.bench.tools._entries["calculator"]
    entry.functions = (*entry.functions, Function("look", "", {"type": "object"}))
    deployment.bench.replies[:] = [reply("It is 100.")]
    answer, _ = await deployment.orchestrator.complete(deployment.call())
    assert answer.choices[0].text == "It is 100."


async def test_a_failure_to_put_an_effect_on_record_is_the_answer(deployment: Deployment) -> None:
    record = Record(deployment.bench, EffectRefused("the store is away"))
    with pytest.raises(EffectRefused):
        await deployment.orchestrator.complete(deployment.call(begin_effect=record.begin))
    assert deployment.bench.tools.arguments == []
