"""What a decision costs, by logged outcomes and by pairs; and what a fit costs, on made-up data."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import numpy as np

from rl.fit.fit import fit
from rl.fit.selection import FitSettings
from rl.profile.outcomes import Outcomes
from serve_app.router.rules.base import RoutingRequest, decide_one
from serve_app.router.rules.clusters import ClusterRule
from serve_app.schemas import Limits, Pair

_DIM = 384
_NUM_DECISIONS = 300
OUTCOME_COUNTS = (1_000, 10_000, 100_000, 1_000_000)
PAIR_COUNTS = (20, 100, 1_000, 5_000)


def made_up(num_outcomes: int, num_pairs: int, seed: int) -> Outcomes:
    """Queries around 12 centres; every pair on every query, each pair good at some centres."""
    rng = np.random.default_rng(seed)
    num_queries = max(1, num_outcomes // num_pairs)
    centres = rng.standard_normal((12, _DIM)).astype(np.float32)
    kind = rng.integers(12, size=num_queries)
    embeddings = centres[kind] + rng.standard_normal((num_queries, _DIM)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    chance = rng.beta(2, 2, size=(12, num_pairs)).astype(np.float32)[kind]
    size = num_queries * num_pairs
    prices = np.geomspace(1e-5, 1e-2, num_pairs, dtype=np.float32)
    return Outcomes(
        encoder="made-up",
        embeddings=embeddings,
        pairs=tuple(Pair(f"model-{number}", "none") for number in range(num_pairs)),
        query_index=np.repeat(np.arange(num_queries), num_pairs),
        pair_index=np.tile(np.arange(num_pairs), num_queries),
        score=(rng.random(size, np.float32) < chance.ravel()).astype(np.float32),
        tokens=np.full(size, 200, np.float32),
        seconds=np.ones(size, np.float32),
        costs_usd=np.tile(prices, num_queries),
    )


def decision_ms(rule: ClusterRule, outcomes: Outcomes) -> float:
    """Median milliseconds of one decision over all pairs."""
    limits = Limits(alpha=0.2, deadline_s=60.0)
    seconds = []
    for number in range(_NUM_DECISIONS):
        embedding = outcomes.embeddings[number % len(outcomes.embeddings)]
        began_s = time.perf_counter()
        decide_one(rule, RoutingRequest(embedding, limits), outcomes.pairs)
        seconds.append(time.perf_counter() - began_s)
    return float(np.median(seconds)) * 1e3


def measure(seed: int, advance: Callable[[str], None]) -> dict[str, object]:
    """Decision and fit costs; peak memory is that of the whole process so far."""
    by_outcomes, by_pairs, fit_s = {}, {}, {}
    for number in OUTCOME_COUNTS:
        advance(f"{number:,} outcomes")
        outcomes = made_up(number, 20, seed)
        began_s = time.perf_counter()
        rule = ClusterRule(fit(outcomes, FitSettings(seed=seed)))
        fit_s[str(number)] = time.perf_counter() - began_s
        by_outcomes[str(number)] = decision_ms(rule, outcomes)
    for number in PAIR_COUNTS:
        advance(f"{number:,} pairs")
        outcomes = made_up(100 * number, number, seed)
        rule = ClusterRule(fit(outcomes, FitSettings(seed=seed, num_repeats=1)))
        by_pairs[str(number)] = decision_ms(rule, outcomes)
    return {
        "decision_ms_by_outcomes": by_outcomes,
        "decision_ms_by_pairs": by_pairs,
        "fit_s_by_outcomes": fit_s,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
