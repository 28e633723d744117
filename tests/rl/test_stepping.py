"""Replayed requests of several steps: the rule that would serve them is the rule that is asked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rl.evaluate.held_out import HeldOut
from rl.evaluate.policies import reach
from rl.ppo.stepping import ReplayedRule
from rl.ppo.table import ReplayTable
from serve_app.errors import ConfigError
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.utility import normalised, normalised_cost, pool_range
from serve_app.router.rules.voi import VoiRule
from serve_app.signals import NUMBERS
from tests.rl.replay_data import make_replay
from tests.router_data import make_snapshot
from tests.verifier_data import make_verifier

NUM_QUERIES = 120


def make_table() -> ReplayTable:
    """Right answers are said with certainty, wrong ones without."""
    table = make_replay(NUM_QUERIES)
    signals = np.full((*table.score.shape, len(NUMBERS)), np.nan, np.float32)
    signals[..., NUMBERS.index("answer_mean")] = np.where(table.score > 0.5, -0.1, -2.0)
    keys = np.arange(table.score.size).reshape(table.score.shape)
    return replace(table, signals=signals, answer_key=keys)


def held_out_of(table: ReplayTable) -> HeldOut:
    means = table.pair_costs_usd.astype(np.float64)
    return HeldOut(
        encoder=table.encoder,
        embeddings=table.embeddings,
        pairs=table.pairs,
        scores=table.score[0].astype(np.float64),
        costs_usd=table.costs_usd[0].astype(np.float64),
        cost=normalised_cost(means).astype(np.float64),
        pair_costs_usd=means,
        domains=np.array(table.domains),
        coverage={},
        num_dropped=0,
        rows=np.arange(table.num_queries),
    )


def make_rule() -> VoiRule:
    return VoiRule(replace(make_snapshot(), verifier=make_verifier()))


def test_looking_at_answers_pays_where_they_show_whether_they_are_right() -> None:
    table = make_table()
    held_out, alphas = held_out_of(table), [0.0, 0.3]
    once = reach("path 1", ClusterRule(make_snapshot()), held_out, alphas)
    voi = reach("voi", ReplayedRule(make_rule(), table, 4), held_out, alphas)
    more = voi.score.mean(axis=1) - once.score.mean(axis=1)
    assert more[0] > 0.05
    assert more[1] > 0.02
    gained = [
        ((1 - alpha) * of.score[row] - alpha * of.cost[row]).mean()
        for row, alpha in enumerate(alphas)
        for of in (voi, once)
    ]
    assert gained[0] > gained[1]
    assert gained[2] > gained[3]
    assert voi.steps[1].mean() < voi.steps[0].mean()
    assert voi.steps.max() <= 3


def test_one_step_is_cluster_routing() -> None:
    table = make_table()
    held_out = held_out_of(table)
    once = reach("path 1", ClusterRule(make_snapshot()), held_out, [0.1])
    voi = reach("voi", ReplayedRule(make_rule(), table, 1), held_out, [0.1])
    for name in ("score", "costs_usd", "steps"):
        np.testing.assert_allclose(getattr(voi, name), getattr(once, name), rtol=1e-6)
    np.testing.assert_allclose(voi.cost, once.cost, atol=1e-6)


def test_the_cost_of_a_request_is_that_of_everything_that_ran() -> None:
    table = make_table()
    rule = ReplayedRule(make_rule(), table, 4)
    reached = rule.reach(held_out_of(table), [0.0])
    requests = rule.answer(table, 0.0)
    request = max(requests, key=lambda of: len(of.ran))
    assert len(request.ran) > 1
    usd = table.pair_costs_usd[request.ran].sum(dtype=np.float64)
    expected = float(normalised(np.array(usd), pool_range(table.pair_costs_usd)))
    assert reached.cost[0, request.query] == pytest.approx(expected, abs=1e-6)


def test_a_table_of_other_pairs_is_refused() -> None:
    table = make_table()
    with pytest.raises(ConfigError, match="other pairs"):
        ReplayedRule(make_rule(), table.select(pairs=[0, 1]), 4).reach(held_out_of(table), [0.0])
