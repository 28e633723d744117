"""The first look: where a query lies, without the encoder's network.

In comes a text, out come a vector in the encoder's space and whether it may decide. The vector is a
linear map of pooled token vectors (`embedder.static`). It may decide where the query is like the
questions that were profiled (near to them as pooled vectors, of the same words, near to the
landmarks of path 1) and path 1 is in little doubt. How much each counts and where trust begins is
fitted with the snapshot (`rl.fit.look`) on questions, and whole kinds of question, that were held
out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.embedder import Tokens, TokenTable
from serve_app.errors import SnapshotError
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.utility import utility

Float = NDArray[np.float32]

NUM_POOLS = 4
"""Parts of a pooled vector, as `TokenTable.pooled` has them; the first is the idf-weighted mean."""
MAX_WORDS = 32
"""Tokens of a profiled question that are kept, those of the greatest weight."""
NO_WORD = -1
"""Fills up a question of fewer tokens."""
NUM_SIGNALS = 5
_NEAREST = 4
"""Profiled questions that a query is compared with."""
_NEAREST_LANDMARKS = 8
_ALPHA = 0.1
"""At which the lead of the best candidate is taken."""


@dataclass(frozen=True, slots=True)
class Glimpse:
    """What a first look saw."""

    vector: Float
    """(dim,) unit vector in the encoder's space."""
    signals: NDArray[np.float64]
    """(NUM_SIGNALS,) mean cosine to the nearest profiled questions as pooled vectors, greatest
    share of the query's words in one of them, mean cosine to the nearest landmarks, highest score
    that path 1 expects there, and the lead in utility of the best candidate over the next."""


@dataclass(frozen=True)
class Seen:
    """The profiled questions, and the map from pooled vectors to the encoder's space."""

    idf: Float
    """(vocabulary,) weight of each token."""
    weights: Float
    """(NUM_POOLS * token_dim, dim) of the map."""
    bias: Float
    """(dim,) of the map."""
    centre: Float
    """(token_dim,) mean of the idf-weighted means of the questions."""
    questions: Float
    """(num_questions, token_dim) unit vectors: their idf-weighted means less the centre."""
    words: NDArray[np.int32]
    """(num_questions, MAX_WORDS) their tokens, filled up with `NO_WORD`."""
    rule: ClusterRule
    """Path 1."""

    def glimpse(self, pooled: Float, tokens: Tokens) -> Glimpse:
        """Look at one query.

        Args:
            pooled: As of `TokenTable.pooled`, with `idf`.
            tokens: Of the query.
        """
        vector = _unit(pooled @ self.weights + self.bias)
        likeness = self.questions @ _unit(pooled[: len(self.centre)] - self.centre)
        nearest = np.argpartition(likeness, -min(_NEAREST, len(likeness)))[-_NEAREST:]
        landmarks = self.rule.snapshot.landmarks @ vector
        landmarks.partition(-min(_NEAREST_LANDMARKS, len(landmarks)))
        quality = self.rule.qualities(vector)
        gained = np.sort(utility(_ALPHA, quality, self.rule.costs))
        signals = (
            likeness[nearest].mean(),
            self._shared(tokens, nearest),
            landmarks[-_NEAREST_LANDMARKS:].mean(),
            quality.max(),
            gained[-1] - gained[-2] if len(gained) > 1 else 1.0,
        )
        return Glimpse(vector, np.array(signals, np.float64))

    def _shared(self, tokens: Tokens, questions: NDArray[np.intp]) -> float:
        """Share of a query's weight that lies on words of one of these questions; the greatest."""
        own = np.unique(tokens)
        weights = self.idf[own]
        found = (self.words[questions][:, None, :] == own[None, :, None]).any(axis=2)
        return float((found @ weights).max() / weights.sum())


class FirstLook:
    """Decides whether a query needs the encoder. One thread at a time."""

    def __init__(
        self, arrays: Mapping[str, NDArray[Any]], rule: ClusterRule, table: TokenTable
    ) -> None:
        """Read what was fitted.

        Args:
            arrays: Of a snapshot.
            rule: Path 1 of the same snapshot.
            table: Of the snapshot's encoder.

        Raises:
            SnapshotError: If the arrays do not fit together, or the encoder.
        """
        self._table = table
        try:
            self._seen = Seen(
                idf=arrays["idf"].astype(np.float32),
                weights=arrays["weights"].astype(np.float32),
                bias=arrays["bias"].astype(np.float32),
                centre=arrays["centre"].astype(np.float32),
                questions=arrays["questions"].astype(np.float32),
                words=arrays["words"].astype(np.int32),
                rule=rule,
            )
            self._trust = arrays["trust"].astype(np.float64)
        except KeyError as error:
            raise SnapshotError(f"the first look lacks {error}") from None
        num, dim = len(self._seen.questions), rule.snapshot.dim
        wanted = {
            "idf": (table.size,),
            "weights": (NUM_POOLS * table.dim, dim),
            "bias": (dim,),
            "centre": (table.dim,),
            "questions": (num, table.dim),
            "words": (num, MAX_WORDS),
            "trust": (NUM_SIGNALS + 1,),
        }
        for name, shape in wanted.items():
            if arrays[name].shape != shape or not np.isfinite(arrays[name]).all():
                raise SnapshotError(
                    f"the first look's {name} has shape {arrays[name].shape}, expected {shape} "
                    "finite numbers"
                )
        if not num or not len(rule.snapshot.landmarks) or (self._seen.idf <= 0).any():
            raise SnapshotError("the first look has no questions, landmarks or weights of words")

    def look(self, text: str) -> Float | None:
        """(dim,) unit vector that may decide; `None`: the encoder has to look.

        Raises:
            InvalidRequest: If it is no text that can be encoded.
        """
        vector, trust = self.vector_and_trust(text)
        return vector if trust > 0 else None

    def vector_and_trust(self, text: str) -> tuple[Float, float]:
        """What a text looks like, (dim,), and how far that is trusted; above 0 it may decide.

        Raises:
            InvalidRequest: If it is no text that can be encoded.
        """
        tokens = self._table.tokens(text)
        glimpse = self._seen.glimpse(self._table.pooled(tokens, self._seen.idf), tokens)
        return glimpse.vector, float(self._trust[0] + self._trust[1:] @ glimpse.signals)


def _unit(vector: Float) -> Float:
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-9), np.float32)
