"""Fitting: it finds what is there, shrinks what it cannot know, and is the same every time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from scipy import sparse  # type: ignore[import-untyped]

from rl.fit import estimators
from rl.fit.fit import fit
from rl.fit.pareto import aiq_log, sweep_choices
from rl.profile.outcomes import Outcomes
from serve_app.errors import ConfigError
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.snapshots.snapshot import RouterSnapshot, load_snapshot, save_snapshot
from tests.router_data import COSTS_USD, LIMITS, PAIRS, QUICK, SKILL, decide, make_outcomes, topics


def test_the_fitted_router_finds_the_best_pair_of_each_topic() -> None:
    outcomes, _ = make_outcomes(600)
    rule = ClusterRule(fit(outcomes, QUICK))
    for topic, query in enumerate(topics()):
        np.testing.assert_allclose(rule.qualities(query), SKILL[topic], atol=0.1)
        utility = 0.9 * SKILL[topic] - 0.1 * np.array([0.0, 0.5, 1.0])
        decision = decide(rule, query, replace(LIMITS, alpha=0.1), PAIRS, 1)
        assert decision.pair == PAIRS[int(utility.argmax())]


def test_a_pair_is_judged_on_the_queries_that_it_was_asked_alone() -> None:
    rng = np.random.default_rng(0)
    features = rng.random((60, 5), np.float32)
    scores = rng.random((60, 3)) - 2.0
    is_seen = np.ones((60, 3), bool)
    is_seen[20:, 1] = False
    is_seen[:, 2] = False
    between = np.eye(5, dtype=np.float32)
    both = estimators.heads(features, sparse.csr_matrix(scores * is_seen), between, [0.5, 2.0])
    for penalty, weights in both.items():
        for pair, rows in enumerate((60, 20, 0)):
            seen = features[:rows]
            alone = np.linalg.solve(
                seen.T @ seen + penalty * np.eye(5), seen.T @ scores[:rows, pair]
            )
            np.testing.assert_allclose(weights[:, pair], alone, rtol=1e-2, atol=1e-4)


def test_routing_beats_every_single_pair_on_queries_it_never_saw() -> None:
    rule = ClusterRule(fit(make_outcomes(600)[0], QUICK))
    held_out, topic = make_outcomes(900, seed=9)
    chosen = [rule.qualities(query).argmax() for query in held_out.embeddings]
    routed = SKILL[topic, chosen].mean()
    assert routed > SKILL[topic].mean(axis=0).max() + 0.05
    assert routed > SKILL[topic].max(axis=1).mean() - 0.02


def test_the_same_outcomes_give_the_same_snapshot() -> None:
    outcomes, _ = make_outcomes(300)
    first, second = fit(outcomes, QUICK), fit(outcomes, QUICK)
    for name in ("centroids", "score_alpha", "head_in", "gate_weights", "distance_quantiles"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert first.metadata == second.metadata


def test_a_fitted_snapshot_decides_the_same_after_it_was_saved(tmp_path: Path) -> None:
    folder = tmp_path / "s1"
    snapshot = fit(make_outcomes(300)[0], QUICK, version=4)
    save_snapshot(snapshot, folder)
    before, after = ClusterRule(snapshot), ClusterRule(load_snapshot(folder))
    for query in topics():
        assert decide(before, query, LIMITS, PAIRS, 1) == decide(after, query, LIMITS, PAIRS, 1)


def test_a_sparse_log_with_one_pair_per_query_is_enough() -> None:
    outcomes, _ = make_outcomes(3000, coverage=0.34)
    rule = ClusterRule(fit(outcomes, QUICK))
    for topic, query in enumerate(topics()):
        np.testing.assert_allclose(rule.qualities(query), SKILL[topic], atol=0.2)
        assert rule.qualities(query).argmax() == SKILL[topic].argmax() or topic == 0


def test_a_pair_hardly_seen_stays_near_its_prior() -> None:
    outcomes, _ = make_outcomes(400)
    keep = (outcomes.pair_index != 1) | (np.arange(len(outcomes.pair_index)) < 3)
    rare = _subset(outcomes, keep)
    seen = fit(rare, QUICK)
    mean = seen.pair_alpha / (seen.pair_alpha + seen.pair_beta)
    others = outcomes.score[outcomes.pair_index != 1].mean()
    assert mean[1] == pytest.approx(others, abs=0.2)
    spread = (seen.score_alpha / (seen.score_alpha + seen.score_beta))[:, 1]
    assert np.ptp(spread) < 0.1


def test_a_pair_never_seen_takes_the_descriptors_prediction() -> None:
    outcomes, _ = make_outcomes(400)
    blind = _subset(outcomes, outcomes.pair_index != 1)
    strength = np.array([[0.4], [0.6], [0.8]], np.float32)
    mean = [
        (snapshot.pair_alpha / (snapshot.pair_alpha + snapshot.pair_beta))[1]
        for snapshot in (fit(blind, QUICK), fit(blind, QUICK, descriptors=strength))
    ]
    means = [outcomes.score[outcomes.pair_index == pair].mean() for pair in (0, 2)]
    assert mean[0] == pytest.approx(np.mean(means), abs=0.02)
    assert means[0] < mean[1] < means[1]


def test_tables_hold_tokens_costs_and_examples() -> None:
    outcomes, _ = make_outcomes(300)
    snapshot = fit(outcomes, QUICK)
    np.testing.assert_allclose(
        snapshot.costs_usd, np.tile(COSTS_USD, (len(snapshot.tokens), 1)), rtol=1e-4
    )
    np.testing.assert_allclose(snapshot.tokens, 100, rtol=1e-4)
    assert (snapshot.seconds == 0).all()  # unknown
    closest = (topics()[1] @ snapshot.centroids.T).argmax()
    assert set(snapshot.examples[closest]) == {"topic 1"}
    assert snapshot.metadata["num_outcomes"] == 900


def test_examples_are_cut_and_only_of_what_may_be_shown() -> None:
    outcomes, _ = make_outcomes(300)
    texts = tuple("" if number % 3 else "long " * 1000 for number in range(300))
    snapshot = fit(replace(outcomes, queries=texts), QUICK)
    shown = {text for texts in snapshot.examples for text in texts}
    assert {(len(text), text[:5], text[-1]) for text in shown} == {(200, "long ", "…")}
    nothing = fit(replace(outcomes, queries=("",) * 300), QUICK)
    assert not any(nothing.examples)


@pytest.mark.parametrize("number", [1, 2, 7, 30])
def test_a_handful_of_questions_is_fitted_too(number: int) -> None:
    snapshot = fit(make_outcomes(number)[0], QUICK)
    assert isinstance(snapshot, RouterSnapshot)
    assert np.isfinite(ClusterRule(snapshot).qualities(topics()[0])).all()


def test_one_pair_without_prices_is_fitted_too() -> None:
    outcomes, _ = make_outcomes(60)
    alone = _subset(outcomes, outcomes.pair_index == 0)
    free = replace(alone, pairs=PAIRS[:1], costs_usd=np.full(len(alone.score), np.nan, np.float32))
    assert decide(ClusterRule(fit(free, QUICK)), topics()[0], LIMITS, PAIRS[:1], 1).pair == PAIRS[0]


def test_an_arrow_table_gives_the_same_outcomes() -> None:
    outcomes, _ = make_outcomes(20)
    table = pa.table(
        {
            "query_index": outcomes.query_index,
            "pair_index": outcomes.pair_index,
            "score": outcomes.score,
            "cost_usd": outcomes.costs_usd,
        }
    )
    read = Outcomes.from_table(table, outcomes.embeddings, PAIRS, "test-encoder")
    np.testing.assert_array_equal(read.score, outcomes.score)
    np.testing.assert_array_equal(read.costs_usd, outcomes.costs_usd)
    assert np.isnan(read.tokens).all()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("score", 1.5, "score"),
        ("score", np.nan, "score"),
        ("pair_index", 3, "pair_index"),
        ("query_index", -1, "query_index"),
    ],
)
def test_outcomes_that_do_not_fit_are_refused(name: str, value: float, message: str) -> None:
    outcomes, _ = make_outcomes(10)
    column = getattr(outcomes, name).copy()
    column[4] = value
    with pytest.raises(ConfigError, match=message):
        replace(outcomes, **{name: column})


def test_the_area_is_the_mean_best_score_over_log_cost() -> None:
    axis = np.array([1.0, 100.0])
    half = aiq_log(np.array([0.4, 0.8]), np.array([1.0, 10.0]), axis)
    assert half == pytest.approx(0.6, abs=0.002)
    assert aiq_log(np.array([0.4, 0.3]), np.array([1.0, 10.0]), axis) == pytest.approx(0.4)
    assert aiq_log(np.array([0.8]), np.array([10.0]), axis) == pytest.approx(0.4, abs=0.002)
    assert aiq_log(np.array([0.5, 0.7]), np.array([1.0, 1.0]), np.ones(2)) == 0.7


def test_the_sweep_goes_from_quality_to_price_and_never_takes_a_forbidden_pair() -> None:
    quality = np.array([[0.2, 0.9, -np.inf], [0.8, 0.9, 1.0]], np.float32)
    cost = np.array([0.0, 1.0, 0.5], np.float32)
    choices = sweep_choices(quality, cost, np.array([0.0, 0.2, 1.0]))
    np.testing.assert_array_equal(choices, [[1, 2], [1, 2], [0, 0]])


def test_low_rank_factors_keep_the_product() -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((30, 3)) @ rng.standard_normal((3, 20))
    left, right = estimators.factorise(weights, max_rank=5)
    assert left.shape == (30, 5)
    np.testing.assert_allclose(left @ right, weights, atol=1e-4)


def test_the_logistic_finds_the_weights_that_made_the_data() -> None:
    rng = np.random.default_rng(0)
    features = np.stack([np.ones(4000), rng.standard_normal(4000)], axis=1)
    is_right = rng.random(4000) < 1 / (1 + np.exp(-(features @ [0.5, -1.5])))
    np.testing.assert_allclose(estimators.logistic(features, is_right), [0.5, -1.5], atol=0.15)


def test_relative_distances_leave_the_query_out_of_its_own_cluster() -> None:
    queries = np.eye(4, dtype=np.float32)
    centroids = np.stack([queries[:2].mean(axis=0), queries[2:].mean(axis=0)])
    # Alone, each query's cluster is the other member, at squared distance 2; the mean is 1.
    np.testing.assert_allclose(estimators.relative_distances(queries, centroids, [2]), 1.0)
    hundred = np.repeat(queries, 25, axis=0)
    expected = 0.5 * (50 / 49) ** 2
    np.testing.assert_allclose(
        estimators.relative_distances(hundred, centroids, [2]), expected, rtol=1e-5
    )


def test_caution_is_kept_where_it_costs_nothing_and_dropped_where_it_does() -> None:
    skill = np.array([[0.95, 0.1, 0.1], [0.3, 0.9, 0.1], [0.3, 0.1, 0.9]])
    outcomes, _ = make_outcomes(600, skill=skill)
    assert fit(outcomes, QUICK).caution == max(QUICK.cautions)
    assert fit(outcomes, replace(QUICK, cautions=(1e3, 0.5))).caution == 0.5


def test_settings_without_a_head_use_clusters_alone() -> None:
    snapshot = fit(make_outcomes(300)[0], replace(QUICK, head_weights=(0.0,)))
    assert snapshot.head_weight == 0.0
    assert sum(scale.weight for scale in snapshot.scales) == pytest.approx(1.0)
    head = fit(make_outcomes(300)[0], replace(QUICK, head_weights=(1.0,)))
    assert head.head_weight == 1.0
    assert ClusterRule(head).qualities(topics()[1]).argmax() == SKILL[1].argmax()


def _subset(outcomes: Outcomes, keep: np.ndarray) -> Outcomes:
    return replace(
        outcomes,
        **{
            name: getattr(outcomes, name)[keep]
            for name in ("query_index", "pair_index", "score", "tokens", "seconds", "costs_usd")
        },
    )
