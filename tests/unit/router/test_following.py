"""What a router replica serves with: policies of a real store and snapshots on disk, and verdicts
that every replica learns."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from serve_app.config import AtlasConfig
from serve_app.router.rules.beliefs import Prior
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.cold_start import ColdStartRule, PairCard
from serve_app.router.serving import follower as following
from serve_app.router.serving.follower import PolicyFollower
from serve_app.router.snapshots.build_rule import Cards
from serve_app.router.snapshots.library import SnapshotLibrary
from serve_app.router.snapshots.snapshot import (
    LEARNED_UNTIL,
    TENSORS_FILE,
    RouterSnapshot,
    save_snapshot,
)
from serve_app.schemas import LOCAL_OWNER, Candidate, DecidedBy, Decision, Pair, Report, Step, Usage
from serve_app.store import OutcomeLog, Store, add_feedback, add_snapshot, publish, read_verdicts
from tests.router_data import COSTS_USD, LIMITS, PAIRS, decide, make_snapshot, topics

CHEAP, MATH, STRONG = PAIRS
MATHS = topics()[1]


def configuration(folder: Path, store_url: str, **router: object) -> AtlasConfig:
    models = [
        {
            "type": "remote",
            "model_id": name,
            "base_url": "http://127.0.0.1:1/v1",
            "remote_model": "x",
            "tools": tools,
        }
        for name, tools in (("cheap", ["none"]), ("math", ["calculator"]), ("strong", ["none"]))
    ]
    return AtlasConfig.model_validate(
        {
            "models": models,
            "tools": [{"type": "calculator", "tool_id": "calculator"}],
            "embedder": {"model": "test-encoder"},
            "router": router,
            "data_dir": str(folder),
            "store": {"url": store_url},
        }
    )


@pytest.fixture(autouse=True)
def own_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session's graph may have set another one."""
    monkeypatch.setenv("ATLAS_DATA_DIR", str(tmp_path))


@pytest.fixture
def config(tmp_path: Path, store_url: str) -> AtlasConfig:
    return configuration(tmp_path, store_url)


@pytest.fixture
async def store(config: AtlasConfig) -> AsyncIterator[Store]:
    opened = await Store.open(config.store_url())
    yield opened
    await opened.close()


_followers: list[PolicyFollower] = []


@pytest.fixture(autouse=True)
async def closed_stores() -> AsyncIterator[None]:
    """Close what the test's followers opened, while its event loop runs."""
    yield
    for follower in _followers:
        if follower.store is not None:
            await follower.store.close()
    _followers.clear()


def make_follower(config: AtlasConfig) -> PolicyFollower:
    cards = tuple(PairCard(pair, (str(pair),), 1e-4) for pair in PAIRS)
    cold_start = ColdStartRule(
        cards, lambda texts: np.eye(len(MATHS), dtype=np.float32)[: len(texts)]
    )
    follower = PolicyFollower(
        config, Cards(cold_start, Prior(PAIRS, COSTS_USD, cold_start.qualities))
    )
    _followers.append(follower)
    return follower


async def promote(config: AtlasConfig, store: Store, snapshot: RouterSnapshot) -> int:
    snapshot_id = SnapshotLibrary(config.snapshots_path()).add(snapshot)
    await add_snapshot(store, snapshot_id, snapshot.metadata)
    version = await publish(store, snapshot_id, "a test")
    assert version is not None
    return version


async def rate(
    store: Store,
    number: int,
    pair: Pair,
    score: float,
    owner: str = LOCAL_OWNER,
    path: DecidedBy = DecidedBy.CLUSTERS,
) -> None:
    """A finished maths request, and what its owner says of it."""
    request_id = f"req_{number}"
    decision = Decision((Candidate(pair, 1, 1, 0),), path, 1.0, 1.0, 1, 1)
    step = Step(pair, path, 1.0, Usage(), 0.1)
    embedding = MATHS.astype("<f4").tobytes()
    log = OutcomeLog(store, flush_interval_s=0.001)
    log.record(Report(request_id, decision, (step,), Usage(), 0.1, "query", embedding, owner))
    await log.close()
    await add_feedback(store, request_id, owner, score)


def chosen(follower: PolicyFollower) -> Pair:
    return decide(follower.rule, MATHS, LIMITS, PAIRS, pool_version=1).pair


async def test_the_cold_start_rule_serves_until_a_policy_is_published(
    config: AtlasConfig, store: Store
) -> None:
    follower = make_follower(config)
    await follower.refresh()
    before = type(follower.rule)
    version = await promote(config, store, make_snapshot())
    await follower.refresh()
    assert (before, type(follower.rule)) == (ColdStartRule, ClusterRule)
    assert follower.policy_version == version


async def test_the_cold_start_rule_can_be_published_again(
    config: AtlasConfig, store: Store
) -> None:
    follower = make_follower(config)
    await promote(config, store, make_snapshot())
    await follower.refresh()
    version = await publish(store, None, "back")
    await follower.refresh()
    assert isinstance(follower.rule, ColdStartRule)
    assert follower.policy_version == version


async def test_a_damaged_snapshot_is_refused_and_the_policy_before_it_goes_on(
    config: AtlasConfig, store: Store
) -> None:
    follower = make_follower(config)
    sound = await promote(config, store, make_snapshot())
    await follower.refresh()
    await promote(config, store, replace(make_snapshot(), head_gamma=2.0))
    for folder in config.snapshots_path().folder.iterdir():
        tensors = folder / TENSORS_FILE
        tensors.write_bytes(tensors.read_bytes()[:-1])
    await follower.refresh()
    assert follower.policy_version == sound
    assert "damaged" in str(follower.state().refused)


async def test_a_replica_that_starts_takes_the_last_sound_policy(
    config: AtlasConfig, store: Store
) -> None:
    sound = await promote(config, store, make_snapshot())
    await promote(config, store, replace(make_snapshot(), encoder="another"))
    follower = make_follower(config)
    await follower.refresh()
    assert follower.policy_version == sound
    assert "another" in str(follower.state().refused)


async def test_a_configured_snapshot_serves_once_and_does_not_undo_a_later_policy(
    tmp_path: Path, store_url: str
) -> None:
    save_snapshot(make_snapshot(), tmp_path / "shipped")
    config = configuration(tmp_path, store_url, snapshot=str(tmp_path / "shipped"))
    first, second = make_follower(config), make_follower(config)
    await first.refresh()
    await second.refresh()
    store = await Store.open(config.store_url())
    later = await promote(config, store, replace(make_snapshot(), head_gamma=2.0))
    await store.close()
    restarted = make_follower(config)
    await restarted.refresh()
    assert (first.policy_version, second.policy_version) == (1, 1)
    assert restarted.policy_version == later == 2


async def test_a_degraded_pair_is_left_within_50_verdicts(
    config: AtlasConfig, store: Store
) -> None:
    await promote(config, store, make_snapshot())
    follower = make_follower(config)
    await follower.refresh()
    picked = []
    for number in range(50):
        picked.append(chosen(follower))
        await rate(store, number, picked[-1], 0.0 if picked[-1] == MATH else 0.6)
        await follower.refresh()
    assert picked[0] == MATH
    assert set(picked[-10:]) == {STRONG}


async def test_verdicts_survive_a_restart_and_reach_every_replica(
    config: AtlasConfig, store: Store
) -> None:
    await promote(config, store, make_snapshot())
    first, second = make_follower(config), make_follower(config)
    await first.refresh()
    await second.refresh()
    for number in range(30):
        await rate(store, number, MATH, 0.0)
        await first.refresh()
    await second.refresh()
    restarted = make_follower(config)
    await restarted.refresh()
    rules = [follower.rule for follower in (first, second, restarted)]
    qualities = [rule.qualities(MATHS) for rule in rules if isinstance(rule, ClusterRule)]
    assert qualities[0][1] < 0.6
    np.testing.assert_allclose(qualities[1], qualities[0], atol=1e-6)
    np.testing.assert_allclose(qualities[2], qualities[0], atol=1e-6)


async def test_a_pair_that_five_keys_find_bad_is_left_within_50_verdicts(
    config: AtlasConfig, store: Store
) -> None:
    await promote(config, store, make_snapshot())
    follower = make_follower(config)
    await follower.refresh()
    picked = []
    for number in range(50):
        picked.append(chosen(follower))
        score = 0.0 if picked[-1] == MATH else 0.6
        await rate(store, number, picked[-1], score, f"key_{number % 5}")
        await follower.refresh()
    assert picked[0] == MATH
    assert set(picked[-10:]) == {STRONG}


async def test_one_key_changes_no_decision_however_often_it_rates(
    config: AtlasConfig, store: Store
) -> None:
    await promote(config, store, make_snapshot())
    follower, untouched = make_follower(config), make_snapshot()
    for number in range(60):
        await rate(store, number, MATH, float(number % 7 == 0), "key")
    await follower.refresh()
    assert follower.state().verdicts == 60
    assert isinstance(follower.rule, ClusterRule)
    for topic in topics():
        np.testing.assert_array_equal(
            follower.rule.qualities(topic), ClusterRule(untouched).qualities(topic)
        )


async def test_verdicts_on_pinned_requests_teach_nothing(config: AtlasConfig, store: Store) -> None:
    await promote(config, store, make_snapshot())
    for number in range(40):
        owner = LOCAL_OWNER if number % 2 else f"key_{number}"
        await rate(store, number, MATH, 0.0, owner, DecidedBy.PINNED)
    follower = make_follower(config)
    await follower.refresh()
    assert follower.state().verdicts == 0
    assert await read_verdicts(store, [f"req_{number}" for number in range(40)]) == []
    assert chosen(follower) == MATH


async def test_a_key_that_rates_without_end_does_not_crowd_out_the_others(
    config: AtlasConfig, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_MAX_REPLAYED", 40)
    monkeypatch.setattr(following, "_REPLAYED_PER_KEY", 10)
    await promote(config, store, make_snapshot())
    for number in range(30):
        await rate(store, number, MATH, 0.0, f"key_{number % 6}")
    before = make_follower(config)
    await before.refresh()
    for number in range(30, 100):
        await rate(store, number, MATH, 1.0, "talker")
    after = make_follower(config)
    await after.refresh()
    assert after.state().verdicts == 40
    assert chosen(before) == chosen(after) == STRONG


async def test_replicas_weigh_the_verdicts_of_many_keys_alike(
    config: AtlasConfig, store: Store
) -> None:
    await promote(config, store, make_snapshot())
    first = make_follower(config)
    await first.refresh()
    rng = np.random.default_rng(3)
    for number in range(60):
        pair, owner = PAIRS[rng.integers(3)], f"key_{rng.integers(7)}"
        await rate(store, number, pair, float(rng.integers(2)), owner)
        await first.refresh()
    restarted = make_follower(config)
    await restarted.refresh()
    assert isinstance(first.rule, ClusterRule)
    assert isinstance(restarted.rule, ClusterRule)
    for topic in topics():
        expected = restarted.rule.qualities(topic)
        np.testing.assert_allclose(first.rule.qualities(topic), expected, atol=1e-6)
    assert np.abs(restarted.rule.qualities(MATHS) - make_qualities()).max() > 0.05


def make_qualities() -> NDArray[np.float32]:
    """What the snapshot alone expects of a maths question."""
    return ClusterRule(make_snapshot()).qualities(MATHS)


async def test_verdicts_that_were_fitted_are_not_learned_again(
    config: AtlasConfig, store: Store
) -> None:
    for number in range(20):
        await rate(store, number, MATH, 0.0)
    fitted = replace(make_snapshot(), metadata={LEARNED_UNTIL: 4e9})
    await promote(config, store, fitted)
    follower = make_follower(config)
    await follower.refresh()
    assert follower.state().verdicts == 0


async def test_a_store_that_is_away_changes_nothing(tmp_path: Path) -> None:
    config = configuration(tmp_path, f"sqlite+aiosqlite:///{tmp_path}/atlas.db")
    store = await Store.open(config.store_url())
    version = await promote(config, store, make_snapshot())
    await store.close()
    follower = make_follower(config)
    await follower.refresh()
    database = tmp_path / "atlas.db"
    for file in tmp_path.glob("atlas.db*"):
        file.unlink()
    database.mkdir()
    await follower.refresh()
    assert follower.policy_version == version
    assert chosen(follower) == MATH
