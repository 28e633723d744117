"""VoiRule: another candidate runs where what its answer is worth exceeds its price.

In come requests, new or under way, out go decisions. Path 1 chooses the first candidate, or the
cards far from what was profiled. Then the verifier says how likely each answer is right. Where
`(1 - alpha)` times the expected rise of the best chance exceeds alpha times the rise in cost, the
candidate of the greatest difference runs next (the value of information; Howard, 1966); else the
answer of the highest chance is returned.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import NoCandidate
from serve_app.router.policy.features import (
    OPENING_QUANTILE,
    States,
    answer_action,
    legal_actions,
    openings,
    worth_of,
)
from serve_app.router.rules.base import Answer, Batch, RoutingRequest, none_within_limits
from serve_app.router.rules.beliefs import Beliefs, Prior
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.judge import Judge
from serve_app.router.rules.policy_states import PolicyStates
from serve_app.router.rules.utility import normalised, utility
from serve_app.router.snapshots.snapshot import RouterSnapshot
from serve_app.schemas import Action, Candidate, DecidedBy, Decision, Pair

_INTERVAL_DEVIATIONS = 1.96
"""Standard deviations either side of a 95% interval."""


class VoiRule:
    """Chooses by the value of information; learns from feedback as path 1 does.

    Invariants:
        - A request of one step is answered as path 1 would.
        - Only what `features.legal_actions` admits is ever chosen.
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
        """Read the verifier; arguments as of `ClusterRule`, which explores the first candidate.

        Raises:
            SnapshotError: If the snapshot has no verifier, or a damaged one.
        """
        self._clusters = ClusterRule(
            snapshot, prior, epsilon=epsilon, method=method, fallback=fallback, seed=seed
        )
        self._states = PolicyStates(self._clusters, prior, Judge(self._clusters))

    @property
    def snapshot(self) -> RouterSnapshot:
        """What was fitted."""
        return self._clusters.snapshot

    @property
    def clusters(self) -> ClusterRule:
        """Path 1 of the same snapshot."""
        return self._clusters

    @property
    def costs_usd(self) -> NDArray[np.float32]:
        """(num_pairs,) US dollars of a run."""
        return self._clusters.costs_usd

    def update(self, embedding: NDArray[np.float32], pair: Pair, score: float, owner: str) -> None:
        """Learn from one feedback; see `ClusterRule.update`."""
        self._clusters.update(embedding, pair, score, owner)

    def decide(self, batch: Batch) -> list[Answer]:
        """What each request does next.

        Returns:
            Per request its decision, or `NoCandidate` if nothing is within its limits.
        """
        return [self._decide(request, batch) for request in batch.requests]

    def _decide(self, request: RoutingRequest, batch: Batch) -> Answer:
        beliefs = self._clusters.beliefs(request.embedding)
        if request.history:
            return self._decide_next(request, batch, beliefs)
        try:
            first = self._clusters.decide_request(request, batch, beliefs)
        except NoCandidate as refusal:
            return refusal
        if beliefs.verdict.distance_quantile >= OPENING_QUANTILE:
            first = self._opened(first, request, batch, beliefs)
        return replace(first, path=DecidedBy.VOI)

    def _opened(
        self, first: Decision, request: RoutingRequest, batch: Batch, beliefs: Beliefs
    ) -> Decision:
        """Path 1's decision; if the cards choose the first run, their choice comes first."""
        columns = self._states.columns([request], batch.available)
        states = self._states.of([request], batch, [beliefs], columns, [()])
        legal = legal_actions(states)
        (chosen,) = openings(states, legal)
        if chosen < 0:
            return first
        routes = np.flatnonzero(legal[0, : len(columns)])
        order = routes[np.argsort(-worth_of(states, legal)[0][routes], kind="stable")]
        order = np.concatenate([[chosen], order[order != chosen]])
        candidates = self._candidates(request, beliefs, states, columns, order)
        return replace(first, candidates=candidates, propensity=1.0)

    def _decide_next(self, request: RoutingRequest, batch: Batch, beliefs: Beliefs) -> Answer:
        columns = self._states.columns([request], batch.available)
        if not len(columns):
            return none_within_limits()
        chances = self._states.chances(request, beliefs)
        states = self._states.of([request], batch, [beliefs], columns, [chances])
        legal = legal_actions(states)
        worth = worth_of(states, legal)[0]
        routes = np.flatnonzero(legal[0, : len(columns)])
        order = routes[np.argsort(-worth[routes], kind="stable")]
        held = {step: chance for step, chance in enumerate(chances) if chance is not None}
        best_step = max(held, key=lambda step: (held[step], step), default=None)
        pays = bool(len(order)) and worth[order[0]] > worth[answer_action(len(columns))]
        goes_on = bool(len(order)) and (best_step is None or pays)
        return Decision(
            candidates=self._candidates(request, beliefs, states, columns, order)
            if goes_on
            else (),
            path=DecidedBy.VOI,
            confidence=held[best_step] if best_step is not None else 0.0,
            propensity=1.0,
            policy_version=self.snapshot.version,
            pool_version=batch.pool_version,
            distance_quantile=beliefs.verdict.distance_quantile,
            action=Action.ROUTE if goes_on else Action.ANSWER,
            likeness=self._clusters.likeness(request.embedding) if request.explain else None,
            answer_step=None if goes_on else best_step,
            chances=chances,
        )

    def _candidates(
        self,
        request: RoutingRequest,
        beliefs: Beliefs,
        states: States,
        columns: NDArray[np.intp],
        order: NDArray[np.intp],
    ) -> tuple[Candidate, ...]:
        """The pairs that may run next, the best first."""
        order = order[: request.num_candidates]
        shown = columns[order]
        quality, spread = beliefs.quality[shown], beliefs.spread[shown]
        costs_usd = states.costs_usd[0, order]
        cost = np.minimum(normalised(costs_usd, states.log_cost_range[0]), 1.0)
        reach = _INTERVAL_DEVIATIONS * spread
        low, high = np.maximum(quality - reach, 0.0), np.minimum(quality + reach, 1.0)
        gained = utility(request.limits.alpha, quality, cost)
        columns_shown = np.stack([gained, quality, cost, low, high, costs_usd], axis=1)
        return tuple(
            Candidate(self._clusters.pairs[pair], *numbers)
            for pair, numbers in zip(shown.tolist(), columns_shown.tolist(), strict=True)
        )
