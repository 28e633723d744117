"""The gate: how sure a decision is, and whether the query lies inside what was profiled.

Confidence is the estimated probability that the chosen pair scores within `NEAR_ORACLE` of the best
pair of the pool on this very query, by a logistic calibration (Platt, 1999) fitted on held-out
decisions; what says most is how often decisions on like queries were right. A query is outside when
its relative distance (how much nearer it is to a cluster than to clusters on average) is past the
trusted quantile of held-out training queries. Inside, a pair takes the place of the one that is
best overall only where its advantage is certain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve_app.router.snapshots.snapshot import RouterSnapshot

NEAR_ORACLE = 0.02
"""Score points below the oracle pair that still count as right."""
POLICY_MAX_ALPHA = 0.5
"""Path 2 is trained so that a cheap wrong answer never beats a dear right one. Above this alpha the
caller's utility says otherwise, and path 1 keeps the request."""
_TIE_BREAK = 1e-6


@dataclass(frozen=True, slots=True)
class GateReading:
    """What the gate says of one decision."""

    confidence: float
    """In [0, 1]."""
    distance_quantile: float
    """Share of held-out training queries of a lesser relative distance, in [0, 1]."""
    inside: bool
    """Whether path 1 knows this kind of query."""


class Gate:
    """Judges decisions by a snapshot's calibration."""

    def __init__(self, snapshot: RouterSnapshot) -> None:
        """Take over the calibration."""
        self._quantiles = snapshot.distance_quantiles
        self._levels = np.linspace(0.0, 1.0, len(self._quantiles))
        self._trusted_quantile = snapshot.trusted_quantile
        self._trusted_distance = float(
            np.interp(snapshot.trusted_quantile, self._levels, self._quantiles)
        )
        self._head = snapshot.gate_head
        self._weights = [float(weight) for weight in snapshot.gate_weights]

    def distance_quantile(self, distance: float) -> float:
        """Where a distance lies among those of held-out training queries, in [0, 1]."""
        return float(np.interp(distance, self._quantiles, self._levels))

    def is_inside(self, distance: float) -> bool:
        """Whether a query at this distance is inside the profiled distribution."""
        return distance <= self._trusted_distance

    def judge(
        self, chosen: float, best: float, kernel: NDArray[np.float32], distance: float
    ) -> GateReading:
        """Judge one decision.

        Args:
            chosen: Expected score of the chosen pair.
            best: Highest expected score of any admitted pair; the chosen one's at alpha 0.
            kernel: (num_landmarks,) how like each landmark the query is.
            distance: The query's relative distance.
        """
        quantile = self.distance_quantile(distance)
        local = float(kernel @ self._head)
        features = (1.0, chosen, best - chosen, local, quantile)
        logit = sum(
            weight * feature for weight, feature in zip(self._weights, features, strict=True)
        )
        confidence = 1 / (1 + math.exp(-max(-30.0, min(30.0, logit))))
        return GateReading(confidence, quantile, self.is_inside(distance))


def settle(
    quality: NDArray[np.float32],
    spread: NDArray[np.float32],
    usual: int,
    best: int,
    caution: float,
) -> NDArray[np.float32]:
    """Give the pair that is best overall the benefit of the doubt.

    Where the best pair's advantage over it is within chance, it counts as just as good: few like
    queries were profiled, and their outcomes say little of a kind of query that was not.

    Args:
        quality: (num_pairs,) expected scores.
        spread: (num_pairs,) their standard deviations.
        usual: Index of the pair that is best overall.
        best: Index of the pair of the highest expected score.
        caution: Standard deviations that make an advantage certain.

    Returns:
        (num_pairs,) the same, but for `usual`.
    """
    advantage = float(quality[best] - quality[usual])
    doubt = caution * math.hypot(float(spread[best]), float(spread[usual]))
    if best == usual or advantage >= doubt:
        return quality
    settled = quality.copy()
    settled[usual] = min(1.0, float(quality[best]) + _TIE_BREAK)
    return settled


def settle_rows(
    quality: NDArray[np.float32],
    spread: NDArray[np.float32],
    overall: NDArray[np.float32],
    admitted: NDArray[np.bool_],
    caution: float,
) -> NDArray[np.float32]:
    """`settle` for many queries at once.

    Args:
        quality: (num_queries, num_pairs) expected scores.
        spread: (num_queries, num_pairs) their standard deviations.
        overall: (num_queries, num_pairs) expected scores over all queries.
        admitted: (num_queries, num_pairs) pairs that are there and were profiled.
        caution: Standard deviations that make an advantage certain.

    Returns:
        (num_queries, num_pairs) the same, but for the pair that is best overall.
    """
    rows = np.arange(len(quality))
    usual = np.where(admitted, overall, -1.0).argmax(axis=1)
    best = np.where(admitted, quality, -1.0).argmax(axis=1)
    of_best = quality[rows, best]
    doubt = caution * np.hypot(spread[rows, best], spread[rows, usual])
    stays = (best != usual) & (of_best - quality[rows, usual] < doubt) & admitted.any(axis=1)
    settled = quality.copy()
    settled[rows[stays], usual[stays]] = np.minimum(of_best[stays] + _TIE_BREAK, 1.0)
    return settled


def gate_features(
    quality: NDArray[np.float32],
    chosen: NDArray[np.intp],
    local: NDArray[np.float32],
    quantile: NDArray[np.float32],
) -> NDArray[np.float64]:
    """The inputs of the calibration for many decisions, in the order of the gate's weights.

    Args:
        quality: (num_queries, num_pairs) expected scores.
        chosen: (num_queries,) indices of the chosen pairs.
        local: (num_queries,) what the gate's head says of each query.
        quantile: (num_queries,) distance quantiles.

    Returns:
        (num_queries, 5), the first column all ones.
    """
    of_chosen = quality[np.arange(len(quality)), chosen]
    regret = quality.max(axis=1) - of_chosen
    columns = (np.ones(len(quality)), of_chosen, regret, local, quantile)
    return np.stack(columns, axis=1).astype(np.float64)
