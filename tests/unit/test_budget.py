"""No cap is passed, whatever is asked for and whatever is called."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.budget import UNLIMITED, Budget, Caps, Deadline, Use
from serve_app.errors import AtlasError, BudgetExceeded, EngineError
from serve_app.models.protocol import ChatBody
from serve_app.schemas import Usage
from tests.executor_fakes import Bench, reply
from tests.path2_fakes import Engines

CALL = '{"expression": "20 * 5"}'
LATER = Deadline.after(3600)


def dollars(usd: float) -> Usage:
    return Usage(cost_usd=usd)


def test_what_is_reserved_cannot_be_spent_twice() -> None:
    budget = Budget(LATER, Caps(usd=1.0))
    with budget.reserve(Use(0.6), "one") as first:
        assert budget.left.usd == pytest.approx(0.4)
        with pytest.raises(BudgetExceeded, match=r"two may cost 0.5 USD, and 0.4 are left"):
            budget.reserve(Use(0.5), "two")
        first.settle(dollars(0.1))
    assert budget.left.usd == pytest.approx(0.9)
    with budget.reserve(Use(0.9), "three"):
        pass
    assert budget.spent.usd == pytest.approx(0.1)


def test_what_is_not_reported_counts_as_all_that_was_reserved() -> None:
    budget = Budget(LATER, Caps(usd=1.0))
    with budget.reserve(Use(0.6, 100, 1), "one") as held:
        held.settle(None)
    assert budget.spent == pytest.approx((0.6, 100, 1, 0))


def test_a_call_that_fails_is_free_and_counts_as_made() -> None:
    budget = Budget(LATER, Caps(usd=1.0))
    with pytest.raises(EngineError), budget.reserve(Use(0.6, 100, 1), "one"):
        raise EngineError("broken")
    assert budget.spent == (0.0, 0.0, 1, 0.0)
    assert budget.left.usd == 1.0


@pytest.mark.parametrize("cap", Caps._fields)
def test_each_cap_says_which_one_it_is(cap: str) -> None:
    budget = Budget(LATER, Caps(**{cap: 2}))
    with pytest.raises(BudgetExceeded) as caught:
        budget.reserve(Use(**{cap: 3}), "the call")
    assert (caught.value.cap, caught.value.needed) == (cap, 3)


def test_a_child_draws_on_its_parent_and_has_its_own_limits() -> None:
    parent = Budget(Deadline(100.0), Caps(usd=1.0))
    child = parent.child(Deadline(50.0), Caps(usd=0.5))
    late = parent.child(Deadline(200.0))
    assert (child.deadline.at_s, late.deadline.at_s) == (50.0, 100.0)
    with pytest.raises(BudgetExceeded):
        child.reserve(Use(0.6), "too much for the child")
    with parent.reserve(Use(0.8), "beside it"), pytest.raises(BudgetExceeded):
        child.reserve(Use(0.3), "too much for the parent")
    with child.reserve(Use(0.4), "one") as held:
        held.settle(dollars(0.4))
    assert parent.left.usd == pytest.approx(0.6)
    assert child.left.usd == pytest.approx(0.1)


def test_a_part_has_its_share_of_the_time_left() -> None:
    parent = Budget(Deadline.after(100.0))
    assert 49 < parent.part(0.5).seconds_left <= 50
    assert parent.part(2.0).deadline == parent.deadline
    assert Budget(Deadline(0.0)).part(0.5).deadline.is_over()


def test_without_a_limit_everything_is_covered() -> None:
    budget = Budget(LATER)
    with budget.reserve(Use(1e9), "all") as held:
        held.settle(dollars(1e9))
    assert budget.left == UNLIMITED


@dataclass
class Scripted:
    """One call of a tree of budgets."""

    budget: int
    """Number of the budget that pays."""
    most: Use
    share: float
    """Of the dollars and tokens reserved that it uses."""
    begins: int
    """Turns of the event loop before it begins."""
    takes: int
    """Turns that it takes."""
    fails: bool


def amounts(most: int) -> st.SearchStrategy[tuple[float, int, int, int]]:
    return st.tuples(st.floats(0, most), *(st.integers(0, most) for _ in range(3)))


_CALLS = st.builds(
    Scripted,
    st.integers(0, 5),
    amounts(3).map(lambda values: Use(*values)),
    st.floats(0, 1),
    st.integers(0, 6),
    st.integers(0, 4),
    st.booleans(),
)


class Tree:
    """A tree of budgets, whose calls run at the same time."""

    def __init__(self, caps: list[tuple[float, ...]], parents: Any) -> None:
        self.budgets = [Budget(LATER, Caps(*caps[0]))]
        for cap in caps[1:]:
            parent = self.budgets[parents.randrange(len(self.budgets))]
            self.budgets.append(parent.child(caps=Caps(*cap)))
        self.caps = caps

    def over(self) -> list[float]:
        """By how much each amount passes its cap, of all budgets."""
        return [
            spent - cap * (1 + 1e-6)
            for budget, caps in zip(self.budgets, self.caps, strict=True)
            for spent, cap in zip(budget.spent, caps, strict=True)
        ]

    async def run(self, call: Scripted) -> None:
        for _ in range(call.begins):
            await asyncio.sleep(0)
        try:
            held = self.budgets[call.budget % len(self.budgets)].reserve(call.most, "it")
        except BudgetExceeded:
            return
        with contextlib.suppress(EngineError), held:
            for _ in range(call.takes):
                await asyncio.sleep(0)
            if call.fails:
                raise EngineError("broken")
            held.settle(Usage(0, int(call.most.tokens * call.share), call.most.usd * call.share))

    def run_all(self, calls: list[Scripted]) -> None:
        async def everything() -> None:
            await asyncio.gather(*map(self.run, calls))

        asyncio.run(everything())


@settings(max_examples=200)
@given(
    st.lists(amounts(6), min_size=1, max_size=5),
    st.lists(_CALLS, max_size=25),
    st.randoms(use_true_random=False),
)
def test_no_budget_of_a_tree_is_ever_passed(
    caps: list[tuple[float, ...]], calls: list[Scripted], parents: Any
) -> None:
    tree = Tree(caps, parents)
    tree.run_all(calls)
    assert max(tree.over()) <= 0
    assert all(value == pytest.approx(0) for b in tree.budgets for value in b._reserved)


@settings(max_examples=200)
@given(
    st.lists(amounts(6), min_size=1, max_size=5),
    st.lists(_CALLS, min_size=1, max_size=25),
    st.integers(0, 24),
    st.floats(1, 10),
    st.randoms(use_true_random=False),
)
def test_a_tree_is_passed_by_no_more_than_what_one_call_said_beyond_its_share(
    caps: list[tuple[float, ...]],
    calls: list[Scripted],
    liar: int,
    share: float,
    parents: Any,
) -> None:
    one = calls[liar % len(calls)]
    one.share = share
    tree = Tree(caps, parents)
    tree.run_all(calls)
    beyond = (share - 1) * max(one.most.usd, one.most.tokens)
    assert max(tree.over()) <= beyond + 1e-6


class Honest(Engines):
    """Engines that write as many tokens as they may, of prompts with as many as fit."""

    share: float = 1.0
    """Of the tokens allowed; above 1 says more than it was allowed."""
    started: list[float]
    """Dollars spent when each call began."""
    bench: Bench

    async def complete(
        self, model_id: str, body: ChatBody, deadline: Deadline, session: str = ""
    ) -> dict[str, Any]:
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
    bench.pairs.parts.models._clients = engines
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
    max_examples=80,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    replies=_REPLIES,
    max_usd=st.floats(1e-4, 20),
    others=st.tuples(st.integers(0, 5000), st.integers(0, 6), st.integers(0, 6)),
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
    others: tuple[float, ...],
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
    budget = Budget(LATER, Caps(max_usd, *others))
    with contextlib.suppress(AtlasError):
        asyncio.run(bench.run(tool, stream=stream, budget=budget, sampling=sampling))
    assert bench.result.usage.cost_usd <= max_usd * (1 + 1e-6)
    assert all(s <= cap * (1 + 1e-6) for s, cap in zip(budget.spent, budget._caps, strict=True))
    assert budget.spent.usd == pytest.approx(bench.result.usage.cost_usd)


@settings(
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(replies=_REPLIES, max_usd=st.floats(0.1, 20), share=st.floats(1.1, 20))
def test_an_engine_that_says_more_than_it_may_is_the_last_that_is_asked(
    tmp_path: Path, replies: list[Any], max_usd: float, share: float
) -> None:
    bench = honest(tmp_path, share, *replies, price_usd_per_call=0.01)
    budget = Budget(LATER, Caps(usd=max_usd))
    with contextlib.suppress(AtlasError):
        asyncio.run(bench.run(budget=budget, sampling={"max_tokens": 32}))
    assert isinstance(bench.engines, Honest)
    assert all(spent <= max_usd for spent in bench.engines.started)


async def test_several_choices_share_what_is_left(tmp_path: Path) -> None:
    bench = honest(tmp_path, 1.0, reply("yes"))
    budget = Budget(LATER, Caps(usd=1.0))
    await bench.run("none", budget=budget, sampling={"n": 8, "max_tokens": 1000})
    (body,) = [body for _, body in bench.engines.bodies]
    assert 1 < body["max_tokens"] < 1000 / 8
    assert 0.9 < bench.result.usage.cost_usd <= 1.0


async def test_a_tool_call_that_is_not_covered_is_refused_and_the_model_is_told(
    tmp_path: Path,
) -> None:
    for max_usd, ran in ((8.0, [True, True, True]), (5.9, [True, True, False])):
        bench = Bench(tmp_path, reply(calls=(CALL,) * 3), reply("100"), price_usd_per_call=2.0)
        answer, _ = await bench.run(
            budget=Budget(LATER, Caps(usd=max_usd)), sampling={"max_tokens": 8}
        )
        assert answer == "100"
        assert [call.ok for call in bench.result.tool_calls] == ran
    assert "budget covers no further call" in bench.engines.bodies[-1][1]["messages"][-1]["content"]


async def test_a_verifier_that_is_not_covered_leaves_the_choice_to_the_majority(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path, reply("yes"))
    answer, _ = await bench.run(
        "judged", budget=Budget(LATER, Caps(usd=0.4)), sampling={"max_tokens": 8}
    )
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
