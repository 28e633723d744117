"""Requests of several steps through the real orchestrator, router and store; only the engines and
the embedder are scripted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from serve_app.errors import (
    AtlasError,
    BudgetExceeded,
    ContextTooLong,
    DeadlineExceeded,
    EngineError,
    InvalidRequest,
    NoCandidate,
    ReplicaDied,
    ServiceError,
)
from serve_app.gateway.chat.extension import completion_extension
from serve_app.schemas import Action, DecidedBy, Report, StopReason
from serve_app.store import add_feedback, read_verdicts
from serve_app.store.tables import Base, OutcomeRow, RequestRow, TrajectoryRow
from tests.path2_fakes import (
    CHEAP,
    MATH,
    PAIRS,
    STRONG,
    Path2,
    path2,
    plain_snapshot,
    refuses_logprobs,
)
from tests.policy_data import with_policy


@pytest.fixture(autouse=True)
def own_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session's graph may have set another one."""
    monkeypatch.setenv("ATLAS_DATA_DIR", str(tmp_path))


@pytest.fixture
async def graph(tmp_path: Path) -> AsyncIterator[Path2]:
    async with path2(tmp_path, planner="cheap") as running:
        yield running


def policy(**settings: Any) -> Any:
    return with_policy(plain_snapshot(), **settings)


def pairs(report: Report) -> list[str]:
    return [str(step.pair) for step in report.steps]


async def rows(graph: Path2, table: type[Base]) -> list[Any]:
    assert await graph.outcomes.flush()
    async with graph.store.begin() as connection:
        return list((await connection.execute(select(table))).mappings())


async def test_the_policy_tries_looks_and_stops(graph: Path2) -> None:
    version = await graph.promote(policy(answer=0.5))
    text, report = await graph.ask("topic 2")  # strong 0.9, then below the answer's 0.5
    assert (text, pairs(report)) == ("strong says hello", ["strong@none"])
    assert [d.action for d in report.decisions] == [Action.ROUTE, Action.ANSWER]
    assert report.decision.policy_version == version
    assert report.steps[0].path is DecidedBy.POLICY


async def test_the_answer_that_most_agree_on_is_given_unchanged(graph: Path2) -> None:
    await graph.promote(policy())
    graph.engines.says = {"cheap": "five", "math": "4.0", "strong": " The answer is  4 \n"}
    text, report = await graph.ask("topic 1")
    assert pairs(report) == ["math@none", "strong@none", "cheap@none"]
    assert (text, report.answer_step, report.pair) == (" The answer is  4 \n", 1, STRONG)
    graph.engines.says = {"cheap": "5", "math": "4", "strong": "6"}
    text, report = await graph.ask("topic 1")
    assert (text, report.answer_step, report.pair) == ("5", 2, CHEAP)


async def test_the_last_pair_that_is_left_runs_again_where_its_replica_died(graph: Path2) -> None:
    said: list[Any] = [ReplicaDied("gone"), "still here"]
    graph.engines.says = {"math": lambda _: said.pop(0)}
    text, report = await graph.ask(model="math@none")
    assert (text, pairs(report)) == ("still here", ["math@none"])


@pytest.mark.parametrize("asked", ["math@none", "atlas"])
@pytest.mark.parametrize("is_policy", [False, True])
async def test_a_request_that_kills_engines_stops_after_the_second(
    graph: Path2, asked: str, is_policy: bool
) -> None:
    await graph.promote(policy() if is_policy else plain_snapshot())
    graph.engines.says = {pair.model_id: ReplicaDied("gone") for pair in PAIRS}
    with pytest.raises(ReplicaDied):
        await graph.ask("topic 1", model=asked)
    assert len(graph.engines.bodies) == 2
    graph.engines.says = {}
    text, _ = await graph.ask("topic 1", model=asked)  # the next one is not the one at fault
    assert text


@pytest.mark.parametrize("is_policy", [False, True])
async def test_what_the_caller_did_wrong_is_tried_on_no_other_engine(
    graph: Path2, is_policy: bool
) -> None:
    await graph.promote(policy() if is_policy else plain_snapshot())
    graph.engines.says = {"math": InvalidRequest("no such parameter")}
    with pytest.raises(InvalidRequest, match="no such parameter"):
        await graph.ask("topic 1")
    assert {model for model, _ in graph.engines.bodies} == {"math"}


@pytest.mark.parametrize("is_policy", [False, True])
async def test_a_conversation_too_long_for_one_model_is_tried_on_another(
    graph: Path2, is_policy: bool
) -> None:
    await graph.promote(policy(answer=0.95) if is_policy else plain_snapshot())
    graph.engines.says = {"math": ContextTooLong("at most 4096 tokens")}
    text, _ = await graph.ask("topic 1")
    assert text == "strong says hello"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unforeseen_error_is_not_the_callers_leaving_and_another_pair_answers(
    graph: Path2, stream: bool
) -> None:
    await graph.promote(plain_snapshot())
    graph.engines.says = {"math": ValueError("with /a/path in it")}
    if stream:
        *_, report = await graph.stream("topic 1")
    else:
        _, report = await graph.ask("topic 1")
    assert [step.error for step in report.steps] == ["an unforeseen error", None]
    with pytest.raises(ServiceError) as caught:
        await graph.ask("topic 1", model="math")
    assert caught.value.message == "the pair math@none failed"
    assert graph.reports[-1].error == "the pair math@none failed"


async def test_a_caller_that_leaves_is_logged_as_that(graph: Path2) -> None:
    await graph.promote(plain_snapshot())
    graph.engines.says = {"math": lambda body: asyncio.sleep(60)}
    under_way = asyncio.create_task(graph.ask("topic 1"))
    while not graph.engines.bodies:
        await asyncio.sleep(0.01)
    under_way.cancel()
    with pytest.raises(asyncio.CancelledError):
        await under_way
    assert graph.reports[-1].error == "the caller went away"
    assert graph.reports[-1].steps[-1].error == "the caller went away"


async def test_another_pair_takes_over_where_a_replica_died(graph: Path2) -> None:
    await graph.promote(plain_snapshot())
    graph.engines.says = {"math": ReplicaDied("gone")}
    _, report = await graph.ask("topic 1")
    assert pairs(report)[0] == "math@none"
    assert len(graph.engines.asked("math")) == 1
    assert [step.error is None for step in report.steps] == [False, True]


async def test_all_steps_are_listed_counted_and_stored(graph: Path2) -> None:
    await graph.promote(policy())
    _, report = await graph.ask("topic 1")
    assert report.usage.prompt_tokens == 30
    assert report.usage.cost_usd == pytest.approx(15 * (1 + 10 + 100) / 1e6)
    extension = completion_extension(report, alpha=0.0, explain=False)
    assert [step["pair"] for step in extension["steps"]] == pairs(report)
    assert (extension["answer_step"], extension["path"]) == (report.answer_step, "policy")
    assert {step["action"] for step in extension["steps"]} == {"route"}
    stored = await rows(graph, OutcomeRow)
    assert [row["step_index"] for row in stored] == [0, 1, 2]
    assert [row["propensity"] for row in stored] == [1.0, 1.0, 1.0]
    (request,) = await rows(graph, RequestRow)
    assert (request["path"], request["model_id"]) == ("policy", "math")
    (trajectory,) = await rows(graph, TrajectoryRow)
    assert [d["action"] for d in trajectory["decisions"]] == ["route"] * 3 + ["answer"]
    assert trajectory["answer_step"] == report.answer_step


async def test_a_verdict_is_about_the_answer_that_was_given(graph: Path2) -> None:
    await graph.promote(policy())
    graph.engines.says = {"cheap": "5", "math": "4", "strong": "4"}
    _, report = await graph.ask("topic 1")
    assert await graph.outcomes.flush()
    await add_feedback(graph.store, report.request_id, "local", 1.0)
    (verdict,) = await read_verdicts(graph.store, [report.request_id])
    assert (verdict.pair, verdict.propensity) == (STRONG, None)


async def test_queries_are_embedded_once_and_answers_after_each_step(graph: Path2) -> None:
    await graph.promote(policy())
    graph.embedder.calls.clear()
    await graph.ask("topic 1")
    texts = [arguments[0] for _, arguments in graph.embedder.calls]
    assert texts == [["topic 1"], ["math says hello"], ["strong says hello"], ["cheap says hello"]]


async def test_a_streamed_request_gives_its_one_answer_as_one_piece(graph: Path2) -> None:
    await graph.promote(policy())
    *chunks, report = await graph.stream("topic 1")
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["cheap says hello"]
    assert chunks[0]["choices"][0]["finish_reason"] == "stop"
    assert chunks[0]["choices"][0]["logprobs"] is None
    assert chunks[0]["atlas"] == {"pair": "cheap@none", "path": "policy"}
    assert (len(report.steps), report.pair) == (3, CHEAP)


@pytest.mark.parametrize("failing", [(), ("math",)])
async def test_the_last_step_streams_where_there_is_no_other_answer(
    graph: Path2, failing: tuple[str, ...]
) -> None:
    await graph.promote(policy())
    graph.engines.says = {model: EngineError("broken") for model in failing}
    *chunks, report = await graph.stream("topic 1", limits={"max_steps": 1 + len(failing)})
    contents = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
    assert len([content for content in contents if content]) == 2
    assert report.answer_step == len(failing)


async def test_the_callers_limits_bound_the_steps(graph: Path2) -> None:
    await graph.promote(policy())
    _, report = await graph.ask("topic 1", limits={"max_steps": 2})
    assert pairs(report) == ["math@none", "strong@none"]
    _, report = await graph.ask("topic 1", limits={"max_cost_usd": 8e-4})
    assert pairs(report) == ["math@none", "cheap@none"]
    assert [step.error for step in report.steps] == [None, None]
    assert report.usage.cost_usd <= 8e-4


async def test_a_failed_step_is_history_without_an_answer(graph: Path2) -> None:
    await graph.promote(policy(answer=0.95))
    graph.engines.says = {"math": EngineError("broken")}
    text, report = await graph.ask("topic 1")
    assert text == "strong says hello"
    assert [step.error for step in report.steps] == ["broken", None]
    assert report.answer_step == 1


async def test_a_request_that_nobody_answers_fails_with_the_last_error(graph: Path2) -> None:
    await graph.promote(policy())
    graph.engines.says = {model: EngineError(f"{model} broke") for model in ("math", "strong")}
    graph.engines.says["cheap"] = InvalidRequest("cheap refuses")
    with pytest.raises(InvalidRequest, match="cheap refuses"):
        await graph.ask("topic 1")
    assert graph.reports[-1].error == "cheap refuses"
    assert len(graph.reports[-1].steps) == 3


async def test_without_the_router_the_best_answer_so_far_is_given(graph: Path2) -> None:
    await graph.promote(policy())

    def then_away(body: Any) -> str:
        graph.router.away.add("decide")
        return "first"

    graph.engines.says = {"math": then_away}
    text, report = await graph.ask("topic 1")
    assert (text, pairs(report)) == ("first", ["math@none"])


async def test_without_the_router_and_an_answer_the_next_best_pair_runs(graph: Path2) -> None:
    await graph.promote(policy())

    def then_away(body: Any) -> EngineError:
        graph.router.away.add("decide")
        return EngineError("broken")

    graph.engines.says = {"math": then_away}
    text, report = await graph.ask("topic 1")
    assert (text, pairs(report)) == ("strong says hello", ["math@none", "strong@none"])
    assert report.steps[1].path is DecidedBy.FALLBACK


async def test_an_answer_is_given_in_time_even_if_the_last_step_hangs(graph: Path2) -> None:
    await graph.promote(policy())
    graph.engines.says = {"strong": lambda body: asyncio.sleep(60)}
    text, report = await graph.ask("topic 1", deadline_s=3.0, limits={"max_steps": 2})
    assert text == "math says hello"
    assert report.steps[1].error


async def test_a_step_that_hangs_without_an_answer_ends_at_the_deadline(graph: Path2) -> None:
    await graph.promote(policy())
    graph.engines.says = {model: lambda body: asyncio.sleep(60) for model in ("math", "strong")}
    with pytest.raises(DeadlineExceeded):
        await graph.ask("topic 1", deadline_s=2.0, limits={"max_steps": 2})


async def test_logprobs_are_seen_by_the_policy_and_not_by_the_client(graph: Path2) -> None:
    await graph.promote(policy())
    completion, report = await graph.complete(graph.call("topic 1"))
    assert [step.mean_logprob for step in report.steps] == [-0.25] * 3
    assert completion["choices"][0]["logprobs"] is None
    asked = graph.call("topic 1", sampling={"logprobs": True})
    completion, _ = await graph.complete(asked)
    assert completion["choices"][0]["logprobs"]["content"]
    *chunks, _ = await graph.stream("topic 1", sampling={"logprobs": True})
    assert chunks[0]["choices"][0]["logprobs"]["content"]


async def test_an_engine_without_logprobs_is_asked_for_them_once(graph: Path2) -> None:
    await graph.promote(policy(answer=0.9))
    graph.engines.says = {"math": refuses_logprobs}
    for _ in range(2):
        text, report = await graph.ask("topic 1")
        assert (text, report.steps[0].mean_logprob, report.steps[0].error) == ("plain", None, None)
    assert [bool(body.get("logprobs")) for body in graph.engines.asked("math")] == [
        True,
        False,
        False,
    ]


async def test_a_thought_is_charged_and_stands_before_the_question(graph: Path2) -> None:
    await graph.promote(policy(think=0.9, answer=0.8))
    graph.engines.says = {"cheap": "First add, then check."}
    text, report = await graph.ask("topic 1")  # math 0.95, then think, then answer
    assert [(str(s.pair), s.action) for s in report.steps] == [
        ("math@none", Action.ROUTE),
        ("cheap@none", Action.THINK),
    ]
    assert (text, report.pair) == ("math says hello", MATH)
    assert report.usage.cost_usd == pytest.approx(15 * (1 + 10) / 1e6)
    (planned,) = graph.engines.asked("cheap")
    assert "math says hello" in json.dumps(planned["messages"])
    await graph.promote(policy(think=2.0, answer=0.8))
    _, report = await graph.ask("topic 1")
    assert [s.action for s in report.steps] == [Action.THINK, Action.ROUTE]
    last = graph.engines.asked("math")[-1]["messages"][-1]["content"]
    assert "First add, then check." in last
    assert last.endswith("topic 1")
    assert "First add" not in graph.engines.asked("math")[0]["messages"][-1]["content"]
    trajectory = (await rows(graph, TrajectoryRow))[-1]
    assert [d["action"] for d in trajectory["decisions"]] == ["think", "route", "answer"]


async def test_a_planner_that_fails_stops_nothing(graph: Path2) -> None:
    await graph.promote(policy(think=2.0, answer=0.8))
    graph.engines.says = {"cheap": EngineError("no thoughts")}
    text, report = await graph.ask("topic 1")
    assert text == "math says hello"
    assert [s.error for s in report.steps] == ["no thoughts", None]


async def test_the_callers_own_tools_and_several_choices_take_one_step(graph: Path2) -> None:
    await graph.promote(policy())
    tool = {"type": "function", "function": {"name": "weather"}}
    _, report = await graph.ask("topic 1", tools=(tool,))
    assert pairs(report) == ["math@none"]
    graph.engines.says = {"math": EngineError("broken")}
    _, report = await graph.ask("topic 1", sampling={"n": 2})
    assert pairs(report) == ["math@none", "strong@none"]
    assert report.steps[1].path is DecidedBy.FALLBACK


async def test_path_1_takes_one_step_and_falls_back_as_before(graph: Path2) -> None:
    await graph.promote(policy(threshold=0.0))
    _, report = await graph.ask("topic 1")
    assert (pairs(report), report.decision.path) == (["math@none"], DecidedBy.CLUSTERS)
    assert "logprobs" not in graph.engines.bodies[-1][1]
    graph.engines.says = {"math": EngineError("broken")}
    _, report = await graph.ask("topic 1")
    assert pairs(report) == ["math@none", "strong@none"]
    assert (report.answer_step, report.decisions) == (1, ())


async def test_a_request_keeps_the_policy_it_began_with(graph: Path2) -> None:
    old = await graph.promote(policy())
    swapped = asyncio.Event()

    async def answer_after_the_swap() -> str:
        await swapped.wait()
        return "late"

    graph.engines.says = {"math": lambda body: answer_after_the_swap()}
    under_way = asyncio.create_task(graph.ask("topic 1"))
    while not graph.engines.bodies:
        await asyncio.sleep(0.01)
    new = await graph.promote(policy(answer=5.0))
    swapped.set()
    _, report = await under_way
    assert len(report.steps) == 3  # the new one would have stopped after the first
    assert {d.policy_version for d in report.decisions} == {old}
    assert {step.policy_version for step in report.steps} == {old}
    _, report = await graph.ask("topic 1")
    assert (len(report.steps), report.decision.policy_version) == (1, new)


async def test_another_replica_knows_a_policy_that_it_never_served(graph: Path2) -> None:
    old = await graph.promote(policy())
    await graph.promote(policy(answer=5.0))
    graph.replica._follower._retired.clear()
    serving = await graph.replica._follower.began_with(old)
    assert serving is not None
    assert serving.policy_version == old
    assert await graph.replica._follower.began_with(99) is None


async def test_a_policy_with_wrong_tensors_is_refused_and_the_old_one_goes_on(
    graph: Path2,
) -> None:
    sound = await graph.promote(policy())
    broken = policy()
    tensors = {name: value for name, value in broken.policy.items() if name != "query.bias"}
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await graph.promote(replace(broken, policy=tensors))
    following = await graph.replica.following()
    assert following.policy_version == sound
    assert "query.bias" in str(following.refused)


async def test_a_request_that_no_pair_admits_is_refused(graph: Path2) -> None:
    await graph.promote(plain_snapshot())
    with pytest.raises(NoCandidate):
        await graph.ask("topic 1", limits={"models": frozenset()})
    with pytest.raises(NoCandidate):
        await graph.ask("topic 1", limits={"models": frozenset(), "max_cost_usd": 1e-9})


@pytest.mark.parametrize("is_policy", [False, True])
async def test_a_cost_limit_below_every_price_is_the_callers_fault_and_names_the_cheapest(
    graph: Path2, is_policy: bool
) -> None:
    await graph.promote(policy() if is_policy else plain_snapshot())
    with pytest.raises(BudgetExceeded, match="the cheapest costs about") as caught:
        await graph.ask("topic 1", limits={"max_cost_usd": 1e-9})
    assert (caught.value.status_code, caught.value.param) == (400, "atlas.max_cost_usd")
    assert 1e-9 < caught.value.needed < 1e-3


async def test_a_cost_limit_below_every_call_names_the_least_that_is_needed(graph: Path2) -> None:
    await graph.promote(plain_snapshot())
    long = "topic 1 " + "word " * 2000  # a dear prompt, which the router does not count
    with pytest.raises(BudgetExceeded, match="'cheap'") as caught:
        await graph.ask(long, limits={"max_cost_usd": 5e-3})
    assert 5e-3 < caught.value.needed < 0.02
    assert not graph.engines.bodies


@pytest.mark.parametrize(
    ("says", "how", "stop"),
    [
        ({}, {}, StopReason.ANSWERED),
        ({}, {"limits": {"max_steps": 2}}, StopReason.STEPS),
        ({"math": InvalidRequest("no")}, {"model": "math"}, StopReason.REFUSED),
        ({"math": EngineError("broken")}, {"model": "math"}, StopReason.FAILED),
        ({"math": ValueError("ours")}, {"model": "math"}, StopReason.FAILED),
        ({"math": DeadlineExceeded("late")}, {"model": "math"}, StopReason.DEADLINE),
        ({}, {"model": "math", "limits": {"max_cost_usd": 1e-9}}, StopReason.USD),
    ],
)
async def test_every_end_has_its_reason(
    graph: Path2, says: dict[str, Any], how: dict[str, Any], stop: StopReason
) -> None:
    await graph.promote(policy(answer=0.5) if stop is StopReason.ANSWERED else policy())
    graph.engines.says = says
    for ask in (graph.ask, graph.stream):
        results = await asyncio.gather(ask("topic 2", **how), return_exceptions=True)
        failures = [result for result in results if isinstance(result, AtlasError)]
        assert bool(failures) == (stop not in (StopReason.ANSWERED, StopReason.STEPS))
        assert all(failure.stop == stop for failure in failures)
        assert graph.reports[-1].stop is stop


async def test_a_caller_that_leaves_a_stream_ends_its_run(graph: Path2) -> None:
    await graph.promote(plain_snapshot())
    graph.engines.says = {"math": lambda body: asyncio.sleep(60)}
    stream = graph.orchestrator.stream(graph.call("topic 1"))
    reading = asyncio.create_task(anext(stream))
    while not graph.engines.bodies:
        await asyncio.sleep(0.01)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    report = graph.reports[-1]
    assert (report.stop, report.answer_step) == (StopReason.LEFT, None)
    assert [step.error for step in report.steps] == ["the caller went away"]
