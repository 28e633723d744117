"""LearnedRule: path 1 where the gate is sure, and the learned multi-step policy elsewhere.

In come requests, new or under way, out go decisions: run a pair, think, or answer with the best so
far. What the policy reads is built by `router.policy.features`, in training and here. Torch is
imported with this module, so only where a policy is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from serve_app.errors import AtlasError, NoCandidate, SnapshotError
from serve_app.router.policy.features import (
    DESCRIPTOR_DIM,
    MAX_STEPS,
    States,
    answer_action,
    encode,
    project,
    think_action,
)
from serve_app.router.policy.policy_net import PolicyNet
from serve_app.router.rules.clusters import Beliefs, ClusterRule, Prior
from serve_app.router.rules.gate import POLICY_MAX_ALPHA
from serve_app.router.rules.utility import cost_range, normalised, utility
from serve_app.router.snapshots.snapshot import RouterSnapshot
from serve_app.schemas import Action, Candidate, DecidedBy, Decision, Likeness, Limits, Pair, Seen

GATE_THRESHOLD = "gate.threshold"
"""Among the policy's tensors: (1,) confidence from which path 1 keeps a request."""

THINKS = "thinks"
"""Metadata of a snapshot: 1 where its policy was trained with a planner. Any other never thinks: it
never learned when that is worth it."""

_INTERVAL_DEVIATIONS = 1.96
_ROOMY_RUNS = 5.0
"""A deadline longer than so many runs of the slowest pair counts as none: the policy learned from
limits that bind."""

_Answer = Decision | AtlasError


@dataclass(frozen=True, slots=True)
class Asked:
    """One request that asks what to do next."""

    embedding: NDArray[np.float32]
    """(dim,) L2-normalised, of the query."""
    limits: Limits
    """Dollars and steps of the whole request; seconds from now on."""
    history: tuple[Seen, ...] = ()
    """What its steps showed, in their order."""
    last_answer: NDArray[np.float32] | None = None
    """(dim,) embedding of what the pair that ran last answered; `None` where it did not."""
    can_think: bool = False
    """Whether there is a planner that answers now and that the limits admit."""
    num_candidates: int | None = 32
    """The best ones that are named; `None` names all."""


class LearnedRule:
    """Chooses by a snapshot that holds a policy; learns from feedback as path 1 does.

    Invariants:
        - A new request stays with path 1 where it is surely decided (the confidence knows how far
          it is from what was profiled), or its alpha is above `POLICY_MAX_ALPHA`; every other one
          is the policy's, and so is every one under way.
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
        self._threshold, self._net = _load_policy(snapshot)
        self._thinks = bool(snapshot.metadata.get(THINKS, 0))
        self._epsilon = epsilon
        self._random = np.random.default_rng(seed)
        pairs = self._clusters.pairs
        self._index = {pair: i for i, pair in enumerate(pairs)}
        self._descriptors = _lay_out_descriptors(pairs, prior)
        self._columns: tuple[tuple[Pair, ...], NDArray[np.intp]] = ((), np.zeros(0, np.intp))

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
    def threshold(self) -> float:
        """Confidence from which path 1 keeps a request."""
        return self._threshold

    @property
    def thinks(self) -> bool:
        """Whether the policy was trained with a planner."""
        return self._thinks

    @property
    def net(self) -> PolicyNet:
        """Path 2's network."""
        return self._net

    def update(self, embedding: NDArray[np.float32], pair: Pair, score: float, owner: str) -> None:
        """Learn from one feedback; see `ClusterRule.update`."""
        self._clusters.update(embedding, pair, score, owner)

    def likeness(self, embedding: NDArray[np.float32]) -> Likeness:
        """What was profiled that is like a query."""
        return self._clusters.likeness(embedding)

    def decide(
        self,
        embedding: NDArray[np.float32],
        limits: Limits,
        available: Sequence[Pair],
        pool_version: int,
        *,
        history: tuple[Seen, ...] = (),
        last_answer: NDArray[np.float32] | None = None,
        can_think: bool = False,
        num_candidates: int | None = 32,
    ) -> Decision:
        """The decision for one request; see `decide_batch`.

        Raises:
            NoCandidate: If nothing is within the limits.
        """
        asked = Asked(embedding, limits, history, last_answer, can_think, num_candidates)
        (answer,) = self.decide_batch([asked], available, pool_version)
        if isinstance(answer, AtlasError):
            raise answer
        return answer

    def decide_batch(
        self, batch: Sequence[Asked], available: Sequence[Pair], pool_version: int
    ) -> list[_Answer]:
        """What each request does next; those of path 2 share one pass through the network.

        Args:
            batch: The requests.
            available: Pairs that answer now.
            pool_version: Goes into the decisions.

        Returns:
            Per request its decision, or `NoCandidate` if nothing is within its limits.
        """
        answers: dict[int, _Answer] = {}
        second: list[int] = []
        beliefs: list[Beliefs] = []
        for number, asked in enumerate(batch):
            known: Beliefs | None = None
            if asked.history or asked.limits.alpha <= POLICY_MAX_ALPHA:
                known = self._clusters.beliefs(asked.embedding)
                if asked.history or known.verdict.confidence < self._threshold:
                    second.append(number)
                    beliefs.append(known)
                    continue
            try:
                answers[number] = self._clusters.decide(
                    asked.embedding,
                    asked.limits,
                    available,
                    pool_version,
                    num_candidates=asked.num_candidates,
                    beliefs=known,
                )
            except NoCandidate as error:
                answers[number] = error
        if second:
            chosen = [batch[number] for number in second]
            learned = self._learned(chosen, beliefs, available, pool_version)
            answers.update(zip(second, learned, strict=True))
        return [answers[number] for number in range(len(batch))]

    def _learned(
        self,
        batch: Sequence[Asked],
        beliefs: Sequence[Beliefs],
        available: Sequence[Pair],
        pool_version: int,
    ) -> list[_Answer]:
        """Path 2's decisions."""
        began_s = time.perf_counter()
        columns = self._candidate_columns(batch, available)
        if not len(columns):
            return [NoCandidate("no pair that answers now is known to the policy") for _ in batch]
        states = self._states(batch, beliefs, columns)
        observation = encode(states)
        logits = self._forward(observation)
        legal = observation["mask"] > 0
        answers: list[_Answer] = []
        for row, asked in enumerate(batch):
            answers.append(
                self._decision(
                    asked, beliefs[row], states, row, logits[row], legal[row], columns, pool_version
                )
            )
        seconds = time.perf_counter() - began_s
        return [
            answer if isinstance(answer, AtlasError) else replace(answer, seconds=seconds)
            for answer in answers
        ]

    def _forward(self, observation: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """(B, P + 2) logits."""
        with torch.inference_mode():
            logits, _ = self._net(
                {name: torch.from_numpy(array) for name, array in observation.items()}
            )
            array: NDArray[np.float32] = logits.numpy()
        return array

    def _decision(
        self,
        asked: Asked,
        beliefs: Beliefs,
        states: States,
        row: int,
        logits: NDArray[np.float32],
        legal: NDArray[np.bool_],
        columns: NDArray[np.intp],
        pool_version: int,
    ) -> _Answer:
        """One row of the network's output as a decision."""
        num_pairs = len(columns)
        routes = np.flatnonzero(legal[:num_pairs])
        if not asked.history and not len(routes):
            return NoCandidate("no pair that answers now is within the request's limits")
        taken, chances, propensity = self._take(logits, legal)
        order = routes[np.argsort(-logits[routes], kind="stable")]
        if taken < num_pairs:
            order = np.concatenate([[taken], order[order != taken]])
        action = Action.ROUTE
        if taken == think_action(num_pairs):
            action = Action.THINK
        elif taken == answer_action(num_pairs):
            action, order = Action.ANSWER, order[:0]
        alpha = asked.limits.alpha
        order = order[: asked.num_candidates]
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
            confidence=float(chances[taken]),
            propensity=propensity,
            policy_version=self.snapshot.version,
            pool_version=pool_version,
            distance_quantile=beliefs.verdict.distance_quantile,
            action=action,
            can_think=asked.can_think,
        )

    def _take(
        self, logits: NDArray[np.float32], legal: NDArray[np.bool_]
    ) -> tuple[int, NDArray[np.float64], float]:
        """The action taken, the policy's probability of each, and that of having taken this one."""
        masked = np.where(legal, logits.astype(np.float64), -np.inf)
        chances = np.exp(masked - masked.max())
        chances /= chances.sum()
        if not self._epsilon:
            return int(masked.argmax()), chances, 1.0
        mixed = (1 - self._epsilon) * chances + self._epsilon * legal / legal.sum()
        taken = int(self._random.choice(len(mixed), p=mixed / mixed.sum()))
        return taken, chances, float(mixed[taken])

    def _candidate_columns(
        self, batch: Sequence[Asked], available: Sequence[Pair]
    ) -> NDArray[np.intp]:
        """Which pairs have a row: those that answer now, and those that ran on a request."""
        if self._columns[0] is not available and self._columns[0] != tuple(available):
            known = [self._index[pair] for pair in available if pair in self._index]
            self._columns = (tuple(available), np.array(known, np.intp))
        columns = self._columns[1]
        ran = {self._index[seen.pair] for asked in batch for seen in asked.history
               if seen.pair in self._index}  # fmt: skip
        gone = sorted(ran - set(columns.tolist())) if ran else []
        return np.concatenate([columns, np.array(gone, np.intp)]) if gone else columns

    def _states(
        self,
        batch: Sequence[Asked],
        beliefs: Sequence[Beliefs],
        columns: NDArray[np.intp],
    ) -> States:
        """What the network reads of the requests, before it is encoded."""
        size, num_pairs = len(batch), len(columns)
        place = {pair: column for column, pair in enumerate(columns.tolist())}
        num_available = len(self._columns[1])
        present = np.zeros((size, num_pairs), np.bool_)
        tried = np.zeros((size, num_pairs), np.bool_)
        failed = np.zeros((size, num_pairs), np.bool_)
        logprob = np.full((size, num_pairs), np.nan, np.float32)
        tool_errors = np.zeros((size, num_pairs), np.float32)
        agreement = np.zeros((size, num_pairs), np.float32)
        last = np.full(size, -1, np.intp)
        for row, asked in enumerate(batch):
            present[row, :num_available] = self._clusters.allowed(
                asked.limits, columns[:num_available]
            )
            runs = [(place[self._index[seen.pair]], seen) for seen in asked.history
                    if seen.pair in self._index]  # fmt: skip
            keys = [seen.answer_key for _, seen in runs if seen.answer_key is not None]
            for column, seen in runs:
                present[row, column] = tried[row, column] = True
                failed[row, column] = seen.answer_key is None
                if seen.mean_logprob is not None:
                    logprob[row, column] = seen.mean_logprob
                tool_errors[row, column] = seen.tool_errors
                if seen.answer_key is not None:
                    agreement[row, column] = keys.count(seen.answer_key) / len(keys)
                last[row] = column
        thought = np.array([any(seen.pair is None for seen in a.history) for a in batch])
        spent_usd = np.array([sum(seen.cost_usd for seen in a.history) for a in batch])
        limits_usd = [a.limits.max_cost_usd for a in batch]
        max_usd = np.array([np.inf if usd is None else usd for usd in limits_usd])
        steps_left = np.array([min(a.limits.max_steps, MAX_STEPS) - len(a.history) for a in batch])
        costs_usd = np.broadcast_to(self._clusters.costs_usd[columns], (size, num_pairs))
        seconds = np.broadcast_to(self._clusters.seconds[columns], (size, num_pairs))
        dearest_usd = steps_left * np.where(present, costs_usd, 0.0).max(axis=1)
        slowest_s = np.where(present, seconds, 0.0).max(axis=1)
        nothing = np.zeros(self.snapshot.dim, np.float32)
        return States(
            embedding=np.stack([a.embedding for a in batch]).astype(np.float32, copy=False),
            alpha=_row([a.limits.alpha for a in batch]),
            steps_left=_row(steps_left),
            usd_left=_unless_roomy(np.maximum(max_usd - spent_usd, 0.0), dearest_usd),
            seconds_left=_unless_roomy(
                np.array([a.limits.deadline_s for a in batch]), _ROOMY_RUNS * slowest_s
            ),
            can_think=~thought & np.array([self._thinks and a.can_think for a in batch]),
            thought=thought,
            present=present,
            descriptors=self._descriptors[columns],
            costs_usd=costs_usd,
            seconds=seconds,
            log_cost_range=cost_range(costs_usd, present),
            quality=np.stack([b.quality[columns] for b in beliefs]),
            spread=np.stack([b.spread[columns] for b in beliefs]),
            overall=np.stack([b.overall[columns] for b in beliefs]),
            similarity=np.stack([b.similarity[columns] for b in beliefs]),
            distance_quantile=_row([b.verdict.distance_quantile for b in beliefs]),
            confidence=_row([b.verdict.confidence for b in beliefs]),
            tried=tried,
            failed=failed,
            logprob=logprob,
            tool_errors=tool_errors,
            agreement=agreement,
            last=last,
            last_answer=np.stack(
                [nothing if a.last_answer is None else a.last_answer for a in batch]
            ).astype(np.float32, copy=False),
            spent_usd=_row(spent_usd),
        )


def use_one_thread() -> None:
    """Let this process's networks run on the calling thread alone: replicas are what scales."""
    torch.set_num_threads(1)


def _load_policy(snapshot: RouterSnapshot) -> tuple[float, PolicyNet]:
    """The gate's threshold and the network, tried once.

    Raises:
        SnapshotError: If the tensors are wrong.
    """
    tensors: dict[str, NDArray[Any]] = dict(snapshot.policy)
    threshold = tensors.pop(GATE_THRESHOLD, None)
    if threshold is None or threshold.shape != (1,) or not np.isfinite(threshold).all():
        raise SnapshotError(f"the policy's {GATE_THRESHOLD!r} must be one finite number")
    net = PolicyNet.from_tensors(tensors)
    net.eval()
    try:
        with torch.inference_mode():
            logits, _ = net({n: torch.from_numpy(a) for n, a in _blank(snapshot.dim).items()})
    except (RuntimeError, ValueError) as error:
        raise SnapshotError(
            f"the policy does not take embeddings of {snapshot.dim} numbers"
        ) from error
    if not torch.isfinite(logits).all():
        raise SnapshotError("the policy's outputs are not finite")
    return float(threshold[0]), net


def _blank(dim: int) -> dict[str, NDArray[np.float32]]:
    """An observation of one request with two pairs, of which nothing is known."""
    two = np.zeros((1, 2), np.float32)
    one, present = np.zeros(1, np.float32), np.ones((1, 2), np.bool_)
    unlimited = np.full(1, np.inf, np.float32)
    no, nothing = np.zeros(1, np.bool_), np.zeros((1, dim), np.float32)
    return encode(
        States(
            embedding=nothing,
            alpha=one,
            steps_left=one + 1,
            usd_left=unlimited,
            seconds_left=unlimited,
            can_think=no,
            thought=no,
            present=present,
            descriptors=np.zeros((2, DESCRIPTOR_DIM), np.float32),
            costs_usd=two,
            seconds=two,
            log_cost_range=np.zeros((1, 2)),
            quality=two,
            spread=two,
            overall=two,
            similarity=two,
            distance_quantile=one,
            confidence=one,
            tried=~present,
            failed=~present,
            logprob=two,
            tool_errors=two,
            agreement=two,
            last=np.full(1, -1, np.intp),
            last_answer=nothing,
            spent_usd=one,
        )
    )


def _lay_out_descriptors(pairs: tuple[Pair, ...], prior: Prior | None) -> NDArray[np.float32]:
    """(num_pairs, DESCRIPTOR_DIM); zeros for a pair without a card."""
    laid_out = np.zeros((len(pairs), DESCRIPTOR_DIM), np.float32)
    if prior is None or prior.descriptors is None:
        return laid_out
    projected = project(prior.descriptors)
    place = {pair: row for row, pair in enumerate(prior.pairs)}
    for row, pair in enumerate(pairs):
        if pair in place:
            laid_out[row] = projected[place[pair]]
    return laid_out


def _unless_roomy(
    left: NDArray[np.floating[Any]], needed: NDArray[np.floating[Any]]
) -> NDArray[np.float32]:
    """What is left, or inf where that is more than can be needed."""
    return _row(np.where(left > needed, np.inf, left))


def _row(values: Any) -> NDArray[np.float32]:
    return np.asarray(values, np.float32)
