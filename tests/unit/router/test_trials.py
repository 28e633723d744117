"""Canaries, shadows, and policies that are taken back by themselves: the real router, follower,
guard and store, and users who rate what they get."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

from rl.publish import roll_back
from serve_app.errors import InvalidRequest
from serve_app.router.serving.follower import share_of
from serve_app.router.serving.rollback import (
    PolicyComparison,
    PolicyGuard,
    bounds,
    counting,
    live_utility,
)
from serve_app.schemas import LOCAL_OWNER, Report
from serve_app.store import (
    Mode,
    Policy,
    RatedRequest,
    add_feedback,
    list_policies,
    publish,
    serving_policies,
    trial_policies,
)
from serve_app.store.tables import ShadowRow
from tests.path2_fakes import Path2, path2, plain_snapshot
from tests.policy_data import with_policy


@pytest.fixture(autouse=True)
def own_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session's graph may have set another one."""
    monkeypatch.setenv("ATLAS_DATA_DIR", str(tmp_path))


@pytest.fixture
async def graph(tmp_path: Path, store_url: str) -> AsyncIterator[Path2]:
    rollback = {"enabled": False, "min_verdicts": 20}
    async with path2(tmp_path, store_url, rollback=rollback) as running:
        yield running


def one_step() -> Any:
    """A policy that takes the pair of the best expected score and is content."""
    return with_policy(plain_snapshot(), answer=5.0)


def three_steps() -> Any:
    """A policy that asks everybody."""
    return with_policy(plain_snapshot())


async def rated(graph: Path2, scores: dict[int, float], number: int, query: str) -> list[Report]:
    """Requests whose users say what the version that served them is worth."""
    reports = [(await graph.ask(query))[1] for _ in range(number)]
    assert await graph.outcomes.flush()
    for report in reports:
        score = scores[report.decision.policy_version]
        await add_feedback(graph.store, report.request_id, "local", score)
    return reports


def guard(graph: Path2) -> PolicyGuard:
    return PolicyGuard(graph.config, graph.replica._follower)


async def test_a_canary_gets_its_share_of_the_requests_by_their_ids(graph: Path2) -> None:
    main = await graph.promote(one_step())
    canary = await graph.promote(three_steps(), mode=Mode.CANARY, share=0.3)
    reports = [(await graph.ask("topic 1"))[1] for _ in range(100)]
    for report in reports:
        expected = canary if share_of(report.request_id) < 0.3 else main
        assert {d.policy_version for d in report.decisions} == {expected}
        assert len(report.steps) == (3 if expected == canary else 1)
    again = [(await graph.ask("topic 1", request_id=r.request_id))[1] for r in reports[:10]]
    assert [r.decision.policy_version for r in again] == [
        r.decision.policy_version for r in reports[:10]
    ]


def test_shares_are_spread_evenly() -> None:
    shares = [share_of(f"req_{number}") for number in range(10_000)]
    assert np.histogram(shares, bins=10, range=(0, 1))[0].min() > 900


async def test_promoting_the_canary_gives_it_everything(graph: Path2) -> None:
    await graph.promote(one_step())
    await graph.promote(three_steps(), mode=Mode.CANARY, share=0.1)
    full = await graph.promote(three_steps())
    await graph.until(lambda following: following.canary is None)
    reports = [(await graph.ask("topic 1"))[1] for _ in range(10)]
    assert {r.decision.policy_version for r in reports} == {full}


async def test_a_rollback_ends_the_canary_and_keeps_what_served(graph: Path2) -> None:
    await graph.promote(one_step())
    canary = await graph.promote(three_steps(), mode=Mode.CANARY, share=0.5)
    served = (await serving_policies(graph.store))[0].snapshot_id
    version, snapshot_id = await roll_back(graph.store)
    await graph.until(lambda f: f.policy_version == version and f.canary is None)
    assert snapshot_id == served
    assert (await list_policies(graph.store))[0].taken_back == canary


async def test_a_canary_that_cannot_be_loaded_changes_nothing(
    graph: Path2, caplog: pytest.LogCaptureFixture
) -> None:
    main = await graph.promote(one_step())
    await graph.promote(three_steps(), mode=Mode.SHADOW)
    newest = (await list_policies(graph.store))[0].snapshot_id
    assert newest is not None
    folder = graph.config.snapshots_path().folder / newest
    (folder / "snapshot.json").write_text("{}")
    with caplog.at_level(logging.ERROR):
        await publish(graph.store, newest, "a test", mode=Mode.CANARY, share=0.9)
        while "is refused" not in caplog.text:
            await asyncio.sleep(0.01)
    _, report = await graph.ask("topic 1")
    assert report.decision.policy_version == main


async def test_a_share_outside_its_range_is_refused(graph: Path2) -> None:
    for mode, share in ((Mode.CANARY, 0.0), (Mode.CANARY, 1.5), (Mode.SERVING, 0.5)):
        with pytest.raises(InvalidRequest):
            await publish(graph.store, None, "a test", mode=mode, share=share)


async def test_a_shadow_is_asked_and_not_obeyed(graph: Path2) -> None:
    main = await graph.promote(plain_snapshot())
    shadow = await graph.promote(three_steps(), mode=Mode.SHADOW)
    _, report = await graph.ask("topic 1", limits={"models": frozenset({"cheap", "strong"})})
    assert (report.decision.policy_version, len(report.steps)) == (main, 1)
    assert await graph.outcomes.flush()
    async with graph.store.begin() as connection:
        (row,) = (await connection.execute(select(ShadowRow))).mappings()
    assert (row["request_id"], row["policy_version"]) == (report.request_id, shadow)
    assert (row["action"], row["model_id"], row["path"]) == ("route", "strong", "policy")
    assert row["propensity"] == 1.0


async def test_a_later_publication_ends_the_trials_before_it(graph: Path2) -> None:
    await graph.promote(one_step())
    await graph.promote(three_steps(), mode=Mode.SHADOW)
    await graph.promote(three_steps(), mode=Mode.CANARY, share=0.5)
    assert [policy.mode for policy in await trial_policies(graph.store)] == ["canary", "shadow"]
    await graph.promote(one_step())
    await graph.until(lambda following: following.canary is None and following.shadow is None)
    assert await trial_policies(graph.store) == []


async def test_a_canary_that_users_like_less_is_taken_back(graph: Path2) -> None:
    main = await graph.promote(one_step())
    canary = await graph.promote(three_steps(), mode=Mode.CANARY, share=0.5)
    judge = guard(graph)
    assert await judge.check(graph.store) is None
    await rated(graph, {main: 0.9, canary: 0.1}, 80, "topic 1")
    version = await judge.check(graph.store)
    assert version == canary + 1
    newest = (await list_policies(graph.store))[0]
    assert (newest.mode, newest.taken_back) == (Mode.SERVING, canary)
    assert newest.snapshot_id == (await serving_policies(graph.store))[1].snapshot_id
    assert "taken back" in newest.reason
    assert await judge.check(graph.store) is None


async def test_a_policy_that_users_like_less_than_the_one_before_is_taken_back(
    graph: Path2,
) -> None:
    old = await graph.promote(one_step())
    await rated(graph, {old: 0.9}, 40, "topic 1")
    new = await graph.promote(three_steps())
    judge = guard(graph)
    await rated(graph, {new: 0.1}, 19, "topic 1")
    assert await judge.check(graph.store) is None  # too few to say
    await rated(graph, {new: 0.1}, 21, "topic 1")
    results = await asyncio.gather(*(guard(graph).check(graph.store) for _ in range(4)))
    assert sorted(results, key=str) == sorted([new + 1, None, None, None], key=str)
    await graph.until(lambda following: following.policy_version == new + 1)


async def test_a_policy_that_is_as_good_stays(graph: Path2) -> None:
    old = await graph.promote(one_step())
    await rated(graph, {old: 0.6}, 40, "topic 1")
    new = await graph.promote(one_step())
    await rated(graph, {new: 0.6}, 40, "topic 1")
    assert await guard(graph).check(graph.store) is None


async def test_the_guard_runs_in_the_router(tmp_path: Path) -> None:
    async with path2(tmp_path, rollback={"min_verdicts": 20, "interval_s": 0.05}) as graph:
        main = await graph.promote(one_step())
        canary = await graph.promote(three_steps(), mode=Mode.CANARY, share=0.5)
        await rated(graph, {main: 1.0, canary: 0.0}, 80, "topic 1")
        await graph.until(lambda following: following.policy_version == canary + 1)


def requests(owner: str, score: float, number: int) -> list[RatedRequest]:
    return [RatedRequest(score, 0.0, 0.0, owner)] * number


def in_turn(*given: list[RatedRequest]) -> list[RatedRequest]:
    """The verdicts of several owners, one after the other as long as they have any."""
    return [of for turn in zip_longest(*given) for of in turn if of is not None]


def others(score: float, number: int = 40, keys: int = 8) -> list[list[RatedRequest]]:
    return [requests(f"key_{key}", score, number) for key in range(keys)]


def judged(
    graph: Path2, of_newer: list[RatedRequest], of_older: list[RatedRequest]
) -> PolicyComparison | None:
    newer, older = (Policy(version, None, "a test", 0.0) for version in (2, 1))
    return guard(graph)._hold(newer, older, of_newer, of_older)


def test_a_key_counts_up_to_three_tenths_of_the_verdicts() -> None:
    alone = requests("much", 0.0, 500)
    assert len(counting(alone, 50)) == 13
    counted = counting(in_turn(alone, *others(0.5, 100)), 50)
    given = Counter(request.owner for request in counted)
    assert given["key_0"] == 100
    assert 0.25 < given["much"] / len(counted) <= 0.3
    everybody = requests(LOCAL_OWNER, 0.5, 500)
    assert counting(everybody, 50) == everybody


def test_one_key_does_not_take_a_policy_back(graph: Path2) -> None:
    """It likes what served before and nothing of the newer policy; the others see no difference."""
    newer = in_turn(requests("one", 0.0, 400), *others(0.7))
    older = in_turn(requests("one", 1.0, 400), *others(0.7))
    found = judged(graph, newer, older)
    assert found is not None
    assert not found.is_worse
    assert judged(graph, requests("one", 0.0, 400), requests("one", 1.0, 400)) is None


def test_one_key_does_not_keep_a_policy_that_the_others_like_less(graph: Path2) -> None:
    newer = in_turn(requests("one", 1.0, 400), *others(0.1))
    older = in_turn(requests("one", 0.0, 400), *others(0.9))
    found = judged(graph, newer, older)
    assert found is not None
    assert found.is_worse


def test_five_keys_take_a_policy_back_and_four_do_not(graph: Path2) -> None:
    for keys, is_back in ((4, False), (5, True)):
        found = judged(graph, in_turn(*others(0.1, keys=keys)), in_turn(*others(0.9, keys=keys)))
        assert (found is not None and found.is_worse) is is_back


def test_whatever_one_key_says_an_equal_policy_is_seldom_taken_back(graph: Path2) -> None:
    rng = np.random.default_rng(5)
    back = 0
    for _ in range(40):
        of_newer, of_older = (
            in_turn(
                requests("one", said, 60),
                *([RatedRequest(float(rng.random() < 0.6), 0.0, 0.0, f"key_{key}")
                   for _ in range(30)] for key in range(6)),
            )
            for said in (0.0, 1.0)
        )  # fmt: skip
        looks = (
            judged(graph, of_newer[:n], of_older[:n]) for n in range(60, len(of_newer) + 1, 30)
        )
        back += any(found is not None and found.is_worse for found in looks)
    assert back / 40 <= 0.05


def test_utility_weighs_score_and_dollars_by_each_requests_own_dial() -> None:
    costs = np.array([1e-5, 1e-3], np.float32)
    requests = [
        RatedRequest(1.0, 0.0, 1e-3, LOCAL_OWNER),
        RatedRequest(1.0, 0.5, 1e-5, LOCAL_OWNER),
        RatedRequest(1.0, 0.5, 1e-3, LOCAL_OWNER),
        RatedRequest(0.0, 1.0, 1.0, LOCAL_OWNER),
    ]
    np.testing.assert_allclose(live_utility(requests, costs), [1.0, 0.5, 0.0, -1.0], atol=1e-5)


@pytest.mark.parametrize("mean", [0.1, 0.5, 0.9])
def test_bounds_hold_at_all_times_at_once(mean: float) -> None:
    rng = np.random.default_rng(7)
    looks = np.unique(np.geomspace(10, 1000, 25).astype(int))
    wrong = 0
    for _ in range(200):
        values = (rng.random(1000) < mean).astype(float)
        wrong += any(
            not low <= mean <= high for low, high in (bounds(values[:n], 0.05) for n in looks)
        )
    assert wrong / 200 <= 0.1


def test_bounds_close_in_with_more_verdicts() -> None:
    values = (np.random.default_rng(1).random(5000) < 0.5).astype(float)
    widths = [np.subtract(*bounds(values[:n], 0.025)[::-1]) for n in (50, 500, 5000)]
    assert widths[0] > widths[1] > widths[2]
    assert widths[1] < 0.35
    assert widths[2] < 0.12
