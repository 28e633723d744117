"""The quality-cost frontier of a router: what an alpha-sweep reaches, and the area under it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from serve_app.router.rules.utility import utility

ALPHAS: NDArray[np.float64] = np.linspace(0.0, 1.0, 1001)
"""The sweep that figures are computed on; 0 = quality only."""
COARSE_ALPHAS: NDArray[np.float64] = np.linspace(0.0, 1.0, 101)
"""The sweep that settings are chosen on."""
COST_GRID_POINTS = 200
"""Points of the log-cost axis."""


def sweep_choices(
    quality: NDArray[np.float32], cost: NDArray[np.float32], alphas: NDArray[np.float64]
) -> NDArray[np.intp]:
    """The pair of highest utility at each alpha.

    Args:
        quality: (num_queries, num_pairs) expected scores; -inf where a pair may not be chosen.
        cost: (num_pairs,) normalised to [0, 1].
        alphas: (num_alphas,)

    Returns:
        (num_alphas, num_queries) indices of pairs.
    """
    quality = np.asarray(quality, np.float32)
    forbidden = np.isneginf(quality)
    # At alpha 1 the quality counts for nothing, but what is forbidden stays so.
    has_forbidden = bool(forbidden.any())
    if has_forbidden:
        quality = np.where(forbidden, np.float32(0), quality)
    choices = np.empty((len(alphas), len(quality)), np.intp)
    for row, alpha in enumerate(alphas):
        gained = utility(float(alpha), quality, cost)
        if has_forbidden:
            gained[forbidden] = -np.inf
        choices[row] = gained.argmax(axis=1)
    return choices


def aiq_log(
    scores: NDArray[np.float64], costs_usd: NDArray[np.float64], pair_costs_usd: NDArray[np.float64]
) -> float:
    """Mean over log cost of the best score reached at that cost or less.

    The axis runs from the cheapest to the dearest pair's mean cost in training; where no point of
    the sweep is as cheap, the score is 0.

    Args:
        scores: (num_points,) mean score of each point of a sweep.
        costs_usd: (num_points,) mean cost of each.
        pair_costs_usd: (num_pairs,) mean training cost of each pair, above 0.

    Returns:
        In [0, 1]; where all pairs cost the same, the best score.
    """
    low, high = float(pair_costs_usd.min()), float(pair_costs_usd.max())
    if high <= low:
        return float(scores.max())
    grid = np.geomspace(low, high, COST_GRID_POINTS)
    grid[0], grid[-1] = low, high  # exact, so that a pair at an end counts there
    order = np.argsort(costs_usd, kind="stable")
    best = np.concatenate([[0.0], np.maximum.accumulate(scores[order])])
    return float(best[np.searchsorted(costs_usd[order], grid, side="right")].mean())
