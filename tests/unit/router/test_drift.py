"""When verdicts on a candidate leave what its profile lets expect."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from serve_app.router.rules.clusters import ClusterRule
from serve_app.schemas import LOCAL_OWNER, Drift
from serve_app.store import add_feedback
from tests.path2_fakes import CHEAP, path2, plain_snapshot
from tests.router_data import PAIRS, SKILL, make_snapshot, topics

MATH = PAIRS[1]


def drift_after(scores: list[float], owners: int = 0) -> Drift | None:
    """What verdicts on one pair, on questions of one topic, say of it."""
    rule = ClusterRule(make_snapshot())
    for number, score in enumerate(scores):
        owner = f"key_{number % owners}" if owners else LOCAL_OWNER
        rule.update(topics()[1], MATH, score, owner)
    return next((drift for drift in rule.drifts() if drift.pair == MATH), None)


def test_a_pair_without_verdicts_does_not_drift() -> None:
    assert drift_after([]) is None


def test_verdicts_that_go_as_expected_are_no_drift() -> None:
    rng = np.random.default_rng(0)
    drift = drift_after([float(rng.random() < SKILL[1, 1]) for _ in range(200)])
    assert drift is not None
    assert not drift.has_left


def test_a_pair_that_got_worse_leaves_its_posterior() -> None:
    drift = drift_after([0.0] * 40)
    assert drift is not None
    assert drift.has_left
    assert drift.deviations < 0
    assert drift.observed < drift.expected


def test_a_few_verdicts_are_not_enough_to_say_so() -> None:
    drift = drift_after([0.0] * 5)
    assert drift is not None
    assert drift.deviations == 0.0


def test_one_key_alone_makes_nothing_drift() -> None:
    drift = drift_after([0.0] * 200, owners=1)
    assert drift is None


def test_many_keys_that_agree_are_heard() -> None:
    drift = drift_after([0.0] * 200, owners=10)
    assert drift is not None
    assert drift.has_left


async def test_the_gateway_hears_of_it_from_the_router(tmp_path: Path) -> None:
    async with path2(tmp_path) as deployment:
        await deployment.promote(plain_snapshot())
        assert await deployment.orchestrator.drifts() == ()
        for _ in range(12):
            _, report = await deployment.ask("topic 0")
            await deployment.outcomes.flush(60)
            await add_feedback(deployment.store, report.request_id, LOCAL_OWNER, 0.0)
        await deployment.until(lambda following: following.verdicts == 12)
        drifts = {drift.pair: drift for drift in await deployment.orchestrator.drifts()}
    assert drifts[CHEAP].observed < drifts[CHEAP].expected
