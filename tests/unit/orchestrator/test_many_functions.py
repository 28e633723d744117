"""Tools of many functions: what is offered, which calls run, in which order, and how many."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from serve_app.budget import Budget, Caps, Deadline
from serve_app.errors import NoAnswer, ToolFailed, ToolRetry
from serve_app.orchestrator.orchestrator import Orchestrator
from serve_app.orchestrator.recovery import Recovery
from serve_app.orchestrator.trace import MAX_SPANS
from serve_app.schemas import ChatCall, Effects, Limits
from serve_app.tools.base import ToolResult
from serve_app.tools.runner import ToolRunner
from tests.path2_fakes import Controller, Engines, Handle
from tests.toolset_fakes import CALCULATOR, DESK, NOTES, ToolsetBench, reply

DONE = reply(text="done")
SUM = ("calculator", {"expression": "20 * 5"})
READ = ("read_note", {"number": 1})


# What is offered, and where a call goes.


async def test_a_toolset_offers_the_functions_of_its_members(tmp_path: Path) -> None:
    bench = ToolsetBench(tmp_path, DONE)
    assert await bench.run() == "done"
    assert bench.offered() == ["calculator", "read_note", "write_note", "send_note"]


async def test_a_call_goes_to_the_member_that_has_the_function_at_its_price(tmp_path: Path) -> None:
    bench = ToolsetBench(tmp_path, reply(SUM, READ), DONE)
    assert await bench.run() == "done"
    assert bench.tools.ran == [("calculator", "calculator"), ("notes", "read_note")]
    assert [(call.tool_id, call.function, call.ok) for call in bench.calls] == [
        ("calculator", "calculator", True),
        ("notes", "read_note", True),
    ]
    assert bench.trace.root.usage.cost_usd == 0.5 + 2.0
    told = bench.told()
    assert "100" in told[0]
    assert told[1] == "read_note 1"


async def test_a_members_places_hold_for_the_calls_of_its_toolset(tmp_path: Path) -> None:
    bench = ToolsetBench(
        tmp_path,
        reply(SUM, SUM, SUM),
        DONE,
        tools=({**CALCULATOR, "max_concurrency": 1}, NOTES, DESK),
    )
    most = 0

    async def count(function: str, arguments: Any) -> str:
        nonlocal most
        most = max(most, bench.tools.load()["calculator"]["running"])
        await asyncio.sleep(0)
        return "100"

    bench.tools.does = count
    assert await bench.run() == "done"
    assert most == 1


async def test_of_many_functions_those_that_fit_are_offered_and_no_other_is_run(
    tmp_path: Path,
) -> None:
    few = {**DESK, "top_k": 1}
    send = ("send_note", {"number": 1})
    bench = ToolsetBench(tmp_path, reply(send), DONE, tools=(CALCULATOR, NOTES, few))
    assert await bench.run(query="Read the note 3") == "done"
    assert bench.offered() == ["read_note"]
    assert bench.tools.ran == []
    assert bench.told() == ["Error: there is no tool 'send_note'; offered: 'read_note'"]


async def test_a_tool_of_ones_own_selects_too(tmp_path: Path) -> None:
    bench = ToolsetBench(tmp_path, DONE, tools=({**NOTES, "top_k": 2},))
    assert await bench.run("notes", "Send it to everybody") == "done"
    assert bench.offered()[0] == "send_note"
    assert len(bench.offered()) == 2


# Wrong calls.


@pytest.mark.parametrize(
    ("function", "arguments", "told"),
    [
        ("delete_note", {"number": 1}, "there is no tool 'delete_note'; offered: 'calculator', "),
        ("desk", {}, "there is no tool 'desk'"),
        ("read_note", {"number": 1, "path": "/etc/passwd"}, "Additional properties"),
        ("read_note", {}, "'number' is a required property"),
        ("read_note", {"number": "1"}, "is not of type 'number'"),
        ("read_note", {"number": 11}, "greater than the maximum"),
        ("read_note", '{"number": NaN}', "a number is out of range"),
        ("read_note", '{"number": 1e400}', "a number is out of range"),
        ("read_note", '{"number": -1e400}', "a number is out of range"),
        ("read_note", f'{{"number": {"9" * 400}}}', "a number is out of range"),
        ("read_note", f'{{"number": {"9" * 300}}}', "greater than the maximum"),
        ("read_note", f'{{"number": 0.{"9" * 400}}}', None),
        ("read_note", "[1]", "must be a JSON object"),
        ("read_note", "{", "not JSON"),
        ("calculator", {"expression": "9" * 400}, None),
    ],
)
async def test_the_model_is_told_what_is_wrong_with_its_call(
    tmp_path: Path, function: str, arguments: Any, told: str | None
) -> None:
    bench = ToolsetBench(tmp_path, reply((function, arguments)), DONE)
    assert await bench.run() == "done"
    (said,) = bench.told()
    if told is None:
        assert not said.startswith("Error")
        assert len(bench.tools.ran) == 1
        return
    assert said.startswith("Error: ")
    assert told in said
    assert len(said) < 500
    assert bench.tools.ran == []
    (call,) = bench.calls
    assert not call.ok
    assert call.function == (function if function in bench.offered() else None)


# How many.


async def test_of_100_calls_in_one_reply_as_many_run_as_may(tmp_path: Path) -> None:
    bench = ToolsetBench(tmp_path, reply(*[READ] * 100), DONE)
    assert await bench.run() == "done"
    assert len(bench.tools.ran) == 8
    told = bench.told()
    assert told[:8] == ["read_note 1"] * 8
    assert told[8:] == ["Error: at most 8 calls of one reply are run; this one was not"] * 92
    assert [call.ok for call in bench.calls] == [True] * 8 + [False]
    assert bench.calls[-1].text == "92 calls beyond the 8 of one reply were not run"
    assert bench.trace.num_begun < MAX_SPANS / 4


async def test_the_calls_of_a_request_are_limited_over_all_its_replies(tmp_path: Path) -> None:
    bench = ToolsetBench(tmp_path, reply(*[READ] * 8), reply(*[READ] * 8), DONE)
    budget = Budget(Deadline.after(60), Caps(tool_calls=10))
    assert await bench.run(budget=budget) == "done"
    assert len(bench.tools.ran) == 10
    assert budget.spent.tool_calls == 10
    refusal = "Error: the request's budget covers no further call; answer without it"
    assert bench.told(2) == ["read_note 1"] * 2 + [refusal] * 6


async def test_a_deployment_limits_the_calls_of_each_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = ToolsetBench(tmp_path, max_tool_calls=3)
    tools, replies = bench.tools, [reply(*[READ] * 5), DONE] * 2

    async def dispatch(runner: ToolRunner, *call: Any) -> ToolResult:
        return await tools._dispatch(*call)

    monkeypatch.setattr(ToolRunner, "_dispatch", dispatch)
    engines = Engines(says={"m": lambda body: replies.pop(0)})
    controller, away = Handle(Controller(bench.config)), Handle(None)
    orchestrator = Orchestrator(
        bench.config, away, away, controller, lambda report, alpha: None, engines
    )
    await orchestrator._watcher.first()
    call = ChatCall("req_1", "m@desk", ({"role": "user", "content": "?"},), {}, Limits(0.0, 60.0))
    try:
        for number in (1, 2):
            answer, report = await orchestrator.complete(call)
            assert answer.choices[0].text == "done"
            assert [of.ok for of in report.steps[0].tool_calls] == [True] * 3 + [False] * 2
            assert len(tools.ran) == 3 * number
    finally:
        orchestrator.close()
        orchestrator._watcher._task.cancel()


async def test_a_model_that_only_calls_is_stopped(tmp_path: Path) -> None:
    bench = ToolsetBench(tmp_path, *[reply(*[READ] * 100)] * 4)
    with pytest.raises(NoAnswer, match="more than 3 times"):
        await bench.run()
    assert len(bench.tools.ran) == 4 * 8


async def test_side_by_side_calls_pass_no_cap_together(tmp_path: Path) -> None:
    bench = ToolsetBench(tmp_path, reply(*[READ] * 5), DONE)
    budget = Budget(Deadline.after(60), Caps(usd=5.0))
    assert await bench.run(budget=budget) == "done"
    assert [call.ok for call in bench.calls].count(True) == 2
    assert budget.spent.usd == 4.0


# In which order.


async def test_calls_without_effects_run_side_by_side_and_are_told_in_their_order(
    tmp_path: Path,
) -> None:
    bench = ToolsetBench(tmp_path, reply(*[("read_note", {"number": n}) for n in range(4)]), DONE)
    ended: list[int] = []
    all_begun = asyncio.Event()

    async def last_first(function: str, arguments: Any) -> int:
        if len(bench.tools.ran) == 4:
            all_begun.set()
        await all_begun.wait()
        number: int = arguments["number"]
        while len(ended) < 3 - number:
            await asyncio.sleep(0)
        ended.append(number)
        return number

    bench.tools.does = last_first
    assert await bench.run() == "done"
    assert ended == [3, 2, 1, 0]
    assert bench.told() == ["0", "1", "2", "3"]


@pytest.mark.parametrize("function", ["write_note", "send_note"])
async def test_with_an_effect_among_them_calls_run_one_after_the_other(
    tmp_path: Path, function: str
) -> None:
    calls = [READ, (function, {"number": 2}), SUM]
    bench = ToolsetBench(tmp_path, reply(*calls), DONE)
    log: list[str] = []

    async def one(function: str, arguments: Any) -> str:
        log.append(f"begin {function}")
        await asyncio.sleep(0)
        log.append(f"end {function}")
        return function

    bench.tools.does = one
    assert await bench.run() == "done"
    names = [name for name, _ in calls]
    assert log == [f"{when} {name}" for name in names for when in ("begin", "end")]
    assert bench.told() == names


async def test_a_call_that_fails_for_good_ends_the_others(tmp_path: Path) -> None:
    bench = ToolsetBench(tmp_path, reply(SUM, READ), DONE)
    ended: list[str] = []

    async def fail_or_wait(function: str, arguments: Any) -> Any:
        if function == "read_note":
            return ToolFailed("broken")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(function)

    bench.tools.does = fail_or_wait
    with pytest.raises(ToolFailed, match="broken"):
        await bench.run()
    assert ended == ["calculator"]
    assert bench.tools.load()["calculator"] == {"running": 0, "waiting": 0}


async def test_cancelling_a_request_ends_all_its_calls(tmp_path: Path) -> None:
    bench = ToolsetBench(tmp_path, reply(*[READ] * 4), DONE)
    ended, begun = 0, asyncio.Event()

    async def wait(function: str, arguments: Any) -> None:
        nonlocal ended
        if len(bench.tools.ran) == 4:
            begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended += 1

    bench.tools.does = wait
    budget = Budget(Deadline.after(60))
    running = asyncio.create_task(bench.run(budget=budget))
    await begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert ended == 4
    assert budget.left == Budget(Deadline.after(60)).left


# What follows upon a failure.


def test_a_call_taken_back_leaves_the_effect_that_began_beside_it() -> None:
    recovery = Recovery()
    recovery.begin(Effects.NONE)
    recovery.begin(Effects.ONCE)
    seen = []
    for effects in (Effects.NONE, Effects.ONCE):
        recovery.take_back(effects)
        seen.append(recovery.effects)
    assert seen == [Effects.ONCE, Effects.NONE]


async def test_a_refused_call_of_a_toolset_counts_as_no_effect(tmp_path: Path) -> None:
    bench = ToolsetBench(tmp_path, reply(("send_note", {"number": 1})), DONE)
    bench.tools.does = lambda function, arguments: ToolRetry("not so")
    assert await bench.run() == "done"
    assert bench.recovery.effects is Effects.NONE
    (call,) = bench.calls
    assert (call.tool_id, call.function, call.ok) == ("notes", "send_note", False)


async def test_a_toolset_goes_on_without_a_member_that_cannot_be_made(tmp_path: Path) -> None:
    broken = {**NOTES, "import_path": "tests.own_tools:Broken"}
    bench = ToolsetBench(tmp_path, DONE, tools=(CALCULATOR, broken, DESK))
    assert await bench.run() == "done"
    assert bench.offered() == ["calculator"]
    with pytest.raises(ToolFailed, match="no tool 'notes'"):
        await bench.run("notes")
