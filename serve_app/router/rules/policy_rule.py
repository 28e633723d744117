"""LearnedRule: path 1 where the gate is sure, and the learned multi-step policy elsewhere.

In come requests, new or under way, out go decisions: run a pair, think, or answer with the best so
far. What the policy reads is built by `router.policy.features`, in training and here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import NoCandidate
from serve_app.router.policy.features import (
    States,
    answer_action,
    encode,
    legal_actions,
    think_action,
)
from serve_app.router.policy.load_policy import load_policy
from serve_app.router.policy.policy_net import PolicyNet
from serve_app.router.rules.base import Answer, Batch, RoutingRequest, none_within_limits
from serve_app.router.rules.beliefs import Beliefs, Prior
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.gate import POLICY_MAX_ALPHA
from serve_app.router.rules.judge import Judge
from serve_app.router.rules.policy_states import PolicyStates, most_agreed
from serve_app.router.rules.utility import normalised, utility
from serve_app.router.snapshots.snapshot import RouterSnapshot
from serve_app.schemas import Action, Candidate, DecidedBy, Decision, Pair

_INTERVAL_DEVIATIONS = 1.96
"""Standard deviations either side of a 95% interval."""
_BEHIND = np.float32(-1e3)
"""Added to what an action is worth: below every logit of an open one."""


class LearnedRule:
    """Chooses by a snapshot that holds a policy; learns from feedback as path 1 does.

    Invariants:
        - A new request stays with path 1 where it is surely decided (the confidence knows how far
          it is from what was profiled), or its alpha is above `POLICY_MAX_ALPHA`; every other one
          is the policy's, and so is every one under way.
        - Only what `features.open_actions` admits is ever chosen.
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
        """Load the policy; arguments as of `ClusterRule`.

        Args:
            snapshot: What was fitted and trained.
            prior: What the cards say; pairs that only it knows are candidates like any other.
            epsilon: Share of path 1's decisions that are explored. Above 0, path 2 samples its
                policy, mixed with this share of the uniform distribution over the legal actions.
            method: How path 1 explores.
            fallback: Of path 1.
            seed: Of the exploration; `None` takes the machine's entropy.

        Raises:
            SnapshotError: If the policy's tensors are missing, of a wrong shape or not finite.
        """
        self._clusters = ClusterRule(
            snapshot, prior, epsilon=epsilon, method=method, fallback=fallback, seed=seed
        )
        self._threshold, self._net = load_policy(snapshot)
        judge = Judge(self._clusters) if snapshot.verifier else None
        self._states = PolicyStates(self._clusters, prior, judge)
        self._epsilon = epsilon
        self._random = np.random.default_rng(seed)

    @property
    def snapshot(self) -> RouterSnapshot:
        """What was fitted and trained."""
        return self._clusters.snapshot

    @property
    def clusters(self) -> ClusterRule:
        """Path 1 of the same snapshot."""
        return self._clusters

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Every pair the rule can choose."""
        return self._clusters.pairs

    @property
    def costs_usd(self) -> NDArray[np.float32]:
        """(num_pairs,) US dollars of a run."""
        return self._clusters.costs_usd

    @property
    def threshold(self) -> float:
        """Confidence from which path 1 keeps a request."""
        return self._threshold

    @property
    def thinks(self) -> bool:
        """Whether the policy was trained with a planner."""
        return self.snapshot.thinks

    @property
    def net(self) -> PolicyNet:
        """Path 2's network."""
        return self._net

    def update(self, embedding: NDArray[np.float32], pair: Pair, score: float, owner: str) -> None:
        """Learn from one feedback; see `ClusterRule.update`."""
        self._clusters.update(embedding, pair, score, owner)

    def decide(self, batch: Batch) -> list[Answer]:
        """What each request does next; those of path 2 share one pass through the network.

        Returns:
            Per request its decision, or `NoCandidate` if nothing is within its limits.
        """
        answers: dict[int, Answer] = {}
        second: list[int] = []
        beliefs: list[Beliefs] = []
        for number, request in enumerate(batch.requests):
            known: Beliefs | None = None
            if request.history or request.limits.alpha <= POLICY_MAX_ALPHA:
                known = self._clusters.beliefs(request.embedding)
                if request.history or known.verdict.confidence < self._threshold:
                    second.append(number)
                    beliefs.append(known)
                    continue
            try:
                answers[number] = self._clusters.decide_request(request, batch, known)
            except NoCandidate as refusal:
                answers[number] = refusal
        if second:
            requests = [batch.requests[number] for number in second]
            learned = self._decide_learned(requests, batch, beliefs)
            answers.update(zip(second, learned, strict=True))
        return [answers[number] for number in range(len(batch.requests))]

    def _decide_learned(
        self, requests: Sequence[RoutingRequest], batch: Batch, beliefs: Sequence[Beliefs]
    ) -> list[Answer]:
        """Path 2's decisions."""
        columns = self._states.columns(requests, batch.available)
        if not len(columns):
            return [NoCandidate("no pair that answers now is known to the policy")] * len(requests)
        chances = [
            self._states.chances(*asked) if asked[0].history else ()
            for asked in zip(requests, beliefs, strict=True)
        ]
        states = self._states.of(requests, batch, beliefs, columns, chances)
        legal = legal_actions(states)
        observation = encode(states, legal)
        logits, is_open = self._net.logits(observation), observation["mask"] > 0
        # What is legal and not open comes behind, in the order of the rule `voi`.
        logits = np.where(legal & ~is_open, observation["worth"] + _BEHIND, logits)
        return [
            self._decision(
                request,
                batch,
                beliefs[row],
                states,
                row,
                logits[row],
                is_open[row],
                legal[row],
                columns,
                chances[row],
            )
            for row, request in enumerate(requests)
        ]

    def _decision(
        self,
        request: RoutingRequest,
        batch: Batch,
        beliefs: Beliefs,
        states: States,
        row: int,
        logits: NDArray[np.float32],
        is_open: NDArray[np.bool_],
        legal: NDArray[np.bool_],
        columns: NDArray[np.intp],
        judged: tuple[float | None, ...],
    ) -> Answer:
        """One row of the network's output as a decision."""
        num_pairs = len(columns)
        routes = np.flatnonzero(legal[:num_pairs])
        if not request.history and not len(routes):
            return none_within_limits()
        taken, chances, propensity = self._take(logits, is_open)
        order = routes[np.argsort(-logits[routes], kind="stable")]
        if taken < num_pairs:
            order = np.concatenate([[taken], order[order != taken]])
        action = Action.ROUTE
        if taken == think_action(num_pairs):
            action = Action.THINK
        elif taken == answer_action(num_pairs):
            action, order = Action.ANSWER, order[:0]
        alpha = request.limits.alpha
        order = order[: request.num_candidates]
        shown = columns[order]
        quality, spread = beliefs.quality[shown], beliefs.spread[shown]
        costs_usd = states.costs_usd[row, order]
        cost = np.minimum(normalised(costs_usd, states.log_cost_range[row]), 1.0)
        reach = _INTERVAL_DEVIATIONS * spread
        numbers = np.stack(
            [
                utility(alpha, quality, cost),
                quality,
                cost,
                np.maximum(quality - reach, 0.0),
                np.minimum(quality + reach, 1.0),
                costs_usd,
            ],
            axis=1,
        )
        return Decision(
            candidates=tuple(
                Candidate(self.pairs[pair], *values)
                for pair, values in zip(shown.tolist(), numbers.tolist(), strict=True)
            ),
            path=DecidedBy.POLICY,
            confidence=float(chances[taken])
            if is_open[legal].all()
            else beliefs.verdict.confidence,
            propensity=propensity,
            policy_version=self.snapshot.version,
            pool_version=batch.pool_version,
            distance_quantile=beliefs.verdict.distance_quantile,
            action=action,
            can_think=batch.can_think(request),
            likeness=self._clusters.likeness(request.embedding) if request.explain else None,
            cluster=beliefs.place.cluster,
            answer_step=self._best_step(request, judged) if action is Action.ANSWER else None,
            chances=judged,
        )

    def _best_step(self, request: RoutingRequest, judged: tuple[float | None, ...]) -> int | None:
        """The step of the likeliest answer, or that most voters agree on where nothing judges.

        Args:
            request: The request.
            judged: Of each step the chance of its answer; empty where nothing judges.

        Returns:
            `None`: there is no answer.
        """
        held = {step: chance for step, chance in enumerate(judged) if chance is not None}
        if held:
            return max(held, key=lambda step: (held[step], step))
        return most_agreed(request.history, self._clusters)

    def _take(
        self, logits: NDArray[np.float32], is_open: NDArray[np.bool_]
    ) -> tuple[int, NDArray[np.float64], float]:
        """The action taken, the policy's probability of each, and that of having taken this one."""
        masked = np.where(is_open, logits.astype(np.float64), -np.inf)
        chances = np.exp(masked - masked.max())
        chances /= chances.sum()
        if not self._epsilon:
            return int(masked.argmax()), chances, 1.0
        mixed = (1 - self._epsilon) * chances + self._epsilon * is_open / is_open.sum()
        taken = int(self._random.choice(len(mixed), p=mixed / mixed.sum()))
        return taken, chances, float(mixed[taken])
