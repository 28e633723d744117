"""A request again, with the choices that were made for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.errors import CandidateGone, EngineError
from serve_app.schemas import Action, DecidedBy, Pair, Replay, Route
from serve_app.store import read_trace
from tests.path2_fakes import CHEAP, Path2, path2, plain_snapshot
from tests.policy_data import with_policy

ROUTED = """
name: routed
routable: false
do:
  - parallel:
      do:
        - ask: {pair: route, prompt: "topic 0"}
        - ask: {pair: route, prompt: "topic 3"}
  - ask: {pair: route}
"""


async def recorded(deployment: Path2, request_id: str) -> Replay:
    await deployment.outcomes.flush()
    return (await read_trace(deployment.store, request_id, "local")).choices()


def calls(report: Any) -> list[str]:
    """What ran, in order: models below pairs and nodes."""
    return [span.name for span in report.spans if span.kind == "model"]


async def test_the_chosen_candidate_runs_again_whatever_serves_now(tmp_path: Path) -> None:
    async with path2(tmp_path) as deployment:
        await deployment.promote(plain_snapshot())
        _, first = await deployment.ask("topic 1")
        replay = await recorded(deployment, first.request_id)
        await deployment.promote(None)
        _, again = await deployment.ask("topic 1", replay=replay)
        assert (again.pair, again.decision.path) == (first.pair, DecidedBy.PINNED)
        assert len(deployment.router.calls) == 1  # the first alone asked the router


async def test_a_fallback_runs_again_where_the_first_choice_fails_again(tmp_path: Path) -> None:
    async with path2(tmp_path) as deployment:
        await deployment.promote(plain_snapshot())
        _, plain = await deployment.ask("topic 1")
        deployment.engines.says = {plain.pair.model_id: EngineError("down")}
        _, first = await deployment.ask("topic 1")
        replay = await recorded(deployment, first.request_id)
        assert [pair for _, pair in replay.steps] == [step.pair for step in first.steps]
        assert len(replay.steps) == 2
        _, again = await deployment.ask("topic 1", replay=replay)
        assert (calls(again), again.pair) == (calls(first), first.pair)


async def test_the_steps_of_the_learned_policy_are_taken_again(tmp_path: Path) -> None:
    async with path2(tmp_path, planner="cheap") as deployment:
        await deployment.promote(with_policy(plain_snapshot(), think=2.0, answer=0.5))
        _, first = await deployment.ask("topic 2")
        assert first.decision.path is DecidedBy.POLICY
        replay = await recorded(deployment, first.request_id)
        assert replay.is_policy
        assert replay.steps[0][0] is first.steps[0].action
        await deployment.promote(None)
        asked = len(deployment.router.calls)
        _, again = await deployment.ask("topic 2", replay=replay)
        assert [(s.action, s.pair) for s in again.steps] == [
            (s.action, s.pair) for s in first.steps
        ]
        assert (again.answer_step, again.pair) == (first.answer_step, first.pair)
        assert (len(deployment.router.calls), again.decisions) == (asked, ())


async def test_what_the_router_chose_inside_a_pattern_is_chosen_again(tmp_path: Path) -> None:
    async with path2(tmp_path, patterns=[yaml.safe_load(ROUTED)]) as deployment:
        await deployment.promote(plain_snapshot())
        _, first = await deployment.ask("topic 1", model="pattern:routed")
        replay = await recorded(deployment, first.request_id)
        assert sum(map(len, replay.routes.values())) == 3
        await deployment.promote(None)
        asked = len(deployment.router.calls)
        _, again = await deployment.ask("topic 1", replay=replay)
        assert calls(again) == calls(first)
        assert len(deployment.router.calls) == asked
        assert (await recorded(deployment, again.request_id)).routes == replay.routes


@pytest.mark.parametrize("where", ["steps", "routes"])
async def test_a_candidate_that_is_gone_is_named_and_nothing_runs(
    tmp_path: Path, where: str
) -> None:
    gone = Pair("retired", "none")
    steps = ((Action.ROUTE, gone if where == "steps" else CHEAP),)
    routes: dict[Route, tuple[tuple[Pair, ...], ...]] = {}
    if where == "routes":
        routes["pattern:x", "ask"] = ((gone,),)
    async with path2(tmp_path) as deployment:
        with pytest.raises(CandidateGone, match="'retired@none'"):
            await deployment.ask(replay=Replay("req_1", steps, False, routes))
        assert (deployment.engines.bodies, deployment.reports) == ([], [])
