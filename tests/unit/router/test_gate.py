"""The gate: confidence that means something, and a verdict on queries unlike the profiled ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rl.fit.fit import fit
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.gate import NEAR_ORACLE, Gate, gate_features, settle
from tests.router_data import DIM, QUICK, SKILL, make_outcomes, make_queries, make_snapshot

UNLIKE = np.zeros(3, np.float32)
"""A query that is like no landmark."""


def test_the_distance_quantile_follows_the_stored_quantiles() -> None:
    gate = Gate(make_snapshot())  # 0 to 0.8 in nine even steps
    assert gate.distance_quantile(0.0) == 0.0
    assert gate.distance_quantile(0.4) == pytest.approx(0.5)
    assert gate.distance_quantile(5.0) == 1.0


def test_a_query_is_outside_past_the_trusted_quantile() -> None:
    gate = Gate(replace(make_snapshot(), trusted_quantile=0.5))
    assert gate.is_inside(0.39)
    assert not gate.is_inside(0.41)
    assert not gate.judge(0.9, 0.9, UNLIKE, 0.41).inside


def test_confidence_is_the_logistic_of_its_features() -> None:
    head = np.array([0.5, 0.0, -1.0], np.float32)
    gate = Gate(replace(make_snapshot(), gate_head=head))
    kernel = np.array([1.0, 0.3, 0.1], np.float32)
    features = gate_features(
        np.array([[0.9, 0.2, 0.6]], np.float32),
        np.array([2]),
        np.array([0.4], np.float32),
        np.array([0.5], np.float32),
    )
    np.testing.assert_allclose(features, [[1.0, 0.6, 0.3, 0.4, 0.5]], atol=1e-6)
    logit = features[0] @ make_snapshot().gate_weights
    assert gate.judge(0.6, 0.9, kernel, 0.4).confidence == pytest.approx(1 / (1 + np.exp(-logit)))


def test_extreme_logits_stay_within_0_and_1() -> None:
    gate = Gate(replace(make_snapshot(), gate_weights=np.array([0, 1e6, 0, 0, 0], np.float32)))
    assert 0.99 < gate.judge(1.0, 1.0, UNLIKE, 0.1).confidence <= 1.0
    assert 0.0 <= gate.judge(-1.0, 1.0, UNLIKE, 0.1).confidence < 0.01


def test_an_advantage_within_chance_leaves_the_usual_pair_as_good_as_the_best() -> None:
    quality = np.array([0.5, 0.6, 0.1], np.float32)
    settled = settle(quality, np.full(3, 0.1, np.float32), usual=0, best=1, caution=1.645)
    assert settled.argmax() == 0
    np.testing.assert_allclose(settled, [0.6, 0.6, 0.1], atol=1e-5)
    np.testing.assert_array_equal(quality, np.array([0.5, 0.6, 0.1], np.float32))
    certain = settle(quality, np.full(3, 0.02, np.float32), usual=0, best=1, caution=1.645)
    np.testing.assert_array_equal(certain, quality)
    reckless = settle(quality, np.ones(3, np.float32), usual=0, best=1, caution=0.0)
    np.testing.assert_array_equal(reckless, quality)
    unchanged = settle(quality, np.ones(3, np.float32), usual=1, best=1, caution=1.645)
    np.testing.assert_array_equal(unchanged, quality)


def test_on_held_out_queries_confidence_is_calibrated_and_rises_with_being_right() -> None:
    skill = np.array([[0.95, 0.1, 0.1], [0.5, 0.55, 0.5], [0.1, 0.75, 0.2]])
    outcomes, _ = make_outcomes(900, seed=1, skill=skill)
    rule = ClusterRule(fit(outcomes, QUICK))
    held_out, _ = make_outcomes(600, seed=2, skill=skill)
    scores = held_out.score.reshape(600, 3)
    chosen = np.array([rule.qualities(query).argmax() for query in held_out.embeddings])
    is_right = scores[np.arange(600), chosen] >= scores.max(axis=1) - NEAR_ORACLE
    confidence = np.array([rule.judge(query).confidence for query in held_out.embeddings])
    thirds = np.array_split(np.argsort(confidence, kind="stable"), 3)
    shares = [is_right[rows].mean() for rows in thirds]
    assert shares[0] < shares[1] < shares[2]
    for rows, share in zip(thirds, shares, strict=True):
        assert confidence[rows].mean() == pytest.approx(share, abs=0.08)


def test_another_domain_is_outside_and_the_own_is_not() -> None:
    outcomes, _ = make_outcomes(600)
    rule = ClusterRule(fit(outcomes, QUICK))
    own = make_queries(np.arange(200) % 3, seed=77)
    assert np.mean([rule.judge(query).inside for query in own]) > 0.9
    foreign = np.roll(own, DIM // 2, axis=1)
    assert not any(rule.judge(query).inside for query in foreign)
    np.testing.assert_allclose(rule.qualities(foreign[0]), SKILL.mean(axis=0), atol=0.06)
