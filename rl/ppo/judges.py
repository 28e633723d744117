"""Verifiers beside a table of outcomes: they say how likely an answer of an episode is right.

In training no answer is judged by a verifier that was fitted on its question, and where path 1 is
shown as if it did not know the question's kind, by none that was fitted on its domain. So an
episode sees chances as good, and as bad, as serving will.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve_app.router.policy.features import NO_ANSWER
from serve_app.router.policy.verifier import Answers, Verifier, among_rows

Float = NDArray[np.float32]
Index = NDArray[np.intp]


class Held(NamedTuple):
    """The answers that some episodes hold; n episodes of S places, some of them empty."""

    beliefs: Float
    """(n, P, len(BELIEFS)) what path 1 believes of every pair."""
    numbers: Float
    """(n, S, len(NUMBERS)) signals of each answer, NaN where not reported."""
    keys: Index
    """(n, S) equal for answers that say the same; `NO_ANSWER` for none."""
    pairs: Index
    """(n, S) columns of the table; of no meaning without an answer."""
    voters: Index
    """(n, S)"""
    vectors: Float
    """(n, S, dim) embeddings; NaN where not known."""
    query: Float
    """(n, dim)"""


@dataclass(frozen=True)
class Judges:
    """Verifiers, and which of them judges what."""

    verifiers: tuple[Verifier, ...]
    of: Index
    """(V, N) the verifier of each view and query of the table."""
    places: Index
    """(P,) where each pair of the table is among those of the verifiers; -1: they do not know
    it."""
    alone: Float | None = None
    """(V, N, P) the chance of each recorded answer by itself, NaN without one; for training."""

    def select(self, queries: Index | slice, pairs: Index) -> Judges:
        """Of some of the queries and pairs."""
        alone = None if self.alone is None else self.alone[:, queries][:, :, pairs]
        return replace(self, of=self.of[:, queries], places=self.places[pairs], alone=alone)

    def outlooks(self) -> Float:
        """(verifiers, levels, quantiles) as of `worth.prospects`."""
        return np.stack([verifier.outlook for verifier in self.verifiers])

    def chances(self, judge: Index, held: Held) -> Float:
        """(n, S) that the answers are right; NaN where there is none.

        Args:
            judge: (n,) which verifier, of each episode.
            held: What they hold.
        """
        found = np.full(held.keys.shape, np.nan, np.float32)
        among = among_rows(held.vectors, held.keys, held.voters, held.query)
        row, place = np.nonzero(held.keys != NO_ANSWER)
        pairs = held.pairs[row, place]
        answers = Answers(
            beliefs=held.beliefs[row, pairs],
            numbers=held.numbers[row, place],
            keys=held.keys[row, place],
            voters=held.voters[row, place],
            vectors=held.vectors[:0, 0],
            query=held.query[:0],
            pairs=self.places[pairs],
        )
        for number in np.unique(judge[row]).tolist():
            part = judge[row] == number
            verifier = self.verifiers[number]
            features = verifier.laid_out(answers.part(part), among[row, place][part])
            found[row[part], place[part]] = verifier.calibrated(verifier.raw(features))
        return found
