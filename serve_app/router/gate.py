"""The gate: how sure a decision is, and whether the query lies inside what was profiled.

Confidence is the estimated probability that the chosen pair scores within `NEAR_ORACLE` of the best
pair of the pool on this very query, by a logistic calibration (Platt, 1999) fitted on held-out
predictions. A query is outside when it is farther from the profiled ones than the trusted quantile
of held-out training distances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve_app.router.snapshot import RouterSnapshot

NEAR_ORACLE = 0.02
"""Score points below the oracle pair that still count as right."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says of one decision."""

    confidence: float
    """In [0, 1]."""
    distance_quantile: float
    """Share of held-out training queries that are nearer to the profiled ones, in [0, 1]."""
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
        self._weights = [float(weight) for weight in snapshot.gate_weights]

    def distance_quantile(self, distance: float) -> float:
        """Where a distance lies among those of held-out training queries, in [0, 1]."""
        return float(np.interp(distance, self._quantiles, self._levels))

    def is_inside(self, distance: float) -> bool:
        """Whether a query at this distance is inside the profiled distribution."""
        return distance <= self._trusted_distance

    def judge(self, chosen: float, best: float, runner_up: float, distance: float) -> Verdict:
        """Judge one decision.

        Args:
            chosen: Expected score of the chosen pair.
            best: Highest expected score of any admitted pair; the chosen one's at alpha 0.
            runner_up: Highest expected score of any admitted pair but the chosen.
            distance: Of the query to the nearest profiled point.
        """
        quantile = self.distance_quantile(distance)
        bias, *slopes = self._weights
        features = (chosen, best - chosen, chosen - runner_up, quantile)
        logit = bias + sum(slope * feature for slope, feature in zip(slopes, features, strict=True))
        confidence = 1 / (1 + math.exp(-max(-30.0, min(30.0, logit))))
        return Verdict(confidence, quantile, self.is_inside(distance))


def gate_features(
    quality: NDArray[np.float32], chosen: NDArray[np.intp], quantile: NDArray[np.float32]
) -> NDArray[np.float64]:
    """The inputs of the calibration for many decisions, in the order of the gate's weights.

    Args:
        quality: (num_queries, num_pairs) expected scores; at least two pairs.
        chosen: (num_queries,) indices of the chosen pairs.
        quantile: (num_queries,) distance quantiles.

    Returns:
        (num_queries, 5), the first column all ones.
    """
    rows = np.arange(len(quality))
    of_chosen = quality[rows, chosen]
    others = quality.copy()
    others[rows, chosen] = -np.inf
    runner_up = others.max(axis=1)
    best = np.maximum(of_chosen, runner_up)
    columns = (np.ones(len(rows)), of_chosen, best - of_chosen, of_chosen - runner_up, quantile)
    return np.stack(columns, axis=1).astype(np.float64)
