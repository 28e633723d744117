"""VoiRule: another candidate runs where what its answer is worth exceeds its price.

In come requests, new or under way, out go decisions. Path 1 chooses the first candidate. Then the
verifier says how likely each answer is right. Where `(1 - alpha)` times the expected rise of the
best chance exceeds alpha times the rise in cost, the candidate of the greatest difference runs next
(the value of information; Howard, 1966); else the answer of the highest chance is returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import NoCandidate
from serve_app.router.policy.features import States, legal_actions
from serve_app.router.policy.verifier import Answers, Verifier, beliefs_of
from serve_app.router.rules.base import Answer, Batch, RoutingRequest, none_within_limits
from serve_app.router.rules.beliefs import Beliefs, Prior
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.policy_states import PolicyStates
from serve_app.router.rules.utility import normalised, utility
from serve_app.router.snapshots.snapshot import RouterSnapshot
from serve_app.schemas import Action, Candidate, DecidedBy, Decision, Pair
from serve_app.signals import stacked

_LEAST_RISE = 0.02
"""Expected rise of the best chance below which nothing runs, whatever it costs: a step takes
time."""
_INTERVAL_DEVIATIONS = 1.96
"""Standard deviations either side of a 95% interval."""


class Judge:
    """Knows the chances of the answers that a request holds."""

    def __init__(self, clusters: ClusterRule) -> None:
        """Read the verifier of a snapshot.

        Args:
            clusters: Path 1 of the snapshot.

        Raises:
            SnapshotError: If it is damaged.
        """
        snapshot = clusters.snapshot
        self.verifier = Verifier(snapshot.verifier, len(snapshot.pairs))
        self._num_known = len(snapshot.pairs)
        self._voters = clusters.voters
        self._index = {pair: place for place, pair in enumerate(clusters.pairs)}

    def chances(self, request: RoutingRequest, beliefs: Beliefs) -> tuple[float | None, ...]:
        """Of each step the chance that its answer is right; `None`: it gave none.

        Args:
            request: The request.
            beliefs: Path 1's, of its query.
        """
        history = request.history
        steps = [
            step
            for step, seen in enumerate(history)
            if seen.answer_key is not None and seen.pair in self._index
        ]
        chances: list[float | None] = [None] * len(history)
        if not steps:
            return tuple(chances)
        held = [history[step] for step in steps]
        pairs = np.array([self._index[seen.pair] for seen in held if seen.pair], np.intp)
        number = {key: n for n, key in enumerate(dict.fromkeys(of.answer_key for of in held))}
        inside = beliefs.place.inside
        believed = beliefs_of(
            beliefs.quality[pairs],
            beliefs.spread[pairs],
            beliefs.overall[pairs],
            beliefs.outside[pairs],
            beliefs.similarity[pairs],
            float(beliefs.quality.max()),
            beliefs.verdict.distance_quantile,
            inside,
        )
        found = self.verifier.chances(
            Answers(
                beliefs=believed,
                numbers=stacked([seen.signals for seen in held]),
                keys=np.array([number[seen.answer_key] for seen in held], np.intp),
                voters=self._voters[pairs],
                vectors=self._vectors(request, steps),
                query=request.embedding,
                pairs=np.where(pairs < self._num_known, pairs, -1),
            )
        )
        for step, chance in zip(steps, found.tolist(), strict=True):
            chances[step] = chance
        return tuple(chances)

    @staticmethod
    def _vectors(request: RoutingRequest, steps: Sequence[int]) -> NDArray[np.float32]:
        """(n, dim) embeddings of the answers; NaN where unknown."""
        vectors = np.full((len(steps), len(request.embedding)), np.nan, np.float32)
        for row, step in enumerate(steps):
            known = request.answers[step] if step < len(request.answers) else None
            if known is None and step == steps[-1]:
                known = request.last_answer
            if known is not None:
                vectors[row] = known
        return vectors


class VoiRule:
    """Chooses by the value of information; learns from feedback as path 1 does.

    Invariants:
        - The first candidate is path 1's, so a request of one step is answered as path 1 would.
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
        self._judge = Judge(self._clusters)
        self._states = PolicyStates(self._clusters, prior)

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
        return replace(first, path=DecidedBy.VOI)

    def _decide_next(self, request: RoutingRequest, batch: Batch, beliefs: Beliefs) -> Answer:
        columns = self._states.columns([request], batch.available)
        if not len(columns):
            return none_within_limits()
        states = self._states.of([request], batch, [beliefs], columns)
        routes = np.flatnonzero(legal_actions(states)[0, : len(columns)])
        chances = self._judge.chances(request, beliefs)
        held = {step: chance for step, chance in enumerate(chances) if chance is not None}
        quality = (beliefs.quality if beliefs.place.inside else beliefs.outside)[columns]
        best = max(held.values(), default=0.0)
        values, rises = self._values(request, states, columns, quality, best)
        order = routes[np.argsort(-values[routes], kind="stable")]
        best_step = max(held, key=lambda step: (held[step], step), default=None)
        pays = bool(len(order)) and values[order[0]] > 0 and rises[order[0]] >= _LEAST_RISE
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

    def _values(
        self,
        request: RoutingRequest,
        states: States,
        columns: NDArray[np.intp],
        quality: NDArray[np.float32],
        best: float,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(num_pairs,) what the run of each pair would gain, and the expected rises of the best."""
        alpha = request.limits.alpha
        rises = self._judge.verifier.prospects(quality, best)
        rises = np.where(self._states.repeats(request, columns), 0.0, rises)
        usd, tried = states.costs_usd[0], states.tried[0]
        spent = float(usd[tried].sum())
        cost_range = states.log_cost_range[0]
        now = normalised(np.array([spent]), cost_range)
        cost = normalised(spent + usd, cost_range) - now
        return utility(alpha, rises, cost), rises

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
