"""The simple methods that a learned policy is held against, learnt from the same questions.

One choice each: nearest neighbours, ridge regression, and the nearest clusters. Several runs: a
cascade with a threshold on the verifier's chance (as FrugalGPT's; Chen et al., 2023).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.routing.methods import Problem, guarded_knn, ridge
from rl.fit import estimators
from rl.ppo.episodes import Episodes
from rl.ppo.table import ReplayTable
from serve_app.router.rules.utility import normalised, pool_range, utility

Array = NDArray[np.float64]
Floats = NDArray[np.float32]
Index = NDArray[np.intp]

KNN, RIDGE, TOP_P, CASCADE = "guarded kNN", "ridge", "top-p clusters", "threshold cascade"
_NUM_CLUSTERS, _TOP_P, _SHARPNESS = 60, 4, 9.0
"""Of the nearest clusters: as many of these count, by `exp(sharpness * similarity)`."""
_SHORTLISTS = (1, 2, 3, 4)
_THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)


def one_step_qualities(train: ReplayTable, queries: Floats, seed: int) -> dict[str, Floats]:
    """What each method of one choice expects; (num_queries, num_pairs) scores by its name.

    Args:
        train: The questions to learn from.
        queries: (num_queries, dim) embeddings of those to route.
        seed: Of the clusters.
    """
    measured = train.measured[0]
    usual = np.where(measured, train.score[0], 0.0).sum(axis=0) / np.maximum(
        measured.sum(axis=0), 1
    )
    scores = np.where(measured, train.score[0], usual).astype(np.float64)
    problem = Problem(
        train=train.embeddings,
        scores=scores,
        train_costs_usd=train.costs_usd[0].astype(np.float64),
        costs_usd=train.pair_costs_usd.astype(np.float64),
        test=queries,
        seed=seed,
    )
    return {
        KNN: guarded_knn(problem),
        RIDGE: ridge(problem),
        TOP_P: _nearest_clusters(train.embeddings, scores, queries, seed),
    }


def _nearest_clusters(train: Floats, scores: Array, queries: Floats, seed: int) -> Floats:
    """Means of the few nearest clusters, as Avengers-Pro routes (Zhang et al., 2025)."""
    size = min(_NUM_CLUSTERS, max(1, len(train) // 4))
    centroids = estimators.k_means(train, size, seed)
    own = (train @ centroids.T).argmax(axis=1)
    counts = np.bincount(own, minlength=size)[:, None]
    sums = np.zeros((size, scores.shape[1]))
    np.add.at(sums, own, scores)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), scores.mean(axis=0))
    likeness = queries @ centroids.T
    number = min(_TOP_P, size)
    nearest = np.argpartition(-likeness, number - 1, axis=1)[:, :number]
    weights = np.exp(_SHARPNESS * np.take_along_axis(likeness, nearest, axis=1))
    weights /= weights.sum(axis=1, keepdims=True)
    quality: Floats = np.einsum("qc,qcp->qp", weights, means[nearest]).astype(np.float32)
    return quality


@dataclass(frozen=True)
class Cascade:
    """The few best candidates by path 1, the cheapest first, until one is likely right."""

    shortlist: int
    threshold: float

    def choose(self, episodes: Episodes, rows: Index) -> tuple[Index, Array]:
        """See `rl.ppo.rollout.Chooser`."""
        states = episodes.states
        present = states.present[rows]
        expected = np.where(present, states.decided[rows], -1.0)
        listed = _best(expected, min(self.shortlist, present.shape[1])) & present
        best = np.nan_to_num(states.chance[rows], nan=-1.0).max(axis=1)
        enough = best >= self.threshold
        open_ = listed & episodes.legal()[rows][:, : present.shape[1]]
        cheapest = np.where(open_, states.costs_usd[rows], np.inf).argmin(axis=1)
        goes_on = open_.any(axis=1) & ~enough
        answer = present.shape[1] + 1
        return np.where(goes_on, cheapest, answer), np.ones(len(rows))


def tuned_cascade(train: ReplayTable, alone: Floats, decided: Floats, alpha: float) -> Cascade:
    """The shortlist and threshold of the highest utility on the training questions.

    Args:
        train: Their outcomes.
        alone: (num_train, num_pairs) chance of each answer by a verifier that did not see it.
        decided: (num_train, num_pairs) what a path 1 that did not see them expects.
        alpha: Cost-quality dial in [0, 1].
    """
    found = {
        (size, threshold): _replayed(train, alone, decided, size, threshold, alpha)
        for size, threshold in itertools.product(_SHORTLISTS, _THRESHOLDS)
    }
    return Cascade(*max(found, key=lambda of: found[of]))


def _replayed(
    train: ReplayTable, alone: Floats, decided: Floats, size: int, threshold: float, alpha: float
) -> float:
    """Mean utility of a cascade on the training questions."""
    usd = train.pair_costs_usd.astype(np.float64)
    listed = _best(np.where(train.measured[0], decided, -1.0), size)
    rows = np.arange(train.num_queries)
    best, score, spent = np.full(len(rows), -1.0), np.zeros(len(rows)), np.zeros(len(rows))
    for pair in np.argsort(usd, kind="stable"):
        runs = listed[:, pair] & train.measured[0][:, pair] & (best < threshold)
        chance = np.where(np.isfinite(alone[:, pair]), alone[:, pair], -1.0)
        better = runs & (chance > best)
        score = np.where(better, train.score[0][:, pair], score)
        best = np.where(better, chance, best)
        spent += runs * usd[pair]
    return float(utility(alpha, score, normalised(spent, pool_range(usd))).mean())


def _best(values: NDArray[np.floating], number: int) -> NDArray[np.bool_]:
    """(n, P) the highest of each row."""
    order = np.argsort(-values, axis=1, kind="stable")[:, :number]
    kept = np.zeros(values.shape, np.bool_)
    np.put_along_axis(kept, order, True, axis=1)
    return kept
