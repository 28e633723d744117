"""What path 1 believes of a query: expected scores, costs and seconds of every pair.

In come a snapshot, what the cards say, and users' verdicts; out come arrays over the pairs for one
query embedding. The quality blends the Beta posteriors of the nearest clusters with a kernel ridge
head over fixed landmarks (Nystroem's approximation; Williams and Seeger, 2001). Nothing here grows
with the number of logged outcomes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import SnapshotError
from serve_app.router.rules.feedback import PRIOR_INERTIA, Feedback
from serve_app.router.rules.gate import Gate, GateReading, settle
from serve_app.router.rules.utility import normalised_cost
from serve_app.router.snapshots.snapshot import RouterSnapshot
from serve_app.schemas import Drift, Likeness, Pair

_PRIOR_SPREAD = 0.3
"""Score points that one point of cosine similarity is worth for a pair that the snapshot does not
know, where it has no weight for cards."""


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
    """Relative, to the nearest cluster; see `ClusterBeliefs.distance`."""
    inside: bool
    """Whether that is within the profiled distribution."""
    likeness: NDArray[np.float32] | None
    """(num_cards,) similarity to the cards in [0, 1]; `None` where they do not matter."""

    @property
    def cluster(self) -> int | None:
        """The cluster that weighs most; `None` outside the profiled distribution."""
        return int(self.nearest[self.weights.argmax()]) if self.inside else None


@dataclass(frozen=True)
class Beliefs:
    """What path 1 knows of one query; arrays over `ClusterBeliefs.pairs`."""

    place: Place
    quality: NDArray[np.float32]
    """(num_pairs,) expected scores, whether the query is inside the profiled distribution or
    not."""
    spread: NDArray[np.float32]
    """(num_pairs,) their standard deviations."""
    overall: NDArray[np.float32]
    """(num_pairs,) expected scores over all queries."""
    outside: NDArray[np.float32]
    """(num_pairs,) expected scores of a query like nothing profiled, by the cards where they say
    anything; path 1 decides by it outside the profiled distribution."""
    similarity: NDArray[np.float32]
    """(num_pairs,) of the query to the pairs' cards in [0, 1]; 0 for a pair without one."""
    verdict: GateReading
    """Of the gate, on the best pair."""


class ClusterBeliefs:
    """Knows what to expect of the pairs; learns from feedback.

    Invariants:
        - The snapshot never changes. What feedback taught lies beside it and is discounted.
        - Pairs are addressed by one index: the snapshot's own first, then those only the prior
          knows.
        - One thread at a time.
    """

    def __init__(self, snapshot: RouterSnapshot, prior: Prior | None = None) -> None:
        """Lay out the tables.

        Args:
            snapshot: What was fitted.
            prior: Serves the pairs that the snapshot does not know; without it they are not
                candidates.

        Raises:
            SnapshotError: If the prior describes pairs by other numbers than the snapshot.
        """
        self._snapshot = snapshot
        self._gate = Gate(snapshot)
        self._prior = prior
        known = set(snapshot.pairs)
        self._new = [i for i, pair in enumerate(prior.pairs if prior else ()) if pair not in known]
        new_pairs = [prior.pairs[i] for i in self._new] if prior else []
        self._pairs = (*snapshot.pairs, *new_pairs)
        self._index = {pair: i for i, pair in enumerate(self._pairs)}
        self._feedback = Feedback(snapshot, self._prior_means())
        self._lay_out_costs()
        self._lay_out_qualities()
        self._lay_out_cards()

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
    def voters(self) -> NDArray[np.intp]:
        """(num_pairs,) as of `RouterSnapshot.voters`; a pair that it does not know is one."""
        known = self._snapshot.voters
        return np.concatenate([known, np.arange(len(known), len(self._pairs))])

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

    def likeness(self, embedding: NDArray[np.float32]) -> Likeness:
        """What was profiled that is like a query."""
        nearest, weights = self._assign(self._closeness(embedding))
        cluster = int(nearest[weights.argmax()])
        return Likeness(cluster, self._snapshot.examples[cluster])

    def judge(self, embedding: NDArray[np.float32]) -> GateReading:
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
            overall=self._feedback.overall.astype(np.float32),
            outside=outside,
            similarity=similarity,
            verdict=self._gate.judge(best, best, place.kernel, place.distance),
        )

    def update(self, embedding: NDArray[np.float32], pair: Pair, score: float, owner: str) -> None:
        """Learn from one feedback; a pair nobody knows is ignored.

        The score's difference from what was expected is evidence about the pair in general and
        about it in the query's clusters; see `router.rules.feedback`.

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
        self._feedback.learn_mean(index, score, owner)
        residual = score - float(self._fitted(place)[index])
        self._feedback.learn(index, place.nearest, place.weights, residual, owner)

    def drifts(self) -> tuple[Drift, ...]:
        """How far verdicts are from what was expected, of each pair that has any."""
        found = []
        for index, pair in enumerate(self._pairs):
            seen, difference, deviations = self._feedback.drift(index)
            if seen:
                expected = float(self._feedback.fitted[index])
                found.append(Drift(pair, seen, expected, expected + difference, deviations))
        return tuple(found)

    def _lay_out_costs(self) -> None:
        own = self._snapshot.pair_costs_usd
        added = self._prior.costs_usd[self._new] if self._prior else own[:0]
        self._costs_usd: NDArray[np.float32] = np.concatenate([own, added]).astype(np.float32)
        self._costs = normalised_cost(self._costs_usd)
        seconds = self._snapshot.seconds.mean(axis=0)
        self._seconds: NDArray[np.float32] = np.concatenate(
            [seconds, np.zeros(len(added), np.float32)]
        )
        # (clusters, pairs): of a request of each cluster, for the caller's limits.
        rows = np.broadcast_to(
            added.astype(np.float32), (len(self._snapshot.centroids), len(added))
        )
        self._cluster_costs_usd = np.concatenate([self._snapshot.costs_usd, rows], axis=1)
        self._cluster_seconds = np.concatenate(
            [self._snapshot.seconds, np.zeros_like(rows)], axis=1
        )
        self._slowest_s = float(self._cluster_seconds.max())

    def _lay_out_qualities(self) -> None:
        snapshot, num_new = self._snapshot, len(self._new)
        weight = snapshot.head_weight
        pair_mean = snapshot.pair_alpha / (snapshot.pair_alpha + snapshot.pair_beta)
        cluster_mean = snapshot.score_alpha / (snapshot.score_alpha + snapshot.score_beta)
        self._fitted_seen = np.concatenate(
            [
                snapshot.score_alpha + snapshot.score_beta,
                np.full((len(cluster_mean), num_new), PRIOR_INERTIA, np.float32),
            ],
            axis=1,
        )
        # The head is relative to the pair's mean, so both blend into one table and one factor.
        self._base = ((1 - weight) * cluster_mean + weight * pair_mean).astype(np.float32)
        self._head_in = snapshot.head_in
        self._head_out = weight * snapshot.head_out
        self._anchors = snapshot.landmarks
        self._anchor_norms = (self._anchors**2).sum(axis=1)
        self._centroid_norms = (snapshot.centroids**2).sum(axis=1)

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
            added = self._feedback.fitted[len(self._snapshot.pairs) :]
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
        """(num_pairs,) expected scores of a query that is like nothing profiled.

        Where the cards say anything they rank the pairs that have one: which of the profiled kinds
        a pair is good at says nothing of another kind. Verdicts count all the same.
        """
        feedback = self._feedback
        expected = feedback.overall
        if self._snapshot.outside_card_weight and place.likeness is not None:
            learned = feedback.overall - feedback.fitted
            expected = np.where(self._has_card, feedback.fitted.mean() + learned, expected)
        cards = self._card_part(place, self._outside_card_weights)
        overall: NDArray[np.float32] = np.clip(expected + cards, 0.0, 1.0).astype(np.float32)
        return overall

    def _qualities(self, place: Place) -> NDArray[np.float32]:
        shift = place.weights @ self._feedback.shift[place.nearest]
        return np.clip(self._fitted(place) + shift, 0.0, 1.0)

    def _spread(
        self, quality: NDArray[np.float32], admitted: NDArray[np.intp], place: Place
    ) -> NDArray[np.float32]:
        """(num_admitted,) standard deviation of the expected scores, as of a Beta posterior.

        A score expected at an end of [0, 1] counts as half an outcome away from it: nothing that
        was seen a number of times is certain.
        """
        cells = np.ix_(place.nearest, admitted)
        seen = place.weights @ (self._fitted_seen[cells] + self._feedback.seen[cells])
        end = 0.5 / (seen + 1)
        inner = np.clip(quality, end, 1 - end)
        spread: NDArray[np.float32] = np.sqrt(inner * (1 - inner) / (seen + 1))
        return spread

    def _settled(
        self,
        quality: NDArray[np.float32],
        spread: NDArray[np.float32],
        admitted: NDArray[np.intp],
    ) -> NDArray[np.float32]:
        """`settle` among the admitted pairs that were profiled; the others are left as they are."""
        overall, expected = self._feedback.overall[admitted], quality
        if self._new:
            is_new = admitted >= len(self._snapshot.pairs)
            overall, expected = np.where(is_new, -1.0, overall), np.where(is_new, -1.0, quality)
        usual, best = int(overall.argmax()), int(expected.argmax())
        return settle(quality, spread, usual, best, self._snapshot.caution)
