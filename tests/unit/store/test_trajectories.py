"""Requests of path 2 as they are logged, rated and read back: all that it takes to decide anew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sqlalchemy import select

from rl.evaluate.off_policy import LoggedTrajectories, estimate_trajectories, logged_trajectories
from serve_app.errors import EngineError
from serve_app.router.rules.base import Answer, Batch, RoutingRequest
from serve_app.schemas import Action, Candidate, DecidedBy, Decision, Limits, Pair, Seen
from serve_app.store import (
    Journal,
    OutcomeLog,
    RatedTrajectory,
    Store,
    add_feedback,
    rated_trajectories,
    read_verdicts,
)
from serve_app.store.tables import TrajectoryRow
from tests.path2_fakes import CHEAP, PAIRS, Path2, WordEmbedder, path2, plain_snapshot
from tests.policy_data import with_policy
from tests.router_data import topics

NUM_REQUESTS = 24


@pytest.fixture(autouse=True)
def own_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session's graph may have set another one."""
    monkeypatch.setenv("ATLAS_DATA_DIR", str(tmp_path))


@pytest.fixture
async def graph(tmp_path: Path, store_url: str) -> AsyncIterator[Path2]:
    """A policy that explores; two engines agree, and one is broken."""
    explored = {"epsilon": 0.6}
    never = 1_000_000  # its breaker stays closed
    async with path2(
        tmp_path, store_url, breaker_failures=never, planner="cheap", exploration=explored
    ) as running:
        running.engines.says = {"math": "4", "strong": "4", "cheap": EngineError("broken")}
        await running.promote(with_policy(plain_snapshot(), think=0.5, answer=0.5))
        yield running


async def rated(graph: Path2, score: float = 1.0) -> list[RatedTrajectory]:
    """All requests so far, rated."""
    assert await graph.outcomes.flush()
    for report in graph.reports:
        await add_feedback(graph.store, report.request_id, "local", score)
    return await rated_trajectories(graph.store, 1000)


@dataclass
class Asked:
    """What a decision was made on."""

    limits: Limits
    history: tuple[Seen, ...]
    last_answer: NDArray[np.float32] | None
    available: tuple[Pair, ...] = PAIRS
    can_think: bool = True


@dataclass
class Recorder:
    """Always takes the cheap pair, and keeps what it was asked."""

    asked: list[Asked] = field(default_factory=list)

    snapshot = None

    def decide(self, batch: Batch) -> list[Answer]:
        for of in batch.requests:
            np.testing.assert_array_equal(of.embedding, topics()[1])
            can_think = batch.can_think(of)
            asked = Asked(of.limits, of.history, of.last_answer, batch.available, can_think)
            self.asked.append(asked)
        candidate = Candidate(CHEAP, 1.0, 1.0, 0.0)
        taken = Decision((candidate,), DecidedBy.POLICY, 1.0, 1.0, 1, 1)
        return [taken] * len(batch.requests)


def numbered(history: tuple[Seen, ...]) -> list[Seen]:
    """The same with the answers numbered in their order."""
    keys = [seen.answer_key for seen in history if seen.answer_key is not None]
    numbers = {key: str(number) for number, key in enumerate(dict.fromkeys(keys))}
    return [
        replace(seen, answer_key=None if seen.answer_key is None else numbers[seen.answer_key])
        for seen in history
    ]


def of(rated: list[RatedTrajectory]) -> LoggedTrajectories:
    logged = logged_trajectories(rated, PAIRS, "test-encoder")
    assert logged is not None
    return logged


def last_answer(request: RoutingRequest) -> Any:
    """(dim,) of the last answer, as the router saw it: the text goes to the router."""
    if request.is_known and request.text is not None:
        return WordEmbedder.one(request.text)
    return request.last_answer


async def test_a_logged_request_is_decided_anew_on_what_it_was_decided_on(graph: Path2) -> None:
    graph.router.calls.clear()
    for number in range(NUM_REQUESTS):
        limits: dict[str, Any] = {"alpha": 0.1 * (number % 3), "max_steps": 3 + number % 2}
        limits |= {"max_cost_usd": 1.0} if number % 4 == 0 else {}
        await graph.ask("topic 1", limits=limits)
    logged = of(await rated(graph))
    assert len({len(steps) for steps in logged.steps}) > 1
    router = [
        Asked(request.limits, request.history, last_answer(request))
        for _, ((request,),) in graph.router.calls
    ]
    # What was decided with nothing left but to answer is not decided anew.
    forced = [
        report.decisions[-1].action is Action.ANSWER and report.decisions[-1].propensity == 1.0
        for report in graph.reports
    ]
    kept: list[Asked] = []
    for report, is_forced in zip(graph.reports, forced, strict=True):
        own, router = router[: len(report.decisions)], router[len(report.decisions) :]
        kept += own[:-1] if is_forced else own
    recorder = Recorder()
    every = tuple(tuple(replace(step, propensity=0.5) for step in steps) for steps in logged.steps)
    estimate_trajectories("judged", recorder, replace(logged, steps=every), num_resamples=10)
    assert len(recorder.asked) == len(kept) > NUM_REQUESTS
    for asked, was in zip(recorder.asked, kept, strict=True):
        assert asked.limits == replace(was.limits, models=None, tools=None)
        assert numbered(asked.history) == numbered(was.history)
        assert (asked.last_answer is None) == (was.last_answer is None)
        if was.last_answer is not None:
            np.testing.assert_array_equal(asked.last_answer, was.last_answer)
        assert (set(asked.available), asked.can_think) == (set(PAIRS), True)


async def test_the_propensities_are_those_of_each_decision(graph: Path2) -> None:
    for _ in range(NUM_REQUESTS):
        await graph.ask("topic 1")
    for request, report in zip(await rated(graph), graph.reports, strict=True):
        assert request.request_id == report.request_id
        made = [(one.action, one.propensity) for one in request.decisions]
        assert made == [(one.action, one.propensity) for one in report.decisions]
        assert request.decisions[0].propensity < 1


async def test_a_request_that_went_on_without_the_router_is_not_judged(graph: Path2) -> None:
    def cut_off(_: Any) -> str:
        graph.router.away.add("decide")
        return "4"

    graph.engines.says = dict.fromkeys(("cheap", "math", "strong"), cut_off)
    await graph.ask("topic 1")
    graph.router.away.clear()
    found = await rated(graph)
    assert found[0].decisions[-1].path is DecidedBy.FALLBACK
    assert logged_trajectories(found, PAIRS, "test-encoder") is None


async def test_a_request_of_a_pair_that_is_gone_is_not_judged(graph: Path2) -> None:
    for _ in range(NUM_REQUESTS):
        await graph.ask("topic 1")
    found = await rated(graph)
    logged = logged_trajectories(found, PAIRS[:2], "test-encoder")
    assert logged is not None
    assert 0 < len(logged.steps) < len(found)
    assert all(set(available) <= set(PAIRS[:2]) for available in logged.available)


async def test_requests_of_path_2_are_no_single_decisions(graph: Path2) -> None:
    for _ in range(NUM_REQUESTS):
        await graph.ask("topic 1")
    found = await rated(graph)
    verdicts = await read_verdicts(graph.store, [request.request_id for request in found])
    assert verdicts
    assert {verdict.propensity for verdict in verdicts} == {None}


async def trajectories(store: Store) -> list[Any]:
    async with store.begin() as connection:
        return list((await connection.execute(select(TrajectoryRow))).mappings())


async def test_what_the_journal_held_is_all_there(
    graph: Path2, tmp_path: Path, store_url: str
) -> None:
    for _ in range(NUM_REQUESTS):
        await graph.ask("topic 1")
    assert await graph.outcomes.flush()
    copies = [replace(r, request_id=f"copy_{r.request_id}") for r in graph.reports]
    away = await Store.open("postgresql+asyncpg://127.0.0.1:1/x", must_answer=False)
    journal = Journal(tmp_path / "journal", 1 << 20)
    first = OutcomeLog(away, flush_interval_s=3600, journal=journal)
    for report in copies:
        first.record(report, 0.0)
    await first.close(timeout_s=0)
    await away.close()
    log = OutcomeLog(
        graph.store, flush_interval_s=0.01, journal=Journal(tmp_path / "journal", 1 << 20)
    )
    log.start()
    async with asyncio.timeout(20):
        while len(rows := await trajectories(graph.store)) < 2 * NUM_REQUESTS:
            await asyncio.sleep(0.01)
    await log.close()
    by_id = {row["request_id"]: dict(row) for row in rows}
    for report in graph.reports:
        own, copy = by_id[report.request_id], by_id[f"copy_{report.request_id}"]
        assert own | {"request_id": ""} == copy | {"request_id": ""}
    assert any(any(row["answer_embeddings"]) for row in rows)
