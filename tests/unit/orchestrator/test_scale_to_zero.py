"""Models scaled to zero: others cover for them while they are woken, and nobody waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve_app.budget import Deadline
from serve_app.config import AtlasConfig, PoolConfig
from serve_app.errors import EngineError, NoCandidate
from serve_app.orchestrator.scale_to_zero import Waker
from serve_app.schemas import DecidedBy
from tests.path2_fakes import MODELS, Engines, Path2, path2, path2_config, plain_snapshot
from tests.policy_data import with_policy


@pytest.fixture(autouse=True)
def own_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATLAS_DATA_DIR", str(tmp_path))


@pytest.fixture
async def graph(tmp_path: Path) -> AsyncIterator[Path2]:
    async with path2(tmp_path) as running:
        await running.promote(plain_snapshot())
        yield running


def put_to_sleep(graph: Path2, *asleep: str) -> None:
    watcher = graph.orchestrator._watcher
    members = tuple(
        replace(member, num_replicas=0 if member.model_id in asleep else 1)
        for member in watcher.state.models
    )
    watcher.state = replace(watcher.state, models=members)


def greetings(graph: Path2, model_id: str) -> int:
    return sum(body.get("max_tokens") == 1 for body in graph.engines.asked(model_id))


async def until_woken(graph: Path2, model_id: str) -> None:
    await asyncio.wait({graph.orchestrator._waker.wake(model_id)})


class Slow:
    """An engine that answers once it is let."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.asked = asyncio.Event()

    async def __call__(self, body: Any) -> str:
        self.asked.set()
        await self.may_answer.wait()
        return "good morning"


async def test_the_next_best_pair_covers_for_a_model_that_sleeps(graph: Path2) -> None:
    _, report = await graph.ask("topic 2")
    assert str(report.pair) == "strong@none"
    put_to_sleep(graph, "strong")
    graph.engines.says = {"strong": Slow()}
    _, report = await graph.ask("topic 2")
    assert report.pair.model_id != "strong"
    assert report.decision.path is not DecidedBy.FALLBACK
    assert report.decision.propensity == 1.0
    assert all(c.pair.model_id != "strong" for c in report.decision.candidates)


async def test_a_model_that_would_have_been_chosen_is_woken_once(graph: Path2) -> None:
    put_to_sleep(graph, "strong")
    slow = Slow()
    graph.engines.says = {"strong": slow}
    for _ in range(3):
        await graph.ask("topic 2")
    await slow.asked.wait()
    assert greetings(graph, "strong") == len(graph.engines.asked("strong")) == 1


async def test_a_model_that_has_been_woken_gets_the_next_request(graph: Path2) -> None:
    put_to_sleep(graph, "strong")
    await graph.ask("topic 2")
    await until_woken(graph, "strong")
    _, report = await graph.ask("topic 2")  # the pool's state still says that it sleeps
    assert report.pair.model_id == "strong"


async def test_a_model_that_nobody_wants_sleeps_on(graph: Path2) -> None:
    put_to_sleep(graph, "cheap")
    await graph.ask("topic 2")
    assert graph.engines.asked("cheap") == []


async def test_asking_where_a_request_would_go_wakes_nobody(graph: Path2) -> None:
    put_to_sleep(graph, "strong")
    decision = await graph.orchestrator.decide(graph.call("topic 2"))
    assert decision.pair.model_id != "strong"
    assert graph.engines.asked("strong") == []


async def test_fallbacks_that_are_awake_come_before_those_that_sleep(graph: Path2) -> None:
    decision = await graph.orchestrator.decide(graph.call("topic 2"))
    first, second, third = (candidate.pair.model_id for candidate in decision.candidates)
    put_to_sleep(graph, second)
    graph.engines.says = {first: EngineError("broken")}
    _, report = await graph.ask("topic 2")
    assert [step.pair.model_id for step in report.steps] == [first, third]


@pytest.mark.parametrize(
    "how", [{"model": "strong"}, {"limits": {"models": frozenset({"strong"})}}]
)
async def test_a_request_for_a_sleeping_model_alone_waits_for_it(
    graph: Path2, how: dict[str, Any]
) -> None:
    put_to_sleep(graph, "strong")
    slow = Slow()
    graph.engines.says = {"strong": slow}
    asked = asyncio.create_task(graph.ask("topic 2", **how))
    await slow.asked.wait()
    assert greetings(graph, "strong") == len(graph.engines.asked("strong")) == 1
    slow.may_answer.set()
    text, report = await asked
    assert (text, report.pair.model_id) == ("good morning", "strong")


async def test_the_learned_policy_steps_around_a_model_that_sleeps(graph: Path2) -> None:
    await graph.promote(with_policy(plain_snapshot()))
    put_to_sleep(graph, "strong")
    _, report = await graph.ask("topic 1")
    assert report.decision.path is DecidedBy.POLICY
    assert {step.pair.model_id for step in report.steps} == {"math", "cheap"}


async def test_a_model_that_is_late_is_a_503_and_wakes_on(graph: Path2) -> None:
    slow = Slow()
    engines = Engines(says={"strong": slow})
    waker = Waker(PoolConfig(cold_start_wait_s=0.01), engines)
    with pytest.raises(NoCandidate, match="starting"):
        await waker.wait_for("strong", Deadline.after(30))
    slow.may_answer.set()
    await waker.wait_for("strong", Deadline.after(30))
    assert len(engines.asked("strong")) == 1


async def test_nobody_waits_past_the_own_deadline(graph: Path2) -> None:
    waker = Waker(PoolConfig(), Engines(says={"strong": Slow()}))
    with pytest.raises(NoCandidate, match="starting"):
        await waker.wait_for("strong", Deadline.after(0.01))
    waker.close()


async def test_who_waits_for_a_model_that_cannot_start_hears_why(graph: Path2) -> None:
    waker = Waker(PoolConfig(), Engines(says={"strong": EngineError("out of memory")}))
    with pytest.raises(EngineError, match="out of memory"):
        await waker.wait_for("strong", Deadline.after(30))


async def test_a_caller_who_leaves_does_not_stop_the_start(graph: Path2) -> None:
    slow = Slow()
    waker = Waker(PoolConfig(), Engines(says={"strong": slow}))
    waiting = asyncio.create_task(waker.wait_for("strong", Deadline.after(30)))
    await slow.asked.wait()
    waiting.cancel()
    await asyncio.wait({waiting})
    slow.may_answer.set()
    await waker.wait_for("strong", Deadline.after(30))


@pytest.mark.parametrize("change", [{"role": "verifier"}, {"planner": True}])
def test_what_no_other_model_replaces_cannot_scale_to_zero(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    config = path2_config(tmp_path).model_dump(mode="json")
    if change.pop("planner", False):
        config["router"]["planner"] = MODELS[0]
    AtlasConfig.model_validate(config)
    config["models"][0] |= change | {"autoscaling": {"min_replicas": 0}}
    with pytest.raises(ValueError, match="cannot scale to zero"):
        AtlasConfig.model_validate(config)
