"""Semantic rules: how like a query is to the utterances of each route, and how sure that makes.

A query embedding comes in; out goes the likeliest route with a calibrated confidence. Whatever is
unlike every route makes no route sure, so the rule falls through; a route of its own for what lies
outside makes that an answer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from serve_app.config.rules import FittedRouteConfig, RouteConfig, SemanticRuleConfig
from serve_app.router.rules.judgement import Judgement

NUM_NEIGHBOURS = 8
"""Likest utterances whose routes are counted."""
_MAX_LOGIT = 30.0

_Floats = NDArray[np.float32]


class SemanticRule:
    """One semantic rule with the embeddings of its utterances."""

    def __init__(self, config: SemanticRuleConfig, vectors: _Floats) -> None:
        """Lay out the utterances.

        Args:
            config: The rule.
            vectors: (num_utterances, dim) unit vectors, route by route in the order written.
        """
        self.config = config
        self._vectors = np.ascontiguousarray(vectors, np.float32)
        counts = [len(route.utterances) for route in config.routes]
        self._starts = np.cumsum([0, *counts[:-1]])
        self._route_of = np.repeat(np.arange(len(counts)), counts)
        fitted = {} if config.fitted is None else config.fitted.routes
        self._weights = _weights(config.routes, fitted)

    def judge(self, vector: _Floats) -> Judgement | None:
        """The likeliest route.

        Args:
            vector: (dim,) unit vector of the query.

        Returns:
            Of equally sure routes the one that is written first; `None` if the vector is none.
        """
        if not np.isfinite(vector).all():
            return None
        features = self._features(self._vectors @ vector)
        logits = np.clip((features * self._weights).sum(axis=1), -_MAX_LOGIT, _MAX_LOGIT)
        route = int(logits.argmax())
        return Judgement(
            self.config.routes[route].name,
            score=float(features[route, 1]),
            confidence=float(1 / (1 + np.exp(-logits[route]))),
        )

    def features(self, vectors: _Floats) -> NDArray[np.float64]:
        """(num_queries, num_routes, 4) what the confidence of each route is made from.

        Args:
            vectors: (num_queries, dim) unit vectors.
        """
        return np.stack([self._features(self._vectors @ vector) for vector in vectors])

    def _features(self, similarities: _Floats) -> NDArray[np.float64]:
        """(num_routes, 4): one, best similarity, margin, share of the neighbours."""
        num_routes = len(self._starts)
        best = np.maximum.reduceat(similarities, self._starts)
        margin = best.copy()
        if num_routes > 1:
            second, first = np.partition(best, num_routes - 2)[-2:]
            margin = best - np.where(best == first, second, first)
        count = min(NUM_NEIGHBOURS, len(similarities))
        nearest = np.argpartition(-similarities, count - 1)[:count]
        share = np.bincount(self._route_of[nearest], minlength=num_routes) / count
        return np.stack([np.ones(num_routes), best, margin, share], axis=1)


def _weights(
    routes: tuple[RouteConfig, ...], fitted: Mapping[str, FittedRouteConfig]
) -> NDArray[np.float64]:
    """(num_routes, 4) of the logistic regression; all 0 where there is no calibration."""
    weights = np.zeros((len(routes), 4))
    for number, route in enumerate(routes):
        if route.name in fitted:
            of = fitted[route.name]
            weights[number] = of.bias, of.similarity, of.margin, of.neighbours
    return weights
