"""Path 1: expected quality from the outcomes of like queries, minus the alpha-weighted cost.

In comes a query embedding, out go the candidates from best to worst:
`U = (1 - alpha) * quality - alpha * cost`, cost on a log scale in [0, 1] over the pool (Wu et al.,
arXiv 2601.03872, section 3.1, with the cost's unit fixed). The quality blends the Beta posteriors
of the nearest clusters with a kernel ridge head over fixed landmarks (Nystroem's approximation;
Williams and Seeger, 2001). Nothing here grows with the number of logged outcomes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import NoCandidate, SnapshotError
from serve_app.router.rules.gate import Gate, Verdict, settle
from serve_app.router.rules.utility import normalised_cost, utility
from serve_app.router.rules.voices import Voices
from serve_app.router.snapshots.snapshot import RouterSnapshot
from serve_app.schemas import Candidate, DecidedBy, Decision, Likeness, Limits, Pair

_DISCOUNT = 0.98
"""Weight that a pair's earlier feedback keeps at each new one: it remembers about 50."""
_MAX_INERTIA = 20.0
"""Feedbacks that weigh as much as everything the snapshot knows of a pair; less for a pair it knows
little of."""
_LABEL_DISCOUNT = 0.995
"""Weight that earlier feedback keeps in the mean of a pair that the snapshot does not know."""
_PRIOR_INERTIA = 3.0
"""The same for a pair the snapshot does not know."""
_PRIOR_SPREAD = 0.3
"""Score points that one point of cosine similarity is worth for such a pair, where the snapshot has
no weight for cards."""
_INTERVAL_DEVIATIONS = 1.96
"""Standard deviations either side of a 95% interval."""
_THOMPSON_DRAWS = 512
"""Draws from the posteriors per explored decision; their shares are the propensities."""


@dataclass(frozen=True)
class Prior:
    """What is known of the configured pairs before any outcome."""

    pairs: tuple[Pair, ...]
    costs_usd: NDArray[np.float32]
    """(num_pairs,) price of a typical call."""
    similarities: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    """(dim,) query embedding -> (num_pairs,) similarity to each pair's card in [0, 1]."""
    descriptors: NDArray[np.float32] | None = None
    """(num_pairs, descriptor) as the snapshot was fitted with; `None` knows none."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one query lies among the profiled questions; every estimate follows from this."""

    nearest: NDArray[np.intp]
    """The nearest clusters of every scale."""
    weights: NDArray[np.float32]
    """Their weights, which sum to 1."""
    kernel: NDArray[np.float32]
    """(num_landmarks,) how like each landmark the query is, in [0, 1]."""
    distance: float
    """Relative, to the nearest cluster; see `ClusterRule.distance`."""
    inside: bool
    """Whether that is within the profiled distribution."""
    likeness: NDArray[np.float32] | None
    """(num_cards,) similarity to the cards in [0, 1]; `None` where they do not matter."""


@dataclass(frozen=True)
class Beliefs:
    """What path 1 knows of one query; arrays over `ClusterRule.pairs`."""

    place: Place
    quality: NDArray[np.float32]
    """(num_pairs,) expected scores, whether the query is inside the profiled distribution or
    not."""
    spread: NDArray[np.float32]
    """(num_pairs,) their standard deviations."""
    overall: NDArray[np.float32]
    """(num_pairs,) expected scores over all queries."""
    outside: NDArray[np.float32]
    """(num_pairs,) the same with what the cards say; path 1 decides by it outside the profiled
    distribution."""
    similarity: NDArray[np.float32]
    """(num_pairs,) of the query to the pairs' cards in [0, 1]; 0 for a pair without one."""
    verdict: Verdict
    """Of the gate, on the best pair."""


class ClusterRule:
    """Chooses by clusters; learns from feedback.

    Invariants:
        - The snapshot never changes. What feedback taught lies beside it and is discounted.
        - Pairs are addressed by one index: the snapshot's own first, then those only the prior
          knows.
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
        """
        self._snapshot = snapshot
        self._gate = Gate(snapshot)
        self._prior = prior
        self._epsilon = epsilon
        self._method = method
        self._fallback = fallback
        self._random = np.random.default_rng(seed)
        known = set(snapshot.pairs)
        self._new = [i for i, pair in enumerate(prior.pairs if prior else ()) if pair not in known]
        new_pairs = [prior.pairs[i] for i in self._new] if prior else []
        self._pairs = (*snapshot.pairs, *new_pairs)
        self._index = {pair: i for i, pair in enumerate(self._pairs)}
        self._lay_out_costs()
        self._lay_out_qualities()
        self._lay_out_cards()
        self._models = np.array([pair.model_id for pair in self._pairs])
        self._tools = np.array([pair.tool_id for pair in self._pairs])
        self._available: tuple[Pair, ...] = ()
        self._available_index = np.zeros(0, np.intp)

    @property
    def snapshot(self) -> RouterSnapshot:
        """What was fitted."""
        return self._snapshot

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Every pair the rule can rank, in the order of `qualities`."""
        return self._pairs

    @property
    def costs(self) -> NDArray[np.float32]:
        """(num_pairs,) normalised costs in [0, 1]."""
        return self._costs

    @property
    def costs_usd(self) -> NDArray[np.float32]:
        """(num_pairs,) US dollars of a run."""
        return self._costs_usd

    @property
    def seconds(self) -> NDArray[np.float32]:
        """(num_pairs,) expected of a run; 0 where unknown."""
        return self._seconds

    def qualities(
        self, embedding: NDArray[np.float32], *, gated: bool = True
    ) -> NDArray[np.float32]:
        """(num_pairs,) expected scores in [0, 1] for one query.

        Args:
            embedding: (dim,) L2-normalised, of the snapshot's encoder.
            gated: As decisions see them: outside the profiled distribution the pairs' overall
                scores, inside it settled (see `gate.settle`).
        """
        place = self._place(embedding)
        if gated and not place.inside:
            return self._overall_qualities(place)
        quality = self._qualities(place)
        if not gated:
            return quality
        everyone = np.arange(len(self._pairs))
        return self._settled(quality, self._spread(quality, everyone, place), everyone)

    def distance(self, embedding: NDArray[np.float32]) -> float:
        """Relative distance of a query to its nearest cluster; see `_distance`."""
        return self._distance(self._closeness(embedding))

    def decide(
        self,
        embedding: NDArray[np.float32],
        limits: Limits,
        available: Sequence[Pair],
        pool_version: int,
        *,
        num_candidates: int | None = 32,
        beliefs: Beliefs | None = None,
    ) -> Decision:
        """Order the available pairs that the caller's limits admit.

        Args:
            embedding: (dim,) L2-normalised query embedding.
            limits: What the caller allows.
            available: Pairs that answer now.
            pool_version: Goes into the decision.
            num_candidates: The best ones that are named; `None` names all.
            beliefs: About this query, where they are known already; they spare the work.

        Raises:
            NoCandidate: If nothing is left. Guessing a pair here would hide it.
        """
        place = self._place(embedding) if beliefs is None else beliefs.place
        admitted = self._admitted(limits, available, place)
        if not len(admitted):
            raise NoCandidate("no pair that answers now is within the request's limits")
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
        gained = utility(limits.alpha, quality, cost)
        order = self._order(gained, num_candidates)
        order, propensity = self._explore(
            order, admitted, inside, gained, (1 - limits.alpha) * spread
        )
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
            pool_version=pool_version,
            distance_quantile=verdict.distance_quantile,
        )

    def allowed(self, limits: Limits, indices: NDArray[np.intp]) -> NDArray[np.bool_]:
        """(len(indices),) whether the caller's lists of models and tools admit these pairs."""
        allowed = np.ones(len(indices), np.bool_)
        if limits.models is not None:
            allowed &= np.isin(self._models[indices], list(limits.models))
        if limits.tools is not None:
            allowed &= np.isin(self._tools[indices], list(limits.tools))
        return allowed

    def likeness(self, embedding: NDArray[np.float32]) -> Likeness:
        """What was profiled that is like a query."""
        nearest, weights = self._assign(self._closeness(embedding))
        cluster = int(nearest[weights.argmax()])
        return Likeness(cluster, self._snapshot.examples[cluster])

    def judge(self, embedding: NDArray[np.float32]) -> Verdict:
        """The gate's verdict on the best pair for a query, whatever its cost."""
        best = float(self.qualities(embedding).max())
        return self._gate.judge(best, best, self._kernel(embedding), self.distance(embedding))

    def beliefs(self, embedding: NDArray[np.float32]) -> Beliefs:
        """Everything path 1 knows of a query, for path 2."""
        place = self._place(embedding, with_cards=True)
        quality = self._qualities(place)
        everyone = np.arange(len(self._pairs))
        spread = self._spread(quality, everyone, place)
        outside = self._overall_qualities(place)
        gated = self._settled(quality, spread, everyone) if place.inside else outside
        best = float(gated.max())
        similarity = np.zeros(len(self._pairs), np.float32)
        if place.likeness is not None:
            likeness = place.likeness[self._card_index]
            similarity = np.where(self._has_card, likeness, 0.0).astype(np.float32)
        return Beliefs(
            place=place,
            quality=quality,
            spread=spread,
            overall=self._overall.astype(np.float32),
            outside=outside,
            similarity=similarity,
            verdict=self._gate.judge(best, best, place.kernel, place.distance),
        )

    def update(self, embedding: NDArray[np.float32], pair: Pair, score: float, owner: str) -> None:
        """Learn from one feedback; a pair nobody knows is ignored.

        The score's difference from what was expected is evidence about the pair in general and
        about it in the query's clusters. Evidence is discounted per pair, so a pair that changes
        is noticed after tens of feedbacks whatever its past; and of each owner only a little
        counts, see `router.rules.voices`.

        Args:
            embedding: (dim,) of the query that was answered.
            pair: The pair that answered it.
            score: In [0, 1]; clipped.
            owner: Who gave it: the id of an API key, or `LOCAL_OWNER`.
        """
        index = self._index.get(pair)
        if index is None:
            return
        place = self._place(embedding)
        score = min(1.0, max(0.0, score))
        newcomer = index - len(self._snapshot.pairs)
        if newcomer >= 0:
            self._learn_mean(newcomer, score, owner)
        expected = self._fitted(place)[index]
        counts = np.zeros(1 + len(self._shift), np.float32)
        counts[0] = 1.0
        counts[1 + place.nearest] = place.weights
        voices = self._voices.setdefault(index, Voices(len(counts), _DISCOUNT))
        voices.add(owner, counts, score - float(expected))
        seen, residual = voices.totals()
        inertia = self._inertia[index]
        shift = residual[0] / (inertia + seen[0])
        # A cluster starts from the pair's shift and moves on with its own evidence.
        own = (residual[1:] - seen[1:] * shift) / (inertia + seen[1:])
        self._cluster_seen[:, index] = seen[1:]
        self._shift[:, index] = shift + own
        self._overall[index] = self._overall_fitted[index] + shift

    def _learn_mean(self, newcomer: int, score: float, owner: str) -> None:
        """What the profile says of the other pairs: the mean score of one that it left out.

        Remembered for longer than the shifts, which only have to notice a change.
        """
        prior = self._prior_mean[newcomer]
        labels = self._labels.setdefault(newcomer, Voices(1, _LABEL_DISCOUNT))
        labels.add(owner, np.ones(1, np.float32), score - float(prior))
        seen, residual = labels.totals()
        self._overall_fitted[len(self._snapshot.pairs) + newcomer] = prior + residual[0] / (
            _PRIOR_INERTIA + seen[0]
        )

    def _lay_out_costs(self) -> None:
        own = self._snapshot.pair_costs_usd
        added = self._prior.costs_usd[self._new] if self._prior else own[:0]
        self._costs_usd: NDArray[np.float32] = np.concatenate([own, added]).astype(np.float32)
        self._costs = normalised_cost(self._costs_usd)
        seconds = self._snapshot.seconds.mean(axis=0)
        self._seconds: NDArray[np.float32] = np.concatenate(
            [seconds, np.zeros(len(added), np.float32)]
        )
        # (clusters, pairs): what a request of each cluster costs, for the caller's limit.
        rows = np.broadcast_to(
            added.astype(np.float32), (len(self._snapshot.centroids), len(added))
        )
        self._cluster_costs_usd = np.concatenate([self._snapshot.costs_usd, rows], axis=1)

    def _lay_out_qualities(self) -> None:
        snapshot, num_new = self._snapshot, len(self._new)
        weight = snapshot.head_weight
        pair_mean = snapshot.pair_alpha / (snapshot.pair_alpha + snapshot.pair_beta)
        cluster_mean = snapshot.score_alpha / (snapshot.score_alpha + snapshot.score_beta)
        self._prior_mean = self._prior_means()
        self._overall_fitted = np.concatenate([pair_mean, self._prior_mean]).astype(np.float32)
        self._overall = self._overall_fitted.copy()
        num_clusters = len(cluster_mean)
        self._fitted_seen = np.concatenate(
            [
                snapshot.score_alpha + snapshot.score_beta,
                np.full((num_clusters, num_new), _PRIOR_INERTIA, np.float32),
            ],
            axis=1,
        )
        # The head is relative to the pair's mean, so both blend into one table and one factor.
        self._base = ((1 - weight) * cluster_mean + weight * pair_mean).astype(np.float32)
        self._labels: dict[int, Voices] = {}
        """By pair that the snapshot does not know; of the scores."""
        self._head_in = snapshot.head_in
        self._head_out = weight * snapshot.head_out
        self._anchors = snapshot.landmarks
        self._anchor_norms = (self._anchors**2).sum(axis=1)
        self._centroid_norms = (snapshot.centroids**2).sum(axis=1)
        shape = (num_clusters, len(self._pairs))
        self._shift = np.zeros(shape, np.float32)
        self._cluster_seen = np.zeros(shape, np.float32)
        self._voices: dict[int, Voices] = {}
        """By pair; cell 0 is the pair in general, the others are the clusters."""
        known = np.minimum(snapshot.pair_alpha + snapshot.pair_beta, _MAX_INERTIA)
        self._inertia = np.concatenate([known, np.full(num_new, _MAX_INERTIA)])

    def _lay_out_cards(self) -> None:
        """Where each pair's card is, and what it weighs; nothing for a pair without one."""
        place = {pair: i for i, pair in enumerate(self._prior.pairs if self._prior else ())}
        self._card_index = np.array([place.get(pair, 0) for pair in self._pairs], np.intp)
        self._has_card = np.array([pair in place for pair in self._pairs])
        snapshot = self._snapshot

        def weights(of_known: float) -> NDArray[np.float32]:
            laid_out = np.where(self._has_card, of_known, 0.0).astype(np.float32)
            laid_out[len(snapshot.pairs) :] = of_known or _PRIOR_SPREAD
            return laid_out

        self._card_weights = weights(snapshot.card_weight)
        self._outside_card_weights = weights(snapshot.outside_card_weight)
        self._cards_weigh = bool(self._card_weights.any() or self._outside_card_weights.any())

    def _prior_means(self) -> NDArray[np.float32]:
        """(num_new,) mean score expected of the pairs the snapshot does not know."""
        snapshot = self._snapshot
        bias = np.full(len(self._new), snapshot.prior_bias, np.float32)
        if self._prior is None or self._prior.descriptors is None or not len(self._new):
            return bias
        if not len(snapshot.prior_weights):  # fitted without descriptors
            return bias
        descriptors = self._prior.descriptors[self._new]
        if descriptors.shape[1] != len(snapshot.prior_weights):
            raise SnapshotError(
                f"pairs are described by {descriptors.shape[1]} numbers, the snapshot was fitted "
                f"with {len(snapshot.prior_weights)}"
            )
        return np.clip(bias + descriptors @ snapshot.prior_weights, 0.0, 1.0).astype(np.float32)

    def _closeness(self, embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        """(num_clusters,) 1 minus the squared distance to each centroid."""
        closeness: NDArray[np.float32] = (
            2 * (self._snapshot.centroids @ embedding) - self._centroid_norms
        )
        return closeness

    def _assign(
        self, closeness: NDArray[np.float32]
    ) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        """The nearest clusters of every scale and their weights, which sum to 1."""
        nearest, weights, start = [], [], 0
        for scale in self._snapshot.scales:
            part = closeness[start : start + scale.num_clusters]
            if scale.nearest == 1:
                indices = np.array([part.argmax()])
                shares = np.array([scale.weight], np.float32)
            else:
                indices = part.argpartition(-scale.nearest)[-scale.nearest :]
                closest = part[indices]
                shares = np.exp((closest - closest.max()) / self._snapshot.temperature)
                shares *= scale.weight / shares.sum()
            nearest.append(indices + start)
            weights.append(shares)
            start += scale.num_clusters
        return np.concatenate(nearest), np.concatenate(weights)

    @staticmethod
    def _distance(closeness: NDArray[np.float32]) -> float:
        """Squared distance to the nearest centroid over the mean one, as `estimators` has it.

        Near 1 for a query that is no closer to any cluster than to all of them.
        """
        apart = 1 - closeness
        return float(max(apart.min(), 0.0) / max(apart.mean(), 1e-6))

    def _kernel(self, embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        """(num_landmarks,) how like each landmark the query is, in [0, 1]."""
        # Minus the squared distance to each landmark; they and the query are unit vectors.
        similarity = 2 * (self._anchors @ embedding) - self._anchor_norms - 1
        kernel: NDArray[np.float32] = np.exp(
            self._snapshot.head_gamma * np.minimum(similarity, 0.0)
        )
        return kernel

    def _place(self, embedding: NDArray[np.float32], *, with_cards: bool = False) -> Place:
        """Where a query lies; `with_cards` looks at them whether or not they weigh anything."""
        closeness = self._closeness(embedding)
        nearest, weights = self._assign(closeness)
        distance = self._distance(closeness)
        likeness = None
        if self._prior is not None and (with_cards or self._cards_weigh):
            likeness = self._prior.similarities(embedding)
        return Place(
            nearest,
            weights,
            self._kernel(embedding),
            distance,
            self._gate.is_inside(distance),
            likeness,
        )

    def _fitted(self, place: Place) -> NDArray[np.float32]:
        """(num_pairs,) what the snapshot and the prior expect, feedback left out; not clipped."""
        quality: NDArray[np.float32] = place.weights @ self._base[place.nearest]
        if self._head_in.size and self._snapshot.head_weight:
            quality += (place.kernel @ self._head_in) @ self._head_out
        if self._new:
            added = self._overall_fitted[len(self._snapshot.pairs) :]
            quality = np.concatenate([quality, added])
        return quality + self._card_part(place, self._card_weights)

    def _card_part(self, place: Place, weights: NDArray[np.float32]) -> NDArray[np.float32] | float:
        """(num_pairs,) what the likeness of a query to the cards adds to the scores."""
        if place.likeness is None or not weights.any():
            return 0.0
        part: NDArray[np.float32] = weights * (
            place.likeness[self._card_index] - place.likeness.mean()
        )
        return part

    def _overall_qualities(self, place: Place) -> NDArray[np.float32]:
        """(num_pairs,) expected scores of a query that is like nothing profiled."""
        cards = self._card_part(place, self._outside_card_weights)
        overall: NDArray[np.float32] = np.clip(self._overall + cards, 0.0, 1.0)
        return overall

    def _qualities(self, place: Place) -> NDArray[np.float32]:
        shift = place.weights @ self._shift[place.nearest]
        return np.clip(self._fitted(place) + shift, 0.0, 1.0)

    def _spread(
        self, quality: NDArray[np.float32], admitted: NDArray[np.intp], place: Place
    ) -> NDArray[np.float32]:
        """(num_admitted,) standard deviation of the expected scores, as of a Beta posterior."""
        cells = np.ix_(place.nearest, admitted)
        seen = place.weights @ (self._fitted_seen[cells] + self._cluster_seen[cells])
        spread: NDArray[np.float32] = np.sqrt(quality * (1 - quality) / (seen + 1))
        return spread

    def _settled(
        self,
        quality: NDArray[np.float32],
        spread: NDArray[np.float32],
        admitted: NDArray[np.intp],
    ) -> NDArray[np.float32]:
        """`settle` among the admitted pairs that were profiled; the others are left as they are."""
        overall, expected = self._overall[admitted], quality
        if self._new:
            is_new = admitted >= len(self._snapshot.pairs)
            overall, expected = np.where(is_new, -1.0, overall), np.where(is_new, -1.0, quality)
        usual, best = int(overall.argmax()), int(expected.argmax())
        return settle(quality, spread, usual, best, self._snapshot.caution)

    def _admitted(
        self,
        limits: Limits,
        available: Sequence[Pair],
        place: Place,
    ) -> NDArray[np.intp]:
        """Indices of the available pairs within the limits."""
        # The pool changes rarely; comparing it costs less than indexing it anew.
        if len(available) != len(self._available) or tuple(available) != self._available:
            self._available = tuple(available)
            self._available_index = np.array(
                [self._index[pair] for pair in available if pair in self._index], np.intp
            )
        admitted = self._available_index
        admitted = admitted[self.allowed(limits, admitted)]
        if limits.max_cost_usd is not None:
            costs_usd = place.weights @ self._cluster_costs_usd[place.nearest]
            admitted = admitted[costs_usd[admitted] <= limits.max_cost_usd]
        return admitted

    @staticmethod
    def _order(utility: NDArray[np.float32], num_candidates: int | None) -> NDArray[np.intp]:
        """Indices from best to worst; equal utility keeps the pool's order."""
        if num_candidates is None or num_candidates >= len(utility):
            return np.argsort(-utility, kind="stable")
        least = np.partition(utility, -num_candidates)[-num_candidates]
        top = np.flatnonzero(utility >= least)
        return top[np.argsort(-utility[top], kind="stable")][:num_candidates]

    def _explore(
        self,
        order: NDArray[np.intp],
        admitted: NDArray[np.intp],
        inside: bool,
        utility: NDArray[np.float32],
        spread: NDArray[np.float32],
    ) -> tuple[NDArray[np.intp], float]:
        """Put the pair that is taken first, and say with which probability it was."""
        if not inside and self._fallback is not None:
            place = np.flatnonzero(admitted == self._index.get(self._fallback, -1))
            order = np.concatenate([place, order[~np.isin(order, place)]])
        if not self._epsilon:
            return order, 1.0
        if self._method == "thompson":
            draws = self._random.normal(utility, spread, (_THOMPSON_DRAWS, len(utility)))
            shares = np.bincount(draws.argmax(axis=1), minlength=len(utility)) / _THOMPSON_DRAWS
        else:
            shares = np.full(len(admitted), 1 / len(admitted))
        chances = self._epsilon * shares
        chances[order[0]] += 1 - self._epsilon
        taken = int(self._random.choice(len(chances), p=chances))
        return np.concatenate([[taken], order[order != taken]]), float(chances[taken])
