"""Made-up queries, outcomes and snapshots for the router's tests: three topics, three pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl.fit.selection import FitSettings
from rl.profile.outcomes import Outcomes
from serve_app.router.rules.base import Deciding, RoutingRequest, decide_one
from serve_app.router.snapshots.snapshot import RouterSnapshot, Scale
from serve_app.schemas import Decision, Limits, Pair

DIM = 16
PAIRS = (Pair("cheap", "none"), Pair("math", "calculator"), Pair("strong", "none"))
COSTS_USD = np.array([1e-5, 1e-4, 1e-3], np.float32)
SKILL = np.array([[0.9, 0.2, 0.92], [0.1, 0.95, 0.6], [0.2, 0.1, 0.9]])
"""(topics, pairs) probability of a right answer."""
QUICK = FitSettings(
    clusterings=((3, 1), (8, 4)), num_landmarks=48, num_repeats=1, num_folds=3, num_averaged=3
)
LIMITS = Limits(alpha=0.0, deadline_s=60.0)


def decide(
    rule: Deciding,
    query: NDArray[np.float32],
    limits: Limits,
    available: Sequence[Pair],
    pool_version: int = 1,
    *,
    planner: str | None = None,
    **request: Any,
) -> Decision:
    """What a rule does with one request; further arguments as of `RoutingRequest`."""
    asked = RoutingRequest(query, limits, **request)
    return decide_one(rule, asked, tuple(available), pool_version, planner)


def topics() -> NDArray[np.float32]:
    """(3, DIM) orthogonal unit vectors."""
    return np.eye(DIM, dtype=np.float32)[:3]


def make_queries(topic: NDArray[np.int64], seed: int, spread: float = 0.12) -> NDArray[np.float32]:
    """(num_queries, DIM) unit vectors around their topics."""
    rng = np.random.default_rng(seed)
    vectors = topics()[topic] + spread * rng.standard_normal((len(topic), DIM))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def make_outcomes(
    num_queries: int, seed: int = 0, coverage: float = 1.0, skill: NDArray[np.float64] = SKILL
) -> tuple[Outcomes, NDArray[np.int64]]:
    """Outcomes of every pair, or a random share of them, and the topic of each query."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(3, size=num_queries)
    right = rng.random((num_queries, len(PAIRS))) < skill[topic]
    query_index, pair_index = np.nonzero(rng.random(right.shape) < coverage)
    size = len(query_index)
    outcomes = Outcomes(
        encoder="test-encoder",
        embeddings=make_queries(topic, seed + 1),
        pairs=PAIRS,
        query_index=query_index,
        pair_index=pair_index,
        score=right[query_index, pair_index].astype(np.float32),
        tokens=np.full(size, 100, np.float32),
        seconds=np.full(size, np.nan, np.float32),
        costs_usd=COSTS_USD[pair_index],
        queries=tuple(f"topic {number}" for number in topic),
    )
    return outcomes, topic


def make_snapshot() -> RouterSnapshot:
    """A snapshot written by hand: one cluster per topic, plus a head that says nothing."""
    strength = 50.0
    pair_mean = SKILL.mean(axis=0)
    return RouterSnapshot(
        version=3,
        encoder="test-encoder",
        pairs=PAIRS,
        centroids=topics(),
        scales=(Scale(3, 1, 1.0),),
        temperature=0.1,
        score_alpha=(strength * SKILL).astype(np.float32),
        score_beta=(strength * (1 - SKILL)).astype(np.float32),
        tokens=np.full((3, 3), 100, np.float32),
        seconds=np.zeros((3, 3), np.float32),
        costs_usd=np.tile(COSTS_USD, (3, 1)),
        pair_alpha=(strength * pair_mean).astype(np.float32),
        pair_beta=(strength * (1 - pair_mean)).astype(np.float32),
        pair_costs_usd=COSTS_USD,
        landmarks=topics(),
        head_in=np.zeros((3, 2), np.float32),
        head_out=np.zeros((2, 3), np.float32),
        head_gamma=1.0,
        head_weight=0.0,
        card_weight=0.0,
        outside_card_weight=0.0,
        caution=1.645,
        prior_weights=np.zeros(0, np.float32),
        prior_bias=0.4,
        distance_quantiles=np.linspace(0.0, 0.8, 9, dtype=np.float32),
        trusted_quantile=0.99,
        gate_head=np.zeros(3, np.float32),
        gate_weights=np.array([-2.0, 3.0, -1.0, 2.0, -1.0], np.float32),
        examples=(("a",), ("b", "c"), ()),
        metadata={"seed": 0},
    )
