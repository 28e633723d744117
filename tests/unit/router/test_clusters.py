"""Path 1 as it serves: the utility, the limits, unknown pairs, feedback, exploration, the cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from serve_app.errors import NoCandidate, SnapshotError
from serve_app.router.rules.beliefs import Prior
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.snapshots.snapshot import RouterSnapshot, Scale
from serve_app.schemas import LOCAL_OWNER, DecidedBy, Limits, Pair
from tests.router_data import COSTS_USD, DIM, LIMITS, PAIRS, SKILL, decide, make_snapshot, topics

CHEAP, MATH, STRONG = PAIRS
NEW = Pair("new", "none")


def far_away() -> NDArray[np.float32]:
    return np.asarray(np.eye(DIM)[10], np.float32)


def new_pair_prior(likeness: float = 0.5) -> Prior:
    return Prior(
        pairs=(STRONG, NEW),
        costs_usd=np.array([1.0, 1e-4], np.float32),
        similarities=lambda embedding: np.array([0.5, likeness], np.float32),
    )


def test_each_topic_gets_its_best_pair_and_the_utility_is_as_stated() -> None:
    rule = ClusterRule(make_snapshot())
    limits = replace(LIMITS, alpha=0.25)
    for topic, query in enumerate(topics()):
        decision = decide(rule, query, limits, PAIRS, pool_version=7)
        utility = 0.75 * SKILL[topic] - 0.25 * np.array([0.0, 0.5, 1.0])
        assert decision.pair == PAIRS[int(utility.argmax())]
        assert decision.path is DecidedBy.CLUSTERS
        assert (decision.policy_version, decision.pool_version) == (3, 7)
        assert sorted(PAIRS) == sorted(candidate.pair for candidate in decision.candidates)
        for candidate in decision.candidates:
            position = PAIRS.index(candidate.pair)
            assert candidate.utility == pytest.approx(utility[position], abs=1e-5)
            assert candidate.quality == pytest.approx(SKILL[topic, position], abs=1e-5)
        assert 0 <= decision.confidence <= 1


def test_alpha_moves_the_choice_from_the_best_to_the_cheapest() -> None:
    rule = ClusterRule(make_snapshot())
    assert decide(rule, topics()[0], LIMITS, PAIRS, 1).pair == STRONG
    assert decide(rule, topics()[0], replace(LIMITS, alpha=0.1), PAIRS, 1).pair == CHEAP
    for query in topics():
        assert decide(rule, query, replace(LIMITS, alpha=1.0), PAIRS, 1).pair == CHEAP


@pytest.mark.parametrize(
    ("limits", "allowed"),
    [
        (replace(LIMITS, models=frozenset({"cheap", "math"})), {CHEAP, MATH}),
        (replace(LIMITS, tools=frozenset({"none"})), {CHEAP, STRONG}),
        (replace(LIMITS, max_cost_usd=2e-4), {CHEAP, MATH}),
    ],
)
def test_limits_remove_candidates(limits: Limits, allowed: set[Pair]) -> None:
    decision = decide(ClusterRule(make_snapshot()), topics()[2], limits, PAIRS, 1)
    assert {candidate.pair for candidate in decision.candidates} == allowed


SECONDS = np.array([[1.0, 3.0, 9.0], [1.0, 30.0, 9.0], [8.0, 7.0, 9.0]], np.float32)
"""(topics, pairs) that a run takes."""


@pytest.mark.parametrize(
    ("topic", "deadline_s", "allowed"),
    [
        (0, 60.0, {CHEAP, MATH, STRONG}),
        (0, 5.0, {CHEAP, MATH}),
        (1, 10.0, {CHEAP, STRONG}),
        (1, 1.5, {CHEAP}),
    ],
)
def test_what_is_expected_to_miss_the_deadline_is_no_candidate(
    topic: int, deadline_s: float, allowed: set[Pair]
) -> None:
    rule = ClusterRule(replace(make_snapshot(), seconds=SECONDS))
    decision = decide(rule, topics()[topic], replace(LIMITS, deadline_s=deadline_s), PAIRS)
    assert {candidate.pair for candidate in decision.candidates} == allowed


def test_where_nothing_is_in_time_the_fastest_is_tried() -> None:
    rule = ClusterRule(replace(make_snapshot(), seconds=SECONDS))
    hurried = replace(LIMITS, deadline_s=0.5)
    fastest = [decide(rule, query, hurried, PAIRS).candidates for query in topics()]
    assert [[c.pair for c in candidates] for candidates in fastest] == [[CHEAP], [CHEAP], [MATH]]


def test_the_fastest_is_sought_among_what_the_other_limits_admit() -> None:
    rule = ClusterRule(replace(make_snapshot(), seconds=SECONDS))
    hurried = replace(LIMITS, deadline_s=0.5, models=frozenset({"math", "strong"}))
    assert decide(rule, topics()[0], hurried, PAIRS).pair == MATH
    with pytest.raises(NoCandidate):
        decide(rule, topics()[0], replace(hurried, max_cost_usd=1e-9), PAIRS)


def test_a_pair_whose_seconds_nobody_knows_is_in_time() -> None:
    rule = ClusterRule(replace(make_snapshot(), seconds=SECONDS), new_pair_prior())
    hurried = replace(LIMITS, deadline_s=0.5)
    assert decide(rule, topics()[0], hurried, (*PAIRS, NEW)).pair == NEW


def test_between_clusters_the_seconds_are_shared_like_the_scores() -> None:
    shared = replace(make_snapshot(), seconds=SECONDS, scales=(Scale(3, 2, 1.0),), temperature=0.5)
    between = ((topics()[0] + topics()[1]) / np.sqrt(2)).astype(np.float32)
    named = [
        {c.pair for c in decide(ClusterRule(shared), between, replace(LIMITS, deadline_s=s), PAIRS)
         .candidates}
        for s in (16.4, 16.6)  # MATH takes 3 seconds in the one and 30 in the other
    ]  # fmt: skip
    assert named == [{CHEAP, STRONG}, {CHEAP, MATH, STRONG}]


def test_a_pair_that_does_not_answer_now_is_no_candidate() -> None:
    rule = ClusterRule(make_snapshot())
    assert decide(rule, topics()[0], LIMITS, PAIRS, 1).pair == STRONG
    assert decide(rule, topics()[0], LIMITS, (CHEAP, MATH), 2).pair == CHEAP
    assert decide(rule, topics()[0], LIMITS, PAIRS, 3).pair == STRONG
    with pytest.raises(NoCandidate):
        decide(rule, topics()[0], LIMITS, (), 4)
    with pytest.raises(NoCandidate):
        decide(rule, topics()[0], replace(LIMITS, models=frozenset()), PAIRS, 5)


def test_a_query_between_clusters_shares_them_by_distance() -> None:
    shared = replace(make_snapshot(), scales=(Scale(3, 2, 1.0),), temperature=0.5)
    between = (topics()[0] + topics()[1]) / np.sqrt(2)
    np.testing.assert_allclose(
        ClusterRule(shared).qualities(between.astype(np.float32)),
        SKILL[:2].mean(axis=0),
        atol=1e-5,
    )


def test_scales_are_blended_by_their_weights() -> None:
    snapshot = make_snapshot()
    coarse_mean = SKILL.mean(axis=0, keepdims=True)
    grow = {
        name: np.concatenate([getattr(snapshot, name)[:1], getattr(snapshot, name)])
        for name in ("tokens", "seconds", "costs_usd")
    }
    both = replace(
        snapshot,
        centroids=np.concatenate([topics().mean(axis=0, keepdims=True), topics()]),
        scales=(Scale(1, 1, 0.25), Scale(3, 1, 0.75)),
        score_alpha=(50 * np.concatenate([coarse_mean, SKILL])).astype(np.float32),
        score_beta=(50 * (1 - np.concatenate([coarse_mean, SKILL]))).astype(np.float32),
        examples=((), *snapshot.examples),
        **grow,
    )
    np.testing.assert_allclose(
        ClusterRule(both).qualities(topics()[1]), 0.25 * coarse_mean[0] + 0.75 * SKILL[1], atol=1e-5
    )


def test_the_head_adds_to_the_pairs_means() -> None:
    snapshot = make_snapshot()
    head_in = np.array([[0.1, 0], [0, 0.2], [0, 0]], np.float32)
    head_out = np.array([[1, 0, 0], [0, 0, -1]], np.float32)
    with_head = replace(snapshot, head_in=head_in, head_out=head_out, head_weight=0.5)
    kernel = np.exp(-np.array([0.0, 2.0, 2.0]))  # squared distance 0 to itself, 2 to the others
    expected = 0.5 * SKILL[0] + 0.5 * (SKILL.mean(axis=0) + kernel @ head_in @ head_out)
    np.testing.assert_allclose(ClusterRule(with_head).qualities(topics()[0]), expected, atol=1e-5)


def test_outside_the_profile_it_says_so_and_takes_the_pair_that_is_best_overall() -> None:
    rule = ClusterRule(make_snapshot())
    decision = decide(rule, far_away(), LIMITS, PAIRS, 1)
    assert decision.path is DecidedBy.OUT_OF_DISTRIBUTION
    assert decision.pair == STRONG
    assert decision.candidates[0].quality == pytest.approx(SKILL[:, 2].mean(), abs=1e-5)
    assert (
        decide(ClusterRule(make_snapshot(), fallback=MATH), far_away(), LIMITS, PAIRS, 1).pair
        == MATH
    )
    cheap_only = decide(
        ClusterRule(make_snapshot(), fallback=MATH), far_away(), LIMITS, (CHEAP, STRONG), 1
    )
    assert cheap_only.pair == STRONG


def test_a_decision_names_its_cluster_and_none_outside_the_profile() -> None:
    rule = ClusterRule(make_snapshot())
    found = [decide(rule, query, LIMITS, PAIRS).cluster for query in (*topics(), far_away())]
    assert found == [0, 1, 2, None]


def test_a_pair_the_snapshot_does_not_know_is_ranked_by_its_prior() -> None:
    prior = new_pair_prior(likeness=0.9)
    rule = ClusterRule(make_snapshot(), prior)
    decision = decide(rule, topics()[1], LIMITS, (*PAIRS, NEW), 1)
    quality = {candidate.pair: candidate.quality for candidate in decision.candidates}
    assert quality[NEW] == pytest.approx(0.4 + 0.3 * (0.9 - 0.7), abs=1e-5)
    assert quality[MATH] == pytest.approx(SKILL[1, 1], abs=1e-5)
    without_prior = decide(ClusterRule(make_snapshot()), topics()[1], LIMITS, (*PAIRS, NEW), 1)
    assert NEW not in {candidate.pair for candidate in without_prior.candidates}


def test_descriptors_predict_a_new_pairs_mean_and_must_fit_the_snapshot() -> None:
    snapshot = replace(make_snapshot(), prior_weights=np.array([0.1], np.float32))
    described = replace(new_pair_prior(), descriptors=np.array([[0.0], [2.0]], np.float32))
    quality = ClusterRule(snapshot, described).qualities(topics()[0])
    assert quality[3] == pytest.approx(0.4 + 0.2, abs=1e-5)
    longer = replace(make_snapshot(), prior_weights=np.array([0.1, 0.2], np.float32))
    with pytest.raises(SnapshotError, match="described by 1 numbers"):
        ClusterRule(longer, described)


def test_the_interval_of_a_quality_narrows_with_what_was_seen() -> None:
    decision = decide(
        ClusterRule(make_snapshot(), new_pair_prior()), topics()[1], LIMITS, (*PAIRS, NEW), 1
    )
    width = {c.pair: c.high - c.low for c in decision.candidates}
    assert all(c.low <= c.quality <= c.high for c in decision.candidates)
    assert width[NEW] > 3 * width[STRONG] > 0


def test_what_was_right_each_time_is_not_certain() -> None:
    seen = make_snapshot()
    always = replace(
        seen,
        score_alpha=seen.score_alpha + seen.score_beta,
        score_beta=np.full_like(seen.score_beta, 1e-9),
        pair_alpha=seen.pair_alpha + seen.pair_beta,
        pair_beta=np.full_like(seen.pair_beta, 1e-9),
    )
    (best, *_) = decide(ClusterRule(always), topics()[0], LIMITS, PAIRS, 1).candidates
    assert best.low < best.quality == best.high == 1.0


def test_thompson_draws_by_the_chance_of_being_best_and_says_it() -> None:
    rule = ClusterRule(make_snapshot(), epsilon=1.0, method="thompson", seed=0)
    decisions = [decide(rule, topics()[0], LIMITS, PAIRS, 1) for _ in range(300)]
    # Expected scores .90, .92 and .20 of 50 outcomes each: the last is never best.
    picked = {pair: sum(d.pair == pair for d in decisions) / 300 for pair in PAIRS}
    stated = float(np.mean([d.propensity for d in decisions if d.pair == STRONG]))
    assert picked[MATH] == 0
    assert 0.2 < picked[CHEAP] < picked[STRONG]
    assert stated == pytest.approx(picked[STRONG], abs=0.08)


def test_the_likeness_of_a_query_is_its_nearest_cluster() -> None:
    likeness = ClusterRule(make_snapshot()).likeness(topics()[1])
    assert (likeness.cluster, likeness.examples) == (1, ("b", "c"))


def test_a_degraded_pair_is_left_within_50_feedbacks_and_comes_back() -> None:
    rule = ClusterRule(make_snapshot())
    query, other = topics()[1], topics()[2]
    assert decide(rule, query, LIMITS, PAIRS, 1).pair == MATH
    given = 0
    while decide(rule, query, LIMITS, PAIRS, 1).pair == MATH:
        rule.update(query, MATH, 0.0, LOCAL_OWNER)
        given += 1
        assert given <= 50
    assert decide(rule, query, LIMITS, PAIRS, 1).pair == STRONG
    assert decide(rule, other, LIMITS, PAIRS, 1).pair == STRONG
    for _ in range(100):
        rule.update(query, MATH, 1.0, LOCAL_OWNER)
    assert decide(rule, query, LIMITS, PAIRS, 1).pair == MATH


def test_feedback_that_agrees_changes_little() -> None:
    rule = ClusterRule(make_snapshot())
    before = rule.qualities(topics()[1]).copy()
    rng = np.random.default_rng(0)
    for _ in range(300):
        rule.update(topics()[1], MATH, float(rng.random() < SKILL[1, 1]), LOCAL_OWNER)
    np.testing.assert_allclose(rule.qualities(topics()[1]), before, atol=0.08)
    np.testing.assert_array_equal(rule.qualities(topics()[1])[[0, 2]], before[[0, 2]])


def test_a_new_pair_is_learned_where_it_was_tried() -> None:
    rule = ClusterRule(make_snapshot(), new_pair_prior())
    for _ in range(40):
        rule.update(topics()[0], NEW, 1.0, LOCAL_OWNER)
        rule.update(topics()[1], NEW, 0.0, LOCAL_OWNER)
    good, bad = rule.qualities(topics()[0])[3], rule.qualities(topics()[1])[3]
    assert good > 0.7
    assert bad < 0.3


def test_an_advantage_within_chance_does_not_displace_the_pair_that_is_best_overall() -> None:
    snapshot = make_snapshot()
    few = replace(
        snapshot,
        score_alpha=snapshot.score_alpha / np.float32(50),
        score_beta=snapshot.score_beta / np.float32(50),
    )
    assert decide(ClusterRule(few), topics()[1], LIMITS, PAIRS, 1).pair == STRONG
    bold = decide(ClusterRule(replace(few, caution=0.0)), topics()[1], LIMITS, PAIRS, 1)
    assert bold.pair == MATH
    assert ClusterRule(few).qualities(topics()[1]).argmax() == PAIRS.index(STRONG)


def test_the_relative_distance_is_near_1_for_what_no_cluster_is_near() -> None:
    rule = ClusterRule(make_snapshot())
    assert rule.distance(topics()[0]) == 0.0
    assert rule.distance(far_away()) == pytest.approx(1.0)


def test_feedback_is_clipped_and_unknown_pairs_are_ignored() -> None:
    clipped, plain = ClusterRule(make_snapshot()), ClusterRule(make_snapshot())
    clipped.update(topics()[0], CHEAP, -50.0, LOCAL_OWNER)
    plain.update(topics()[0], CHEAP, 0.0, LOCAL_OWNER)
    clipped.update(topics()[0], NEW, 1.0, LOCAL_OWNER)
    np.testing.assert_array_equal(clipped.qualities(topics()[0]), plain.qualities(topics()[0]))


def test_exploration_is_off_by_default_and_its_propensities_are_those_observed() -> None:
    greedy = decide(ClusterRule(make_snapshot()), topics()[0], LIMITS, PAIRS, 1)
    assert greedy.propensity == 1.0
    rule = ClusterRule(make_snapshot(), epsilon=0.3, seed=0)
    stated: dict[Pair, float] = {}
    counts = dict.fromkeys(PAIRS, 0)
    for _ in range(2000):
        decision = decide(rule, topics()[0], LIMITS, PAIRS, 1)
        assert len({candidate.pair for candidate in decision.candidates}) == 3
        stated[decision.pair] = decision.propensity
        counts[decision.pair] += 1
    assert stated == {
        STRONG: pytest.approx(0.8),
        CHEAP: pytest.approx(0.1),
        MATH: pytest.approx(0.1),
    }
    for pair, propensity in stated.items():
        assert counts[pair] / 2000 == pytest.approx(propensity, abs=0.03)


def test_of_thousands_of_pairs_only_the_best_are_named() -> None:
    rule, pairs, query = _large_rule(5000)
    named = decide(rule, query, LIMITS, pairs, 1).candidates
    everyone = decide(rule, query, LIMITS, pairs, 1, explain=True).candidates
    assert len(everyone) == 5000
    assert named == everyone[:16]


def _large_rule(num_pairs: int) -> tuple[ClusterRule, tuple[Pair, ...], NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    dim, clusters, landmarks, rank = 384, 168, 512, 64
    pairs = tuple(Pair(f"model-{number}", "none") for number in range(num_pairs))

    def uniform(*shape: int, scale: float = 1.0) -> NDArray[np.float32]:
        return (scale * rng.uniform(0.1, 1.0, shape)).astype(np.float32)

    snapshot = RouterSnapshot(
        version=1,
        encoder="test-encoder",
        pairs=pairs,
        centroids=uniform(clusters, dim, scale=0.05),
        scales=(Scale(8, 1, 0.2), Scale(32, 8, 0.4), Scale(128, 8, 0.4)),
        temperature=0.1,
        score_alpha=uniform(clusters, num_pairs),
        score_beta=uniform(clusters, num_pairs),
        tokens=uniform(clusters, num_pairs),
        seconds=uniform(clusters, num_pairs),
        costs_usd=uniform(clusters, num_pairs),
        pair_alpha=uniform(num_pairs),
        pair_beta=uniform(num_pairs),
        pair_costs_usd=COSTS_USD[rng.integers(3, size=num_pairs)],
        landmarks=uniform(landmarks, dim, scale=0.05),
        head_in=uniform(landmarks, rank, scale=0.01),
        head_out=uniform(rank, num_pairs, scale=0.01),
        head_gamma=1.0,
        head_weight=0.5,
        card_weight=0.0,
        outside_card_weight=0.0,
        caution=1.645,
        prior_weights=np.zeros(0, np.float32),
        prior_bias=0.5,
        distance_quantiles=np.array([0.0, 5.0], np.float32),
        trusted_quantile=1.0,
        gate_head=uniform(landmarks, scale=0.01),
        gate_weights=np.zeros(5, np.float32),
        examples=((),) * clusters,
    )
    return ClusterRule(snapshot), pairs, uniform(dim, scale=0.05)


def test_outside_the_profile_the_cards_rank_and_verdicts_still_count() -> None:
    likeness = np.array([0.2, 0.3, 0.6], np.float32)
    prior = Prior(PAIRS, np.array(COSTS_USD, np.float32), lambda _: likeness)
    elsewhere = np.eye(DIM, dtype=np.float32)[9]
    # Over all that was profiled the last pair is worst, and its card is most like the query.
    skill = np.array([0.8, 0.6, 0.1], np.float32)
    worst = replace(make_snapshot(), pair_alpha=50 * skill, pair_beta=50 * (1 - skill))
    by_means = ClusterRule(worst, prior)
    assert decide(by_means, elsewhere, LIMITS, PAIRS).pair == PAIRS[0]
    by_cards = ClusterRule(replace(worst, outside_card_weight=1.0), prior)
    decision = decide(by_cards, elsewhere, LIMITS, PAIRS)
    assert (decision.path, decision.pair) == (DecidedBy.OUT_OF_DISTRIBUTION, PAIRS[2])
    for _ in range(50):
        by_cards.update(elsewhere, PAIRS[2], 0.0, LOCAL_OWNER)
        by_cards.update(elsewhere, PAIRS[1], 1.0, LOCAL_OWNER)
    assert decide(by_cards, elsewhere, LIMITS, PAIRS).pair == PAIRS[1]
