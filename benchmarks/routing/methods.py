"""The routers that are compared: each learns from a table's training side and ranks every pair.

A method is a function from `Problem` to expected scores (num_queries, num_pairs) of the evaluated
queries; the alpha-sweep over them is the same for all. Settings are chosen on the training side.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.routing.data import Table
from rl.fit import estimators
from rl.fit.fit import fit
from rl.fit.pareto import COARSE_ALPHAS, aiq_log, sweep_choices
from rl.fit.selection import FitSettings
from rl.profile.outcomes import Outcomes
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.utility import normalised_cost

Array = NDArray[np.float32]
_NUM_FOLDS = 5
_KNN_SIZES = (10, 40, 100)
_RIDGE_PENALTIES = (1.0, 3.0, 10.0, 30.0)
_PAPER_CLUSTERS = 8


@dataclass(frozen=True)
class Problem:
    """A training side and the queries to route; missing training outcomes are the pair's mean."""

    train: Array
    """(num_train, dim)"""
    scores: NDArray[np.float64]
    """(num_train, num_pairs)"""
    train_costs_usd: NDArray[np.float64]
    """(num_train, num_pairs)"""
    costs_usd: NDArray[np.float64]
    """(num_pairs,) mean training costs."""
    test: Array
    """(num_test, dim)"""
    seed: int

    @property
    def cost(self) -> Array:
        """(num_pairs,) normalised."""
        return normalised_cost(self.costs_usd)

    def value(self, quality: Array) -> float:
        """Area under the frontier of held-out predictions of the training side."""
        choices = sweep_choices(quality, self.cost, COARSE_ALPHAS)
        rows = np.arange(len(quality))
        scores = self.scores[rows, choices].mean(axis=1)
        return aiq_log(scores, self.train_costs_usd[rows, choices].mean(axis=1), self.costs_usd)


Predictor = Callable[[Array, NDArray[np.float64], Array], Array]
"""(train embeddings, train scores, query embeddings) -> expected scores."""


def best_single(problem: Problem) -> Array:
    """The pair of the best mean training score, whatever the query; never priced away."""
    quality = np.full((len(problem.test), problem.scores.shape[1]), -np.inf, np.float32)
    quality[:, problem.scores.mean(axis=0).argmax()] = 0.0
    return quality


def guarded_knn(problem: Problem) -> Array:
    """Mean score of the k nearest training queries; the pairs' means where that is no better."""
    candidates: list[Predictor] = [_overall, *(_knn(size) for size in _KNN_SIZES)]
    return _by_cross_validation(problem, candidates)


def k_means(problem: Problem) -> Array:
    """The paper's path 1: K = 8, nearest centroid, plain means of its queries."""
    return _plain_k_means(problem.seed)(problem.train, problem.scores, problem.test)


def ridge(problem: Problem) -> Array:
    """Linear regression of the scores on the embedding, penalty by cross-validation."""
    return _by_cross_validation(problem, [_ridge(penalty) for penalty in _RIDGE_PENALTIES])


def mlp(problem: Problem) -> Array:
    """One hidden layer of 64, early stopping on a tenth of the training side."""
    from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
    from sklearn.neural_network import MLPRegressor  # type: ignore[import-untyped]

    network = MLPRegressor(
        hidden_layer_sizes=(64,),
        alpha=1e-3,
        early_stopping=True,
        max_iter=100,
        random_state=problem.seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(problem.train, problem.scores)
    predicted = np.asarray(network.predict(problem.test), np.float32)
    return predicted.reshape(len(problem.test), -1)


def fit_rule(
    table: Table, embeddings: Array, rows: NDArray[np.intp], encoder: str, seed: int
) -> ClusterRule:
    """Ours: fit a snapshot on some rows of a table, and serve from it."""
    return ClusterRule(fit(outcomes_of(table, embeddings, rows, encoder), FitSettings(seed=seed)))


def outcomes_of(table: Table, embeddings: Array, rows: NDArray[np.intp], encoder: str) -> Outcomes:
    """Some queries of a table as the fit reads them."""
    part = table.scores[rows]
    query_index, pair_index = np.nonzero(np.isfinite(part))
    place = rows[query_index], pair_index
    return Outcomes(
        encoder=encoder,
        embeddings=embeddings[rows],
        pairs=table.pairs,
        query_index=query_index,
        pair_index=pair_index,
        score=table.scores[place],
        tokens=table.tokens[place],
        seconds=np.full(len(query_index), np.nan, np.float32),
        costs_usd=table.costs_usd[place].astype(np.float32),
        queries=tuple(table.queries[row] for row in rows),
    )


def rule_quality(rule: ClusterRule, queries: Array) -> Array:
    """(num_queries, num_pairs) what the serving rule expects, one query at a time."""
    return np.stack([rule.qualities(query) for query in queries])


METHODS: dict[str, Callable[[Problem], Array]] = {
    "best_single": best_single,
    "knn_guarded": guarded_knn,
    "kmeans_paper": k_means,
    "ridge": ridge,
    "mlp": mlp,
}
"""The methods that `atlas` is compared with, beside those that look at tasks or test scores."""


def _overall(train: Array, scores: NDArray[np.float64], queries: Array) -> Array:
    return np.repeat(scores.mean(axis=0, dtype=np.float32)[None], len(queries), axis=0)


def _knn(size: int) -> Predictor:
    def predict(train: Array, scores: NDArray[np.float64], queries: Array) -> Array:
        k = min(size, len(train))
        quality = np.empty((len(queries), scores.shape[1]), np.float32)
        for start in range(0, len(queries), 1000):
            closeness = queries[start : start + 1000] @ train.T
            nearest = np.argpartition(closeness, -k, axis=1)[:, -k:]
            quality[start : start + 1000] = scores[nearest].mean(axis=1)
        return quality

    return predict


def _ridge(penalty: float) -> Predictor:
    def predict(train: Array, scores: NDArray[np.float64], queries: Array) -> Array:
        centre, mean = train.mean(axis=0), scores.mean(axis=0)
        centred = (train - centre).astype(np.float64)
        system = centred.T @ centred + penalty * np.eye(train.shape[1])
        weights = np.linalg.solve(system, centred.T @ (scores - mean))
        quality: Array = (mean + (queries - centre) @ weights).astype(np.float32)
        return quality

    return predict


def _plain_k_means(seed: int) -> Predictor:
    def predict(train: Array, scores: NDArray[np.float64], queries: Array) -> Array:
        centroids = estimators.k_means(train, min(_PAPER_CLUSTERS, len(train)), seed)
        member = estimators.assign(train, centroids, 1, 1.0)
        means = (member.T @ scores) / np.maximum(member.sum(axis=0), 1)[:, None]
        quality: Array = (estimators.assign(queries, centroids, 1, 1.0) @ means).astype(np.float32)
        return quality

    return predict


def _by_cross_validation(problem: Problem, candidates: list[Predictor]) -> Array:
    """Predictions of the candidate with the best held-out frontier; ties go to the first."""
    fold = np.random.default_rng(problem.seed).permutation(len(problem.train)) % _NUM_FOLDS
    values = []
    for predict in candidates:
        held_out = np.empty(problem.scores.shape, np.float32)
        for number in range(_NUM_FOLDS):
            rest = fold != number
            held_out[~rest] = predict(
                problem.train[rest], problem.scores[rest], problem.train[~rest]
            )
        values.append(problem.value(held_out))
    best = candidates[int(np.argmax(values))]
    return best(problem.train, problem.scores, problem.test)
