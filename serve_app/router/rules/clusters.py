"""Path 1: expected quality from the outcomes of like queries, minus the alpha-weighted cost.

In come requests, out go the candidates of each from best to worst:
`U = (1 - alpha) * quality - alpha * cost`, cost on a log scale in [0, 1] over the pool (Wu et al.,
arXiv 2601.03872, section 3.1, with the cost's unit fixed). What is expected of each candidate is
the business of `router.rules.beliefs`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import NoCandidate
from serve_app.router.rules.admission import Admission, affordable, in_time
from serve_app.router.rules.base import Answer, Batch, RoutingRequest, none_within_limits
from serve_app.router.rules.beliefs import Beliefs, ClusterBeliefs, Place, Prior
from serve_app.router.rules.utility import utility
from serve_app.router.snapshots.snapshot import RouterSnapshot
from serve_app.schemas import Candidate, DecidedBy, Decision, Limits, Pair

_INTERVAL_DEVIATIONS = 1.96
"""Standard deviations either side of a 95% interval."""
_THOMPSON_DRAWS = 512
"""Draws from the posteriors per explored decision; their shares are the propensities."""


class ClusterRule(ClusterBeliefs):
    """Chooses by what is believed of the pairs; learns from feedback.

    Invariants:
        - What cannot take what the request needs is never a candidate.
        - What is expected to cost more than the caller allows is never a candidate; what is
          expected to take longer is one only where nothing else is, and then only the fastest.
        - One thread at a time.
    """

    def __init__(
        self,
        snapshot: RouterSnapshot,
        prior: Prior | None = None,
        *,
        epsilon: float = 0.0,
        method: Literal["epsilon_greedy", "thompson"] = "epsilon_greedy",
        fallback: Pair | None = None,
        seed: int | None = None,
    ) -> None:
        """Lay out the tables.

        Args:
            snapshot: What was fitted.
            prior: Serves the pairs that the snapshot does not know; without it they are not
                candidates.
            epsilon: Probability in [0, 1] of a pair drawn from the admitted ones.
            method: Drawn uniformly, or by the chance that the pair is best (Thompson, 1933).
            fallback: Comes first when the query is outside the profiled distribution; `None` takes
                the best pair overall.
            seed: Of the exploration; `None` takes the machine's entropy.

        Raises:
            SnapshotError: If the prior describes pairs by other numbers than the snapshot.
        """
        super().__init__(snapshot, prior)
        self._epsilon = epsilon
        self._method = method
        self._fallback = fallback
        self._random = np.random.default_rng(seed)
        self._admission = Admission(self._pairs)

    @property
    def clusters(self) -> ClusterRule:
        """This rule: it is path 1 of its snapshot."""
        return self

    def decide(self, batch: Batch) -> list[Answer]:
        """Order the available pairs that each caller's limits admit.

        Returns:
            Per request its decision, or `NoCandidate` if nothing is within its limits.
        """
        answers: list[Answer] = []
        for request in batch.requests:
            try:
                answers.append(self.decide_request(request, batch))
            except NoCandidate as refusal:
                answers.append(refusal)
        return answers

    def decide_request(
        self, request: RoutingRequest, batch: Batch, beliefs: Beliefs | None = None
    ) -> Decision:
        """The decision for one request of a batch.

        Args:
            request: The request.
            batch: Has the pool.
            beliefs: About this query, where they are known already; they spare the work.

        Raises:
            NoCandidate: If nothing is within its limits. Guessing a pair here would hide it.
        """
        alpha = request.limits.alpha
        place = self._place(request.embedding) if beliefs is None else beliefs.place
        admitted = self._admitted(request.limits, batch, place)
        if not len(admitted):
            raise none_within_limits()
        inside = place.inside
        if not inside:
            quality = self._overall_qualities(place)[admitted]
        elif beliefs is None:
            quality = self._qualities(place)[admitted]
        else:
            quality = beliefs.quality[admitted]
        spread = self._spread(quality, admitted, place)
        if inside:
            quality = self._settled(quality, spread, admitted)
        cost = self._costs[admitted]
        gained = utility(alpha, quality, cost)
        order = self._order(gained, request.num_candidates)
        order, propensity = self._explore(order, admitted, inside, gained, (1 - alpha) * spread)
        reach = _INTERVAL_DEVIATIONS * spread
        low, high = np.maximum(quality - reach, 0.0), np.minimum(quality + reach, 1.0)
        costs_usd = place.weights @ self._cluster_costs_usd[np.ix_(place.nearest, admitted[order])]
        chosen = float(quality[order[0]])
        verdict = self._gate.judge(chosen, float(quality.max()), place.kernel, place.distance)
        return Decision(
            candidates=tuple(
                Candidate(self._pairs[pair], *numbers)
                for pair, *numbers in zip(
                    admitted[order].tolist(),
                    gained[order].tolist(),
                    quality[order].tolist(),
                    cost[order].tolist(),
                    low[order].tolist(),
                    high[order].tolist(),
                    costs_usd.tolist(),
                    strict=True,
                )
            ),
            path=DecidedBy.CLUSTERS if inside else DecidedBy.OUT_OF_DISTRIBUTION,
            confidence=verdict.confidence,
            propensity=propensity,
            policy_version=self._snapshot.version,
            pool_version=batch.pool_version,
            distance_quantile=verdict.distance_quantile,
            likeness=self.likeness(request.embedding) if request.explain else None,
            cluster=place.cluster,
        )

    def _admitted(self, limits: Limits, batch: Batch, place: Place) -> NDArray[np.intp]:
        """Indices of the available pairs within the limits."""
        admitted = self._admission.available(batch.available)
        admitted = admitted[self._admission.admits(limits, admitted, batch.abilities)]
        if limits.max_cost_usd is not None:
            costs_usd = place.weights @ self._cluster_costs_usd[place.nearest]
            admitted = admitted[affordable(limits, costs_usd[admitted])]
        if limits.deadline_s < self._slowest_s:
            seconds = place.weights @ self._cluster_seconds[place.nearest]
            admitted = admitted[in_time(limits, seconds[admitted])]
        return admitted

    @staticmethod
    def _order(gained: NDArray[np.float32], num_candidates: int | None) -> NDArray[np.intp]:
        """Indices from best to worst; equal utility keeps the pool's order."""
        if num_candidates is None or num_candidates >= len(gained):
            return np.argsort(-gained, kind="stable")
        least = np.partition(gained, -num_candidates)[-num_candidates]
        top = np.flatnonzero(gained >= least)
        return top[np.argsort(-gained[top], kind="stable")][:num_candidates]

    def _explore(
        self,
        order: NDArray[np.intp],
        admitted: NDArray[np.intp],
        inside: bool,
        gained: NDArray[np.float32],
        spread: NDArray[np.float32],
    ) -> tuple[NDArray[np.intp], float]:
        """Put the pair that is taken first, and say with which probability it was."""
        if not inside and self._fallback is not None:
            place = np.flatnonzero(admitted == self._index.get(self._fallback, -1))
            order = np.concatenate([place, order[~np.isin(order, place)]])
        if not self._epsilon:
            return order, 1.0
        if self._method == "thompson":
            draws = self._random.normal(gained, spread, (_THOMPSON_DRAWS, len(gained)))
            shares = np.bincount(draws.argmax(axis=1), minlength=len(gained)) / _THOMPSON_DRAWS
        else:
            shares = np.full(len(admitted), 1 / len(admitted))
        chances = self._epsilon * shares
        chances[order[0]] += 1 - self._epsilon
        taken = int(self._random.choice(len(chances), p=chances))
        return np.concatenate([[taken], order[order != taken]]), float(chances[taken])
