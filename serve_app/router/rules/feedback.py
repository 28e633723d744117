"""What users' verdicts taught beside a snapshot: shifts of pairs, in general and in clusters.

In come differences between a score and what was expected. Evidence is discounted per pair, so a
pair that changes is noticed after tens of verdicts whatever its past; and of each owner only a
little counts, see `router.rules.voices`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from serve_app.router.rules.voices import Voices
from serve_app.router.snapshots.snapshot import RouterSnapshot

PRIOR_INERTIA = 3.0
"""Outcomes that what is believed beforehand of a pair the snapshot does not know is worth."""
_DISCOUNT = 0.98
"""Weight that a pair's earlier feedback keeps at each new one: it remembers about 50."""
_MAX_INERTIA = 20.0
"""Feedbacks that weigh as much as everything the snapshot knows of a pair; less for a pair it knows
little of."""
_LEAST_FOR_DRIFT = 10.0
"""Verdicts that it takes to say that a pair is not what it was."""
_LABEL_DISCOUNT = 0.995
"""Weight that earlier feedback keeps in the mean of a pair that the snapshot does not know."""


class Feedback:
    """Verdicts on pairs, the snapshot's own first, then those that only the cards know.

    Attributes:
        fitted: (num_pairs,) mean scores without the shifts.
        overall: (num_pairs,) mean scores with them.
        shift: (clusters, num_pairs) to add to the expected scores of a cluster's queries.
        seen: (clusters, num_pairs) verdicts that count in each cluster.
    """

    def __init__(self, snapshot: RouterSnapshot, prior_mean: NDArray[np.float32]) -> None:
        """Begin with no verdict.

        Args:
            snapshot: What was fitted.
            prior_mean: (num_new,) mean scores expected of the pairs that it does not know.
        """
        pair_mean = snapshot.pair_alpha / (snapshot.pair_alpha + snapshot.pair_beta)
        self._num_known = len(pair_mean)
        self._prior_mean = prior_mean
        self.fitted: NDArray[np.float32] = np.concatenate([pair_mean, prior_mean]).astype(
            np.float32
        )
        self.overall = self.fitted.copy()
        shape = (len(snapshot.centroids), len(self.fitted))
        self.shift = np.zeros(shape, np.float32)
        self.seen = np.zeros(shape, np.float32)
        profiled = snapshot.pair_alpha + snapshot.pair_beta
        known = np.minimum(profiled, _MAX_INERTIA)
        self._evidence = np.concatenate([profiled, np.full(len(prior_mean), PRIOR_INERTIA)])
        self._inertia = np.concatenate([known, np.full(len(prior_mean), _MAX_INERTIA)])
        self._voices: dict[int, Voices] = {}
        """By pair; cell 0 is the pair in general, the others are the clusters."""
        self._labels: dict[int, Voices] = {}
        """By pair that the snapshot does not know; of the scores."""

    def learn_mean(self, index: int, score: float, owner: str) -> None:
        """What the profile says of the other pairs: the mean score of one that it left out.

        Remembered for longer than the shifts, which only have to notice a change. A pair that the
        snapshot knows learns none.
        """
        newcomer = index - self._num_known
        if newcomer < 0:
            return
        prior = self._prior_mean[newcomer]
        labels = self._labels.setdefault(newcomer, Voices(1, _LABEL_DISCOUNT))
        labels.add(owner, np.ones(1, np.float32), score - float(prior))
        seen, residual = labels.totals()
        self.fitted[index] = prior + residual[0] / (PRIOR_INERTIA + seen[0])

    def drift(self, index: int) -> tuple[float, float, float]:
        """How far the verdicts on a pair are from what was expected of them.

        The mean difference of n verdicts from what is expected of a Beta posterior with mean p and
        k outcomes has the variance p (1 - p) (1 / n + 1 / k).

        Args:
            index: Of the pair.

        Returns:
            Verdicts that count, their mean difference from what was expected, and the standard
            deviations that this is; 0 of those until there are enough verdicts.
        """
        if index not in self._voices:
            return 0.0, 0.0, 0.0
        seen, total = (float(cells[0]) for cells in self._voices[index].totals())
        if seen <= 0:
            return 0.0, 0.0, 0.0
        difference, mean = total / seen, float(np.clip(self.fitted[index], 0.05, 0.95))
        variance = mean * (1 - mean) * (1 / seen + 1 / float(self._evidence[index]))
        deviations = difference / variance**0.5 if seen >= _LEAST_FOR_DRIFT else 0.0
        return seen, difference, deviations

    def learn(
        self,
        index: int,
        nearest: NDArray[np.intp],
        weights: NDArray[np.float32],
        residual: float,
        owner: str,
    ) -> None:
        """Take in one verdict.

        Args:
            index: Of the pair.
            nearest: The clusters of the query.
            weights: Their weights, which sum to 1.
            residual: Score minus what was expected without feedback.
            owner: Who gave it.
        """
        counts = np.zeros(1 + len(self.shift), np.float32)
        counts[0] = 1.0
        counts[1 + nearest] = weights
        voices = self._voices.setdefault(index, Voices(len(counts), _DISCOUNT))
        voices.add(owner, counts, residual)
        seen, total = voices.totals()
        inertia = self._inertia[index]
        shift = total[0] / (inertia + seen[0])
        # A cluster starts from the pair's shift and moves on with its own evidence.
        own = (total[1:] - seen[1:] * shift) / (inertia + seen[1:])
        self.seen[:, index] = seen[1:]
        self.shift[:, index] = shift + own
        self.overall[index] = self.fitted[index] + shift
