"""Judge: how likely the answers of a request are right, by the verifier of a snapshot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serve_app.router.policy.verifier import Answers, Verifier, beliefs_of
from serve_app.router.rules.base import RoutingRequest
from serve_app.router.rules.beliefs import Beliefs
from serve_app.router.rules.clusters import ClusterRule
from serve_app.signals import stacked


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
