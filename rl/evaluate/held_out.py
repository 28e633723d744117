"""Held-out queries on which every pair was run: what any choice among them would have reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rl.profile.outcomes import NotMeasured, Outcomes
from serve_app.errors import ConfigError
from serve_app.router.rules.utility import normalised_cost, utility
from serve_app.schemas import Pair

MIN_QUERIES = 20
"""Fewer say nothing of a policy."""
UNKNOWN_DOMAIN = "unknown"
"""Stands for an empty domain."""


@dataclass(frozen=True)
class HeldOut:
    """Queries on which every pair was run."""

    encoder: str
    embeddings: NDArray[np.float32]
    pairs: tuple[Pair, ...]
    scores: NDArray[np.float64]
    """(num_queries, num_pairs)"""
    costs_usd: NDArray[np.float64]
    """(num_queries, num_pairs)"""
    cost: NDArray[np.float64]
    """(num_pairs,) normalised mean cost."""
    pair_costs_usd: NDArray[np.float64]
    """(num_pairs,) the mean costs."""
    domains: NDArray[np.str_]
    """(num_queries,)"""
    coverage: dict[str, float]
    """Pair to the share of all queries, also those left out, that it was run on."""
    num_dropped: int
    """Queries left out."""
    rows: NDArray[np.intp]
    """(num_queries,) which of all queries these are."""

    def utilities(self, alpha: float) -> NDArray[np.float64]:
        """(num_queries, num_pairs) of each pair on each query."""
        return utility(alpha, self.scores, self.cost)

    def values(self, chosen: NDArray[np.intp], alpha: float) -> NDArray[np.float64]:
        """(num_queries, 4) score, dollars, utility and steps of one pair per query."""
        rows = np.arange(len(self.scores))
        tables = (self.scores, self.costs_usd, self.utilities(alpha))
        columns = [table[rows, chosen] for table in tables]
        return np.stack([*columns, np.ones(len(rows))], axis=1)

    def best_single(self) -> int:
        """The pair of best mean score; the cheaper one of equals."""
        means = self.scores.mean(axis=0)
        return int(np.lexsort((self.costs_usd.mean(axis=0), -means))[0])

    def oracle(self, alpha: float) -> NDArray[np.intp]:
        """(num_queries,) the pair of best utility; the cheaper one of equals."""
        by_cost = np.argsort(self.cost, kind="stable")
        best: NDArray[np.intp] = by_cost[self.utilities(alpha)[:, by_cost].argmax(axis=1)]
        return best


def read_held_out(outcomes: Outcomes, domains: Sequence[str]) -> HeldOut:
    """The queries on which every pair was run; several outcomes of one are averaged.

    An unknown cost is the pair's mean; without any, the pool's geometric mean, as in the fit.

    Args:
        outcomes: Of the questions.
        domains: (num_queries,) may be empty strings.

    Raises:
        NotMeasured: If fewer than `MIN_QUERIES` queries have every pair's outcome.
    """
    if len(domains) != len(outcomes.embeddings):
        raise ConfigError(f"{len(domains)} domains do not fit {len(outcomes.embeddings)} queries")
    sums, counts = (matrix.toarray() for matrix in outcomes.matrices(outcomes.score))
    coverage = (counts > 0).mean(axis=0)
    rows = np.flatnonzero((counts > 0).all(axis=1))
    if len(rows) < MIN_QUERIES:
        least = int(coverage.argmin())
        raise NotMeasured(
            f"the evaluation lacks overlap: {len(rows)} of {len(counts)} held-out queries have an "
            f"outcome of every pair, {MIN_QUERIES} are needed ({outcomes.pairs[least]} has "
            f"{coverage[least]:.0%}); run `atlas profile`"
        )
    dollars, known = (matrix.toarray()[rows] for matrix in outcomes.matrices(outcomes.costs_usd))
    with np.errstate(invalid="ignore"):
        costs_usd = dollars.astype(np.float64) / known
        means = dollars.sum(axis=0, dtype=np.float64) / known.sum(axis=0)
    paid = means[np.isfinite(means) & (means > 0)]
    typical = float(np.exp(np.log(paid).mean())) if len(paid) else 0.0
    means = np.where(np.isfinite(means), means, typical)
    return HeldOut(
        encoder=outcomes.encoder,
        embeddings=outcomes.embeddings[rows],
        pairs=outcomes.pairs,
        scores=sums[rows].astype(np.float64) / counts[rows],
        costs_usd=np.where(known > 0, costs_usd, means),
        cost=normalised_cost(means).astype(np.float64),
        pair_costs_usd=means,
        domains=np.array([domains[row] or UNKNOWN_DOMAIN for row in rows]),
        coverage={
            str(pair): float(share) for pair, share in zip(outcomes.pairs, coverage, strict=True)
        },
        num_dropped=len(counts) - len(rows),
        rows=rows,
    )
