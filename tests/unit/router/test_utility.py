"""The scale of cost and the utility, the same wherever dollars are weighed."""

from __future__ import annotations

import numpy as np
import pytest

from serve_app.router.rules.utility import (
    cost_range,
    normalised,
    normalised_cost,
    pool_range,
    trade,
    utility,
)


def test_costs_are_spread_over_zero_to_one_on_a_log_scale() -> None:
    assert normalised_cost([1.0, 10.0, 100.0]).tolist() == pytest.approx([0.0, 0.5, 1.0])


def test_a_free_pair_counts_as_a_hundredth_of_the_cheapest_paid_one() -> None:
    assert normalised_cost([0.0, 1.0]).tolist() == [0.0, 1.0]
    assert normalised_cost([0.0, 1.0, 100.0]).tolist() == pytest.approx([0.0, 0.5, 1.0])


@pytest.mark.parametrize("prices", [[3.0, 3.0], [0.0, 0.0], [2.0]])
def test_prices_that_do_not_differ_cost_nothing(prices: list[float]) -> None:
    assert not normalised_cost(prices).any()


def test_prices_that_differ_by_rounding_alone_cost_nothing() -> None:
    third = np.array([1 / 3, 1 / 3], np.float32)
    third[1] = np.nextafter(third[0], np.float32(1))
    assert not normalised_cost(third).any()


def test_several_runs_cost_more_than_the_dearest_pair() -> None:
    scale = pool_range(np.array([1.0, 10.0]))
    assert normalised(np.array([0.1, 100.0]), scale).tolist() == [0.0, 2.0]


def test_only_the_pairs_that_are_there_make_the_range() -> None:
    costs_usd = np.array([[1e-9, 1.0, 10.0], [1.0, 1.0, 1.0]])
    present = np.array([[False, True, True], [False, False, False]])
    scale = cost_range(costs_usd, present)
    np.testing.assert_allclose(scale[0], [0.0, np.log(10.0)])
    assert np.isfinite(scale).all()


def test_the_same_dollars_cost_the_same_on_both_paths_whatever_their_type() -> None:
    """Path 1 weighs a pool's prices at once, path 2 a batch of them in float32."""
    prices = np.geomspace(1e-6, 1e-2, 40).astype(np.float32)
    batch = np.tile(prices, (3, 1))
    scale = cost_range(batch, np.ones(batch.shape, np.bool_))
    for row in normalised(batch, scale[:, None, :]):
        np.testing.assert_array_equal(row, normalised_cost(prices.tolist()))


def test_the_utility_trades_quality_for_cost() -> None:
    quality, cost = np.array([0.9, 0.5]), np.array([1.0, 0.0])
    assert utility(0.25, quality, cost).tolist() == pytest.approx([0.425, 0.375])
    by_query = utility(np.array([0.0, 1.0]), quality, cost)
    assert by_query.tolist() == pytest.approx([0.9, 0.0])


def test_float32_scores_stay_float32() -> None:
    scores = np.array([0.1, 0.7], np.float32)
    assert utility(0.3, scores, scores).dtype == np.float32


def test_cost_is_never_worth_more_than_the_whole_score() -> None:
    assert trade(np.array([0.0, 0.2, 0.5, 0.9, 1.0])).tolist() == pytest.approx([0, 0.25, 1, 1, 1])
