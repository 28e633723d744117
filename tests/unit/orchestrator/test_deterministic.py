"""The same result again: over verdicts, exploration, a restart and another replica."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.errors import InvalidRequest
from serve_app.router.deployment import Router
from serve_app.schemas import Fixed
from serve_app.store import add_feedback
from tests.path2_fakes import (
    CHEAP,
    Controller,
    Handle,
    Path2,
    WordEmbedder,
    path2,
    plain_snapshot,
)
from tests.policy_data import with_policy

FIXED = Fixed(deadline_s=30.0)
EXPLORES: dict[str, Any] = {"exploration": {"epsilon": 0.5}}
QUERIES = [f"topic {number % 4} and {number}" for number in range(200)]


async def decided(deployment: Path2, *, fixed: Fixed = FIXED, alpha: float = 0.3) -> list[Any]:
    """What is decided for each query: pair, path and scores; several are asked at once."""
    calls = [deployment.call(query, fixed=fixed, limits={"alpha": alpha}) for query in QUERIES]
    decisions = await asyncio.gather(*map(deployment.orchestrator.decide, calls))
    return [(d.candidates, d.path, d.propensity, d.policy_version) for d in decisions]


async def rate(deployment: Path2, count: int) -> None:
    """Verdicts that turn the router away from what it chooses."""
    known = (await deployment.replica.following()).verdicts
    reports = [(await deployment.ask(f"topic {number % 4}"))[1] for number in range(count)]
    await deployment.outcomes.flush()
    for report in reports:
        score = 1.0 if report.pair == CHEAP else 0.0
        await add_feedback(deployment.store, report.request_id, "local", score, None)
    await deployment.until(lambda following: following.verdicts >= known + count)


async def test_200_requests_have_the_same_candidates_whatever_was_learned_between(
    tmp_path: Path,
) -> None:
    async with path2(tmp_path, **EXPLORES) as deployment:
        await deployment.promote(plain_snapshot())
        first = await decided(deployment)
        await rate(deployment, 51)
        assert await decided(deployment) == first
        learned = await asyncio.gather(
            *(
                deployment.orchestrator.decide(deployment.call(q, limits={"alpha": 0.3}))
                for q in QUERIES
            )
        )
        assert [d.candidates for d in learned] != [candidates for candidates, *_ in first]
    async with path2(tmp_path, **EXPLORES) as restarted:
        await restarted.until(lambda following: following.policy_version == first[0][3])
        assert await decided(restarted) == first
        config, controller = restarted.config, Handle(Controller(restarted.config))
        replica = Router.__new__(Router)
        await replica.__init__(config, Handle(WordEmbedder()), controller)  # type: ignore[misc]
        restarted.router._target, own = replica, restarted.router._target
        try:
            assert await decided(restarted) == first
        finally:
            restarted.router._target = own
            async with replica._follower.at_work:
                for task in (*replica._tasks, replica._watcher._task):
                    task.cancel()
            assert replica._follower.store is not None
            await replica._follower.store.close()


async def test_the_learned_policy_takes_the_same_steps_again(tmp_path: Path) -> None:
    async with path2(tmp_path, **EXPLORES) as deployment:
        await deployment.promote(with_policy(plain_snapshot()))
        courses = []
        for _ in range(5):
            _, report = await deployment.ask("topic 3", fixed=FIXED)
            courses.append(
                [(d.action, str(d.pair) if d.candidates else "") for d in report.decisions]
            )
            assert all(decision.propensity == 1.0 for decision in report.decisions)
            await rate(deployment, 6)
        assert courses[0]
        assert courses == [courses[0]] * 5


async def test_an_earlier_policy_decides_where_it_is_named(tmp_path: Path) -> None:
    async with path2(tmp_path) as deployment:
        first = await deployment.promote(plain_snapshot())
        before = await decided(deployment)
        serving = await deployment.promote(None)
        assert (await decided(deployment))[0][3] == serving
        assert await decided(deployment, fixed=replace(FIXED, policy_version=first)) == before


async def test_a_policy_that_never_was_is_refused(tmp_path: Path) -> None:
    async with path2(tmp_path) as deployment:
        with pytest.raises(InvalidRequest, match="no policy 99") as refused:
            await deployment.ask("topic 1", fixed=replace(FIXED, policy_version=99))
        assert refused.value.param == "atlas.policy_version"


FIRST = """
name: first
do:
  - parallel: {do: [{ask: {pair: cheap}}, {ask: {pair: math}}], join: first}
"""
VOTE = """
name: vote
do:
  - vote: {of: [{ask: {pair: cheap}}, {ask: {pair: math}}, {ask: {pair: strong}}]}
"""


@pytest.mark.parametrize("text", [FIRST, VOTE])
@pytest.mark.parametrize("slow", ["cheap", "math"])
async def test_parts_side_by_side_count_by_their_place_and_not_by_their_speed(
    tmp_path: Path, text: str, slow: str
) -> None:
    async with path2(tmp_path, patterns=[yaml.safe_load(text)]) as deployment:
        says = {
            "cheap": "The answer is 1.",
            "math": "The answer is 2.",
            "strong": "The answer is 3.",
        }

        async def late() -> str:
            others = len(says) - 1 if text is VOTE else 1
            while len(deployment.engines.bodies) <= others:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            return says[slow]

        deployment.engines.says = says | {slow: lambda _: late()}
        answer, _ = await deployment.ask(
            "How many?", model=f"pattern:{yaml.safe_load(text)['name']}", fixed=FIXED
        )
        assert answer == "The answer is 1."


async def test_a_node_samples_without_chance(tmp_path: Path) -> None:
    warm = "name: warm\ndo:\n  - ask: {pair: cheap, temperature: 0.9}\n"
    sampling = {"temperature": 0.0, "seed": 7}
    async with path2(tmp_path, patterns=[yaml.safe_load(warm)]) as deployment:
        await deployment.ask("Hm?", model="pattern:warm", fixed=FIXED, sampling=sampling)
        (body,) = deployment.engines.asked("cheap")
        assert (body["temperature"], body["seed"]) == (0.0, 7)
