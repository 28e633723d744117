"""No limit on dollars is passed, whatever is asked for and whatever is called."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.budget import Budget, Deadline
from serve_app.errors import AtlasError, BudgetExceeded, EngineError
from serve_app.models.protocol import ChatBody
from tests.executor_fakes import Bench, reply
from tests.path2_fakes import Engines

CALL = '{"expression": "20 * 5"}'
LATER = Deadline.after(3600)


def test_what_is_reserved_cannot_be_spent_twice() -> None:
    budget = Budget(LATER, 1.0)
    with budget.reserve(0.6, "one") as first:
        assert budget.left_usd == pytest.approx(0.4)
        with pytest.raises(BudgetExceeded, match=r"two may cost 0.5 USD, and 0.4 are left"):
            budget.reserve(0.5, "two")
        first.settle(0.1)
    assert budget.left_usd == pytest.approx(0.9)
    with budget.reserve(0.9, "three"):
        pass
    assert budget.spent_usd == pytest.approx(0.1)


def test_what_is_not_reported_counts_as_all_that_was_reserved() -> None:
    budget = Budget(LATER, 1.0)
    with budget.reserve(0.6, "one") as held:
        held.settle(None)
    assert budget.spent_usd == pytest.approx(0.6)


def test_a_child_draws_on_its_parent_and_has_its_own_limits() -> None:
    parent = Budget(Deadline(100.0), 1.0)
    child = parent.child(Deadline(50.0), max_usd=0.5)
    late = parent.child(Deadline(200.0))
    assert (child.deadline.at_s, late.deadline.at_s) == (50.0, 100.0)
    with pytest.raises(BudgetExceeded):
        child.reserve(0.6, "too much for the child")
    with parent.reserve(0.8, "beside it"), pytest.raises(BudgetExceeded):
        child.reserve(0.3, "too much for the parent")
    with child.reserve(0.4, "one") as held:
        held.settle(0.4)
    assert parent.left_usd == pytest.approx(0.6)
    assert child.left_usd == pytest.approx(0.1)


def test_without_a_limit_everything_is_covered() -> None:
    budget = Budget(LATER)
    with budget.reserve(1e9, "all") as held:
        held.settle(1e9)
    assert budget.left_usd == float("inf")


_DOLLARS = st.floats(0, 2)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(_DOLLARS, min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 3), _DOLLARS, st.floats(0, 1)), max_size=30),
    st.randoms(use_true_random=False),
)
def test_no_budget_of_a_tree_is_ever_passed(
    limits: list[float], calls: list[tuple[int, float, float]], random: Any
) -> None:
    line = [Budget(LATER, limits[0])]
    for limit in limits[1:]:
        line.append(line[random.randrange(len(line))].child(LATER, limit))
    open_calls: list[Any] = []
    spent = [0.0] * len(line)
    for number, usd, share in calls:
        budget = line[number % len(line)]
        try:
            held = budget.reserve(usd, "it")
        except BudgetExceeded:
            assert usd > budget.left_usd
        else:
            held.settle(usd * share)
            open_calls.append(held)
        if open_calls and random.random() < 0.5:
            open_calls.pop(random.randrange(len(open_calls))).__exit__(None, None, None)
        spent = [budget.spent_usd for budget in line]
        assert all(s <= limit * (1 + 1e-6) for s, limit in zip(spent, limits, strict=True))
    for held in open_calls:
        held.__exit__(None, None, None)
    assert all(s <= limit * (1 + 1e-6) for s, limit in zip(spent, limits, strict=True))


class Honest(Engines):
    """Engines that write as many tokens as they may, of prompts with as many as fit."""

    share: float = 1.0
    """Of the tokens allowed; above 1 says more than it was allowed."""
    started: list[float]
    """Dollars spent when each call began."""
    bench: Bench

    async def complete(self, model_id: str, body: ChatBody, deadline: Deadline) -> dict[str, Any]:
        self.started.append(self.bench.result.usage.cost_usd)
        completion = await super().complete(model_id, body, deadline)
        text = json.dumps([body["messages"], body.get("tools", [])], ensure_ascii=False)
        n = body.get("n", 1)
        completion["usage"] = {
            "prompt_tokens": int(len(text.encode()) * self.share),
            "completion_tokens": int(body["max_tokens"] * n * self.share),
        }
        first = completion["choices"][0]
        completion["choices"] = [{**first, "index": number} for number in range(n)]
        return completion


def honest(folder: Path, share: float, *replies: Any, **tools: Any) -> Bench:
    bench = Bench(folder, *replies, **tools)
    engines = Honest(says=bench.engines.says)
    engines.share, engines.started, engines.bench = share, [], bench
    bench.engines = engines
    bench.executor._engines._clients = engines
    return bench


_REPLIES = st.lists(
    st.one_of(
        st.just(reply("an answer")),
        st.just(reply("<tool_call>")),
        st.just(reply("")),
        st.integers(1, 16).map(lambda n: reply(calls=(CALL,) * n)),
        st.just(EngineError("broken")),
    ),
    min_size=1,
    max_size=6,
)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    replies=_REPLIES,
    max_usd=st.floats(1e-4, 20),
    tool=st.sampled_from(["none", "calculator", "lookup", "best_of", "judged"]),
    tool_usd=st.sampled_from([0.0, 0.01, 0.3, 2.0]),
    num_choices=st.integers(1, 8),
    max_tokens=st.integers(1, 64),
    stream=st.booleans(),
)
def test_no_cap_is_passed_by_samples_tools_calls_or_verifiers(
    tmp_path: Path,
    replies: list[Any],
    max_usd: float,
    tool: str,
    tool_usd: float,
    num_choices: int,
    max_tokens: int,
    stream: bool,
) -> None:
    bench = honest(tmp_path, 1.0, *replies, price_usd_per_call=tool_usd)
    sampling = {"max_tokens": max_tokens}
    if tool in ("none", "lookup"):
        sampling["n"] = num_choices
    budget = Budget(LATER, max_usd)
    with contextlib.suppress(AtlasError):
        asyncio.run(bench.run(tool, stream=stream, budget=budget, sampling=sampling))
    assert bench.result.usage.cost_usd <= max_usd * (1 + 1e-6)
    assert budget.spent_usd == pytest.approx(bench.result.usage.cost_usd)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(replies=_REPLIES, max_usd=st.floats(0.1, 20), share=st.floats(1.1, 20))
def test_an_engine_that_says_more_than_it_may_is_the_last_that_is_asked(
    tmp_path: Path, replies: list[Any], max_usd: float, share: float
) -> None:
    bench = honest(tmp_path, share, *replies, price_usd_per_call=0.01)
    budget = Budget(LATER, max_usd)
    with contextlib.suppress(AtlasError):
        asyncio.run(bench.run(budget=budget, sampling={"max_tokens": 32}))
    assert isinstance(bench.engines, Honest)
    assert all(spent <= max_usd for spent in bench.engines.started)


async def test_several_choices_share_what_is_left(tmp_path: Path) -> None:
    bench = honest(tmp_path, 1.0, reply("yes"))
    budget = Budget(LATER, 1.0)
    await bench.run("none", budget=budget, sampling={"n": 8, "max_tokens": 1000})
    (body,) = [body for _, body in bench.engines.bodies]
    assert 1 < body["max_tokens"] < 1000 / 8
    assert 0.9 < bench.result.usage.cost_usd <= 1.0


async def test_a_tool_call_that_is_not_covered_is_refused_and_the_model_is_told(
    tmp_path: Path,
) -> None:
    for max_usd, ran in ((8.0, [True, True, True]), (5.9, [True, True, False])):
        bench = Bench(tmp_path, reply(calls=(CALL,) * 3), reply("100"), price_usd_per_call=2.0)
        answer, _ = await bench.run(budget=Budget(LATER, max_usd), sampling={"max_tokens": 8})
        assert answer == "100"
        assert [call.ok for call in bench.result.tool_calls] == ran
    assert "budget covers no further call" in bench.engines.bodies[-1][1]["messages"][-1]["content"]


async def test_a_verifier_that_is_not_covered_leaves_the_choice_to_the_majority(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path, reply("yes"))
    answer, _ = await bench.run("judged", budget=Budget(LATER, 0.4), sampling={"max_tokens": 8})
    assert answer == "yes"
    assert bench.engines.asked("judge") == []
    (call,) = bench.result.tool_calls
    assert not call.ok


async def test_a_verifier_that_fails_stops_the_others_and_is_paid_for(tmp_path: Path) -> None:
    bench = honest(tmp_path, 1.0, reply("yes"))
    hanging = asyncio.Event()
    said: list[Any] = ["0.5", EngineError("gone"), hanging.wait()]
    bench.engines.says["judge"] = lambda body: said.pop(0)
    answer, _ = await bench.run("judged", sampling={"max_tokens": 8})
    assert answer == "yes"
    assert not said
    assert len(bench.result.tool_calls) == 1
