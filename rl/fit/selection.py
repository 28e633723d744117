"""Which blend of clusters and head a table of outcomes asks for, by cross-validation.

The figure is the area under the score-against-log-cost frontier; with sparse logs, where most pairs
were not seen on a query, it is the negative squared error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]

from rl.fit import estimators
from rl.fit.estimators import Float
from rl.fit.pareto import COARSE_ALPHAS, aiq_log, sweep_choices
from rl.profile.outcomes import Outcomes
from serve_app.router.rules.utility import normalised_cost

_Combination = tuple[tuple[int, int], float, float]
"""(clusters, nearest), penalty of the head, share of the head."""


@dataclass(frozen=True)
class FitSettings:
    """What is tried, and what is fixed."""

    clusterings: tuple[tuple[int, int], ...] = ((8, 1), (32, 8), (128, 8))
    """(clusters, nearest): number of clusters, and how many of them a query is shared among."""
    temperature: float = 0.1
    """Squared distance that makes a shared cluster e times lighter."""
    gamma: float = 1.0
    """Width of the head's kernel exp(-gamma * squared distance)."""
    penalties: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0, 30.0)
    head_weights: tuple[float, ...] = (0.0, 1 / 3, 2 / 3, 1.0)
    """Shares of the head in the quality."""
    card_weights: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
    """Score points that one point of similarity to a pair's card may be worth."""
    num_landmarks: int = 512
    cluster_strength: float = 20.0
    """Observations that the pair's overall mean is worth in a cluster."""
    pair_strength: float = 4.0
    """Observations that the descriptor's prior is worth for a pair."""
    num_folds: int = 5
    num_repeats: int = 2
    """Times that cross-validation is run, each with folds of its own."""
    cautions: tuple[float, ...] = (1.645, 1.0, 0.5, 0.0)
    """Standard deviations that make a pair's advantage certain, the most cautious first."""
    num_averaged: int = 10
    """Best combinations whose mean is the router. One alone is as good on the folds that chose it,
    and worse on new queries."""
    max_cv_cells: int = 2_000_000
    """Queries times pairs that cross-validation looks at."""
    max_cv_queries: int = 8_000
    max_head_queries: int = 40_000
    """Queries the head is fitted on; a sample beyond."""
    trusted_quantile: float = 0.95
    """Past this quantile of the training queries' relative distances a query is outside."""
    num_examples: int = 5
    """Example questions kept per cluster."""
    seed: int = 0


@dataclass(frozen=True)
class Chosen:
    """The blend that won, and its held-out predictions."""

    clusterings: dict[tuple[int, int], float]
    """(clusters, nearest) to its share in the clusters' quality; the shares sum to 1."""
    penalties: dict[float, float]
    """Penalty of a head to its share in the head; empty without a head."""
    head_weight: float
    card_weight: float
    outside_card_weight: float
    """The same where nothing else is known of a query but the pool's mean score; 0 where the pairs'
    own means say more than the cards."""
    value: float
    """Cross-validated figure of the blend; higher is better."""
    rows: NDArray[np.int64]
    """(num_cv_queries,) the queries that were held out."""
    quality: Float
    """(num_cv_queries, num_pairs) held-out predictions."""
    outside: Float
    """(num_cv_queries, num_pairs) what would be predicted if the queries were outside."""


@dataclass(frozen=True)
class PairStatistics:
    """What is known of each pair over all queries."""

    mean: NDArray[np.float64]
    alpha: Float
    beta: Float
    costs_usd: NDArray[np.float64]
    prior_weights: Float
    prior_bias: float


def clusterings(num_queries: int, settings: FitSettings) -> list[tuple[int, int]]:
    """The clusterings that leave a cluster four queries on average; at least one."""
    fitting = [(size, nearest) for size, nearest in settings.clusterings if 4 * size <= num_queries]
    return fitting or [(max(1, num_queries // 4), 1)]


def choose(
    outcomes: Outcomes,
    scores: Any,
    counts: Any,
    pairs: PairStatistics,
    landmarks: Float,
    centroids: dict[int, Float],
    settings: FitSettings,
    card_part: Float | None = None,
) -> Chosen:
    """Cross-validate every combination; ties go to the earlier, simpler one.

    Centroids and landmarks come from all queries: they carry no score. Nor do the cards; what their
    likeness is worth is chosen last, on the held-out predictions of the blend.

    Args:
        outcomes: What the pairs did.
        scores: (num_queries, num_pairs) sparse sums.
        counts: The same of the observations.
        pairs: What is known over all queries.
        landmarks: Of the head.
        centroids: By number of clusters.
        settings: What is tried.
        card_part: (num_queries, num_pairs) similarity to each pair's card minus the mean over the
            pairs; `None` without cards.
    """
    num_queries, num_pairs = scores.shape
    rng = np.random.default_rng(settings.seed + 1)
    size = min(num_queries, settings.max_cv_queries, max(500, settings.max_cv_cells // num_pairs))
    rows = np.sort(rng.permutation(num_queries)[:size])
    embeddings, part, seen = outcomes.embeddings[rows], scores[rows], counts[rows]
    value_of = figure_of_merit(outcomes, rows, part, seen, pairs)
    values: dict[_Combination, float] = {}
    repeats = []
    for _ in range(settings.num_repeats):
        fold = rng.permutation(size) % min(settings.num_folds, max(2, size))
        by_clusters = {
            (of, nearest): _held_out_clusters(
                estimators.assign(embeddings, centroids[of], nearest, settings.temperature),
                part,
                seen,
                pairs,
                fold,
                settings,
            )
            for of, nearest in clusterings(num_queries, settings)
        }
        by_head = _held_out_heads(embeddings, landmarks, part, seen, pairs, fold, settings)
        repeats.append((by_clusters, by_head))
        for combination in _combinations(by_clusters, by_head, settings):
            clustering, penalty, weight = combination
            quality = (1 - weight) * by_clusters[clustering] + weight * by_head[penalty]
            values[combination] = values.get(combination, 0.0) + value_of(quality)
    best = sorted(values, key=lambda combination: -values[combination])[: settings.num_averaged]
    cards = None if card_part is None else card_part[rows]
    return _blend(best, repeats, rows, value_of, cards, pairs, settings)


def _combinations(
    by_clusters: Iterable[tuple[int, int]], by_head: Iterable[float], settings: FitSettings
) -> list[_Combination]:
    """Every combination that differs: without the head its penalty does not matter."""
    kinds, penalties = list(by_clusters), list(by_head)
    return [
        (clustering, penalty, weight)
        for clustering, penalty, weight in itertools.product(
            kinds, penalties, settings.head_weights
        )
        if (weight > 0 or penalty == penalties[0]) and (weight < 1 or clustering == kinds[0])
    ]


def _blend(
    combinations: list[_Combination],
    repeats: list[tuple[dict[tuple[int, int], Float], dict[float, Float]]],
    rows: NDArray[np.int64],
    value_of: Callable[[Float], float],
    card_part: Float | None,
    pairs: PairStatistics,
    settings: FitSettings,
) -> Chosen:
    """The mean of several combinations, which is one of their kind with several parts."""
    head_weight = sum(weight for *_, weight in combinations) / len(combinations)
    shares: dict[tuple[int, int], float] = {}
    penalties: dict[float, float] = {}
    for clustering, penalty, weight in combinations:
        if weight < 1:
            share = (1 - weight) / (1 - head_weight) / len(combinations)
            shares[clustering] = shares.get(clustering, 0.0) + share
        if weight > 0:
            share = weight / head_weight / len(combinations)
            penalties[penalty] = penalties.get(penalty, 0.0) + share
    total = sum(shares.values())
    shares = {of: share / total for of, share in shares.items()}  # rounding
    if not shares:  # the head alone; the clusters still explain and carry the feedback
        shares[combinations[0][0]] = 1.0
    held_out = []
    for by_clusters, by_head in repeats:
        quality = sum(
            (share * (1 - head_weight) * by_clusters[of] for of, share in shares.items()),
            start=np.zeros_like(next(iter(by_clusters.values()))),
        )
        for penalty, share in penalties.items():
            quality += share * head_weight * by_head[penalty]
        held_out.append(quality)
    extra = np.zeros((1, 1), np.float32) if card_part is None else card_part

    def added(quality: Float, weight: float) -> Float:
        clipped: Float = np.clip(quality + weight * extra, 0.0, 1.0).astype(np.float32)
        return clipped

    def best_weight(qualities: list[Float]) -> tuple[float, float]:
        """The weight of the cards that does most for some predictions, and the figure."""
        weights = settings.card_weights if card_part is not None else (0.0,)
        figures = {
            weight: float(np.mean([value_of(added(quality, weight)) for quality in qualities]))
            for weight in weights
        }
        best = max(figures, key=lambda weight: figures[weight])
        return best, figures[best]

    card_weight, value = best_weight(held_out)
    overall = np.broadcast_to(pairs.mean.astype(np.float32), held_out[0].shape)
    level = np.full_like(overall, pairs.mean.mean())
    outside_card_weight, by_cards = best_weight([level])
    if outside_card_weight == 0 or by_cards <= value_of(overall):
        outside_card_weight, level = 0.0, overall
    return Chosen(
        clusterings=shares,
        penalties=penalties,
        head_weight=head_weight,
        card_weight=card_weight,
        outside_card_weight=outside_card_weight,
        value=value,
        rows=rows,
        quality=added(held_out[0], card_weight),
        outside=added(level, outside_card_weight),
    )


def _held_out_clusters(
    weights: Float,
    scores: Any,
    counts: Any,
    pairs: PairStatistics,
    fold: NDArray[np.int64],
    settings: FitSettings,
) -> Float:
    """(num_cv_queries, num_pairs) predictions of clusters that did not see the query's fold."""
    quality = np.empty(scores.shape, np.float32)
    for held in range(int(fold.max()) + 1):
        rest = fold != held
        sums = np.asarray(scores[rest].T @ weights[rest]).T
        seen = np.asarray(counts[rest].T @ weights[rest]).T
        mean = estimators.shrunk_mean(sums, seen, pairs.mean, settings.cluster_strength)
        quality[~rest] = weights[~rest] @ mean
    return quality


def _held_out_heads(
    embeddings: Float,
    landmarks: Float,
    scores: Any,
    counts: Any,
    pairs: PairStatistics,
    fold: NDArray[np.int64],
    settings: FitSettings,
) -> dict[float, Float]:
    """Predictions of heads that did not see the query's fold, by penalty."""
    differences = residuals(scores, counts, pairs)
    features = estimators.kernel(embeddings, landmarks, settings.gamma)
    between = estimators.kernel(landmarks, landmarks, settings.gamma)
    predictions = {penalty: np.empty(scores.shape, np.float32) for penalty in settings.penalties}
    for held in range(int(fold.max()) + 1):
        part = fold == held
        solved = estimators.heads(features[~part], differences[~part], between, settings.penalties)
        for penalty, quality in predictions.items():
            quality[part] = pairs.mean + features[part] @ solved[penalty]
    return predictions


def figure_of_merit(
    outcomes: Outcomes, rows: NDArray[np.int64], scores: Any, counts: Any, pairs: PairStatistics
) -> Callable[[Float], float]:
    """A function from held-out qualities to the figure that settings are chosen by.

    Where most pairs were seen on most queries, it is the area under the frontier, over the observed
    pairs; else the negative squared error of the observed outcomes.
    """
    seen = counts.toarray()
    with np.errstate(invalid="ignore"):
        observed = np.where(seen > 0, scores.toarray() / np.maximum(seen, 1), np.nan)
    if np.isfinite(observed).mean() < 0.5 or observed.shape[1] < 2:
        return lambda quality: -float(np.nanmean((quality - observed) ** 2))
    dollars, priced = outcomes.matrices(outcomes.costs_usd)
    known = priced[rows].toarray()
    costs_usd = np.where(known > 0, dollars[rows].toarray() / np.maximum(known, 1), pairs.costs_usd)
    cost = normalised_cost(pairs.costs_usd)
    unseen = ~np.isfinite(observed)
    gains = np.where(unseen, 0.0, observed)
    index = np.arange(len(gains))
    axis = np.maximum(pairs.costs_usd, pairs.costs_usd.max() * 1e-9)

    def area(quality: Float) -> float:
        allowed = np.where(unseen, -np.inf, quality) if unseen.any() else quality
        choices = sweep_choices(allowed, cost, COARSE_ALPHAS)
        return aiq_log(
            gains[index, choices].mean(axis=1), costs_usd[index, choices].mean(axis=1), axis
        )

    return area


def residuals(scores: Any, counts: Any, pairs: PairStatistics) -> Any:
    """Sparse: mean score minus the pair's mean where observed, 0 elsewhere."""
    sums = scores.tocsr().astype(np.float64)
    sums.sum_duplicates()
    seen = counts.tocsr()
    seen.sum_duplicates()
    # A score of 0 is an outcome too, so the pattern is that of the counts.
    inverse = sparse.csr_matrix((1 / seen.data, seen.indices, seen.indptr), shape=seen.shape)
    means = sparse.csr_matrix(
        (pairs.mean[seen.indices], seen.indices, seen.indptr), shape=seen.shape
    )
    return (sums.multiply(inverse) - means).tocsr().astype(np.float32)
