"""The figures of a router on a table: score and cost of its alpha-sweep, with bootstrap intervals.

A method gives choices (num_points, num_queries): the pair each query goes to at each point of its
sweep. Costs are those really paid on the evaluated queries; the axis of the area is fixed by
training costs (`rl.fit.pareto.aiq_log`, whose best-single-arm envelopes on the shared `test` splits
are the published .591, .835, .792, .902 and .712).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rl.fit.pareto import aiq_log

NUM_RESAMPLES = 200
"""Bootstrap resamples of the queries."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure with its 95% interval; `None` where it does not exist."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """What a method is held against: the evaluated queries of one table."""

    scores: NDArray[np.float64]
    """(num_queries, num_pairs); an unknown outcome counts as 0."""
    costs_usd: NDArray[np.float64]
    """(num_queries, num_pairs); an unknown one is the pair's mean training cost."""
    train_costs_usd: NDArray[np.float64]
    """(num_pairs,) mean cost in training; its range is the cost axis."""
    best_single: int
    """The pair with the best mean training score."""


def resamples(num_queries: int, seed: int) -> NDArray[np.float64]:
    """(1 + NUM_RESAMPLES, num_queries) weights of the queries; the first row is the plain mean."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(num_queries, np.full(num_queries, 1 / num_queries), NUM_RESAMPLES)
    rows: NDArray[np.float64] = np.concatenate([np.ones((1, num_queries)), counts]) / num_queries
    return rows


def sweep(
    evaluation: Evaluation, choices: NDArray[np.intp], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean score and cost of each point of a sweep, for each resample.

    Args:
        evaluation: The queries.
        choices: (num_points, num_queries) indices of pairs.
        weights: (num_resamples, num_queries) from `resamples`.

    Returns:
        Scores and dollars, each (num_resamples, num_points).
    """
    rows = np.arange(choices.shape[1])
    scores = weights @ evaluation.scores[rows, choices].T
    costs_usd = weights @ evaluation.costs_usd[rows, choices].T
    return scores, costs_usd


def cost_at(
    scores: NDArray[np.float64], costs_usd: NDArray[np.float64], wanted: float, reference_usd: float
) -> float | None:
    """Least cost of a point that reaches a score, as a share of `reference_usd`; `None`: none."""
    reached = costs_usd[scores >= wanted - 1e-9]
    return float(reached.min() / reference_usd) if len(reached) and reference_usd > 0 else None


def figures(
    evaluation: Evaluation, choices: NDArray[np.intp], weights: NDArray[np.float64]
) -> dict[str, Figure]:
    """Every figure of one method.

    The best single pair is resampled with the method. Resamples in which a cost is never reached
    are left out of its interval.

    Args:
        evaluation: The queries.
        choices: (num_points, num_queries); repeated points cost nothing.
        weights: From `resamples`.
    """
    choices = np.unique(choices, axis=0)
    scores, costs_usd = sweep(evaluation, choices, weights)
    single = np.full((1, choices.shape[1]), evaluation.best_single)
    single_scores, single_costs_usd = (part[:, 0] for part in sweep(evaluation, single, weights))
    columns: dict[str, list[float | None]] = {
        "max_score": [float(row.max()) for row in scores],
        "aiq_log": [
            aiq_log(score, cost_usd, evaluation.train_costs_usd)
            for score, cost_usd in zip(scores, costs_usd, strict=True)
        ],
    }
    for name, slack in (("cost_at_best_single", 0.0), ("cost_at_best_single_less_1", 0.01)):
        columns[name] = [
            cost_at(score, cost_usd, float(wanted) - slack, float(reference_usd))
            for score, cost_usd, wanted, reference_usd in zip(
                scores, costs_usd, single_scores, single_costs_usd, strict=True
            )
        ]
    return {name: _figure(values) for name, values in columns.items()}


def mean_figure(values: NDArray[np.float64], weights: NDArray[np.float64]) -> Figure:
    """Mean of one value per query."""
    return _figure([float(value) for value in weights @ values])


def _figure(values: list[float | None]) -> Figure:
    known = [value for value in values[1:] if value is not None]
    if values[0] is None or not known:
        return Figure(values[0])
    low, high = np.percentile(known, [2.5, 97.5])
    return Figure(values[0], float(low), float(high))
