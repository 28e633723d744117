"""The gate's settings: held-out predictions in; caution, and what gives a confidence, out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl.fit import estimators
from rl.fit.estimators import Float
from rl.fit.pareto import sweep_choices
from rl.fit.selection import Chosen, FitSettings, PairStatistics, figure_of_merit
from rl.profile.outcomes import Outcomes
from serve_app.router.rules.gate import NEAR_ORACLE, gate_features, settle
from serve_app.router.rules.utility import normalised_cost

_ALPHAS = np.array([0.0, 0.1, 0.3, 0.6])
"""Decisions are calibrated at each of these."""
_MIN_QUERIES = 20
_UNCALIBRATED = np.array([-2.0, 4.0, 0.0, 0.0, 0.0], np.float32)
"""Gate weights that take the expected score for the confidence."""
_PENALTY = 10.0
_NUM_FOLDS = 5


def calibrate(
    outcomes: Outcomes,
    scores: Any,
    counts: Any,
    pairs: PairStatistics,
    landmarks: Float,
    rows: NDArray[np.int64],
    quality: Float,
    levels: Float,
    settings: FitSettings,
) -> tuple[Float, Float]:
    """Was a decision within `NEAR_ORACLE` of the best pair of its query?

    Only queries on which every pair was seen can tell.

    Args:
        outcomes: What the pairs did.
        scores: (num_queries, num_pairs) sparse.
        counts: Like `scores`.
        pairs: Over all queries.
        landmarks: (num_landmarks, dim)
        rows: (num_cv_queries,) the queries that were held out.
        quality: (num_cv_queries, num_pairs) what decisions on them go by.
        levels: (num_cv_queries,) distance quantiles.
        settings: What is fixed.

    Returns:
        The gate's head (num_landmarks,) and weights (5,).
    """
    known = counts[rows].toarray()
    full = np.flatnonzero((known > 0).all(axis=1))
    if len(full) < _MIN_QUERIES or scores.shape[1] < 2:
        return np.zeros(len(landmarks), np.float32), _UNCALIBRATED
    observed = scores[rows].toarray()[full] / known[full]
    near_oracle = observed >= observed.max(axis=1, keepdims=True) - NEAR_ORACLE
    quality, levels = quality[full], levels[full]
    index = np.arange(len(full))
    kernel = estimators.kernel(outcomes.embeddings[rows[full]], landmarks, settings.gamma)
    head, local = _local_head(
        kernel,
        estimators.kernel(landmarks, landmarks, settings.gamma),
        near_oracle[index, quality.argmax(axis=1)],
        np.random.default_rng(settings.seed + 3).permutation(len(full)) % _NUM_FOLDS,
    )
    features, is_right = [], []
    cost = normalised_cost(pairs.costs_usd)
    for choice in sweep_choices(quality, cost, _ALPHAS):
        features.append(gate_features(quality, choice, local, levels))
        is_right.append(near_oracle[index, choice])
    return head, estimators.logistic(np.concatenate(features), np.concatenate(is_right))


def choose_caution(
    outcomes: Outcomes,
    scores: Any,
    counts: Any,
    pairs: PairStatistics,
    centroids: dict[int, Float],
    chosen: Chosen,
    seen: Float,
    settings: FitSettings,
) -> tuple[float, Float]:
    """The most caution that costs no more than chance: the one-standard-error rule.

    Queries of a kind that was not profiled are not among the held-out ones; on them only caution
    keeps the router from trading the best pair for one that few like queries spoke for. So of all
    cautions whose cross-validated figure is within a standard error of the best (Breiman et al.,
    1984, section 3.4.3) the largest is taken.

    Args:
        outcomes: What the pairs did.
        scores: (num_queries, num_pairs) sparse.
        counts: Like `scores`.
        pairs: Over all queries.
        centroids: By number of clusters.
        chosen: The blend and its held-out predictions.
        seen: (clusters, pairs) observations behind each posterior.
        settings: What is tried.

    Returns:
        The caution, and (num_cv_queries, num_pairs) the held-out predictions settled by it.
    """
    embeddings = outcomes.embeddings[chosen.rows]
    weights = [
        share * estimators.assign(embeddings, centroids[size], nearest, settings.temperature)
        for (size, nearest), share in chosen.clusterings.items()
    ]
    quality = chosen.quality
    spread = np.sqrt(quality * (1 - quality) / (np.concatenate(weights, axis=1) @ seen + 1))
    part, known = scores[chosen.rows], counts[chosen.rows]
    value_of = figure_of_merit(outcomes, chosen.rows, part, known, pairs)
    best = quality.argmax(axis=1)
    index = np.arange(len(quality))
    times = np.asarray(known[index, best]).ravel()
    reached = np.asarray(part[index, best]).ravel()[times > 0] / times[times > 0]
    error = float(reached.std() / np.sqrt(len(reached))) if len(reached) else 0.0
    settled = {
        caution: _settled(quality, spread, int(pairs.mean.argmax()), best, caution)
        for caution in settings.cautions
    }
    values = {caution: value_of(of) for caution, of in settled.items()}
    enough = max(values.values()) - error
    caution = next(caution for caution, value in values.items() if value >= enough)
    return caution, settled[caution]


def _settled(
    quality: Float, spread: Float, usual: int, best: NDArray[np.intp], caution: float
) -> Float:
    """(num_cv_queries, num_pairs) `settle` row by row."""
    settled = quality.copy()
    for row in np.flatnonzero(best != usual):
        settled[row] = settle(quality[row], spread[row], usual, int(best[row]), caution)
    return settled


def _local_head(
    kernel: Float, between: Float, is_right: NDArray[np.bool_], fold: NDArray[np.int64]
) -> tuple[Float, Float]:
    """Kernel ridge regression of being right, as a difference in logits.

    Returns:
        (num_landmarks,) weights, and (num_queries,) held-out predictions.
    """
    base = float(np.clip(is_right.mean(), 0.01, 0.99))
    target = ((is_right - base) / (base * (1 - base)))[:, None]
    gram, right = (kernel.T @ kernel).astype(np.float64), kernel.T @ target
    held_out = np.empty(len(kernel), np.float32)
    for held in range(_NUM_FOLDS):
        part = fold == held
        weights = estimators.solve_head(
            gram - kernel[part].T @ kernel[part],
            right - kernel[part].T @ target[part],
            between,
            _PENALTY,
        )
        held_out[part] = kernel[part] @ weights[:, 0]
    return estimators.solve_head(gram, right, between, _PENALTY)[:, 0].astype(np.float32), held_out
