"""Fits the first look of a snapshot: which queries may be decided without the encoder's network.

The map is ridge regression of the questions' embeddings on their pooled token vectors. Trust is a
logistic regression that tells questions of known kinds, on which the encoder gains next to nothing,
from the others and from questions of kinds that were left out whole. It begins where 95% of the
latter are sent to the encoder, and no lower than where the first look loses `MAX_LOSS`. Every
question that is looked at for this was held out of the map and of the questions that it is compared
with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import silhouette_score  # type: ignore[import-untyped]

from rl.fit import estimators
from rl.fit.estimators import Float
from serve_app.embedder import Tokens, TokenTable
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.first_look import MAX_WORDS, NO_WORD, NUM_SIGNALS, Seen
from serve_app.router.rules.utility import utility

LEFT_TO_ENCODER = 0.95
"""Share of the questions of unknown kinds that the encoder has to look at."""
MAX_LOSS = 0.002
"""Utility that the encoder may be expected to gain over the first look, in the mean over all
queries like the profiled ones."""
_LITTLE = 0.02
"""Utility; the encoder gains next to nothing where it gains no more."""
MIN_QUESTIONS = 100
"""Fewer say too little of what a query may look like."""
_MAX_QUESTIONS = 8_000
_MAX_KEPT = 2_048
"""Questions in the snapshot; more of them make the snapshot and each look larger."""
_PENALTY = 0.03
"""Of the ridge, for each question."""
_NUM_FOLDS = 5
_NUM_KINDS = (2, 3, 4)
"""Kinds of question, by k-means of their embeddings. With more of them than there are, what is left
out looks like what stays, and trust begins too high."""
_SILHOUETTES = 2_000
"""Questions that the number of kinds is chosen on."""
_ALPHAS = (0.0, 0.1, 0.3)


@dataclass(frozen=True)
class _Texts:
    """Questions as the first look sees them."""

    tokens: list[Tokens]
    embeddings: Float
    table: TokenTable

    def part(self, rows: NDArray[np.intp]) -> _Texts:
        """Some of the questions."""
        return replace(
            self, tokens=[self.tokens[row] for row in rows], embeddings=self.embeddings[rows]
        )


def fit_look(
    rule: ClusterRule,
    queries: Sequence[str],
    embeddings: Float,
    table: TokenTable,
    seed: int = 0,
) -> tuple[dict[str, NDArray[Any]], dict[str, float]] | None:
    """Fit a first look.

    Args:
        rule: Path 1, fitted on the same questions.
        queries: (num_queries,) texts; an empty one is not known and left out.
        embeddings: (num_queries, dim) of the encoder.
        table: Of the encoder.
        seed: Of the folds and the kinds.

    Returns:
        The arrays, and what to expect on queries like the profiled ones: the `share` that it
        decides, and what that loses, in utility. `None`: there are too few questions, or none
        could be decided.
    """
    rng = np.random.default_rng(seed)
    known = np.array([row for row, text in enumerate(queries) if text.strip()], np.intp)
    if len(known) < MIN_QUESTIONS:
        return None
    known = np.sort(rng.permutation(known)[:_MAX_QUESTIONS])
    tokens = [table.tokens(queries[row]) for row in known]
    texts = _Texts(tokens, embeddings[known], table)
    kind = _kinds(texts.embeddings, seed)
    if kind is None:
        return None
    fold = rng.permutation(len(known)) % _NUM_FOLDS
    vectors, inside = _held_out(texts, fold, rule)
    _, outside = _held_out(texts, kind, rule)
    losses = _losses(rule, texts.embeddings, vectors)
    weights = _told_apart(inside, losses <= _LITTLE, outside)
    trust, unknown = (of @ weights[1:] + weights[0] for of in (inside, outside))
    order = np.argsort(-trust)
    trust, lost = trust[order], np.cumsum(losses[order]) / len(order)
    allowed = (trust > np.quantile(unknown, LEFT_TO_ENCODER)) & (lost <= MAX_LOSS)
    count = int(np.argmin(allowed)) if not allowed.all() else len(allowed)
    if not count:
        return None
    # Trust that is above 0 decides.
    weights[0] -= (trust[count - 1] + trust[count]) / 2 if count < len(trust) else trust[-1] - 1.0
    seen = _seen(texts, rule)
    arrays: dict[str, NDArray[Any]] = {
        "idf": seen.idf,
        "weights": seen.weights.astype(np.float16),
        "bias": seen.bias,
        "centre": seen.centre,
        "questions": seen.questions.astype(np.float16),
        "words": seen.words,
        "trust": weights.astype(np.float32),
    }
    return arrays, {"share": count / len(order), "loss": float(lost[count - 1])}


def _kinds(embeddings: Float, seed: int) -> NDArray[np.intp] | None:
    """(num_questions,) kind of each question; `None`: they are all the same.

    The number of kinds is that of the highest mean silhouette (Rousseeuw, 1987).
    """
    num_different = len(np.unique(embeddings, axis=0))
    found: dict[float, NDArray[np.intp]] = {}
    for number in _NUM_KINDS:
        if number <= num_different:
            centroids = estimators.k_means(embeddings, number, seed)
            kind = estimators.assign(embeddings, centroids, 1, 1.0).argmax(axis=1)
            part = np.random.default_rng(seed).permutation(len(kind))[:_SILHOUETTES]
            if len(np.unique(kind[part])) > 1:
                found[float(silhouette_score(embeddings[part], kind[part]))] = kind
    return found[max(found)] if found else None


def _held_out(
    texts: _Texts, group: NDArray[np.integer], rule: ClusterRule
) -> tuple[Float, NDArray[np.float64]]:
    """What each question looks like to a first look that knows none of its group.

    Returns:
        (num_questions, dim) vectors, and (num_questions, NUM_SIGNALS) signals.
    """
    vectors = np.empty(texts.embeddings.shape, np.float32)
    signals = np.empty((len(vectors), NUM_SIGNALS))
    for held in np.unique(group):
        rows = np.flatnonzero(group == held)
        seen = _seen(texts.part(np.flatnonzero(group != held)), rule)
        for row in rows:
            tokens = texts.tokens[row]
            glimpse = seen.glimpse(texts.table.pooled(tokens, seen.idf), tokens)
            vectors[row], signals[row] = glimpse.vector, glimpse.signals
    return vectors, signals


def _seen(texts: _Texts, rule: ClusterRule) -> Seen:
    """Fit the map, and lay out a sample of the questions."""
    table = texts.table
    idf = table.inverse_frequencies(texts.tokens)
    pooled = np.stack([table.pooled(tokens, idf) for tokens in texts.tokens])
    mean, spread = pooled.mean(axis=0), pooled.std(axis=0) + 1e-6
    scaled, target = (pooled - mean) / spread, texts.embeddings.mean(axis=0)
    system = scaled.T @ scaled + _PENALTY * len(scaled) * np.eye(scaled.shape[1], dtype=np.float32)
    weights = np.linalg.solve(system, scaled.T @ (texts.embeddings - target)) / spread[:, None]
    kept = np.random.default_rng(len(pooled)).permutation(len(pooled))[:_MAX_KEPT]
    questions = (pooled - mean)[kept, : table.dim]
    questions /= np.maximum(np.linalg.norm(questions, axis=1, keepdims=True), 1e-9)
    return Seen(
        idf=idf,
        weights=weights.astype(np.float32),
        bias=(target - mean @ weights).astype(np.float32),
        centre=mean[: table.dim],
        questions=questions,
        words=np.stack([_words(texts.tokens[row], idf) for row in kept]),
        rule=rule,
    )


def _words(tokens: Tokens, idf: Float) -> NDArray[np.int32]:
    """(MAX_WORDS,) the tokens of the greatest weight."""
    unique = np.unique(tokens)
    kept = unique[np.argsort(-idf[unique], kind="stable")[:MAX_WORDS]]
    words = np.full(MAX_WORDS, NO_WORD, np.int32)
    words[: len(kept)] = kept
    return words


def _told_apart(
    inside: NDArray[np.float64], is_good: NDArray[np.bool_], outside: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(1 + NUM_SIGNALS,) bias and weights of the log-odds that the first look may decide.

    Args:
        inside: (num_questions, NUM_SIGNALS) of questions of known kinds.
        is_good: (num_questions,) whether it decides them well.
        outside: (num_others, NUM_SIGNALS) of questions of kinds that were left out.
    """
    both = np.concatenate([inside, outside])
    mean, spread = both.mean(axis=0), both.std(axis=0) + 1e-9
    features = np.concatenate([np.ones((len(both), 1)), (both - mean) / spread], axis=1)
    may = np.concatenate([is_good, np.zeros(len(outside), np.bool_)])
    kept = np.arange(features.shape[1])
    fitted = estimators.logistic(features, may).astype(np.float64)
    while (fitted[1:] < 0).any():
        # A query that is more like the profiled ones is trusted no less.
        kept = np.delete(kept, 1 + int(fitted[1:].argmin()))
        fitted = estimators.logistic(features[:, kept], may).astype(np.float64)
    weights = np.zeros(NUM_SIGNALS)
    weights[kept[1:] - 1] = fitted[1:] / spread[kept[1:] - 1]
    return np.concatenate([[fitted[0] - weights @ mean], weights])


def _losses(rule: ClusterRule, embeddings: Float, vectors: Float) -> NDArray[np.float64]:
    """(num_questions,) utility that the encoder's choice is expected to gain over the map's.

    By what path 1 believes with the encoder, in the mean over some alphas.
    """
    cost = rule.costs
    losses = np.empty(len(embeddings))
    for row, (embedding, vector) in enumerate(zip(embeddings, vectors, strict=True)):
        believed, looked = rule.qualities(embedding), rule.qualities(vector)
        lost = []
        for alpha in _ALPHAS:
            gained = utility(alpha, believed, cost)
            lost.append(gained.max() - gained[utility(alpha, looked, cost).argmax()])
        losses[row] = np.mean(lost)
    return losses
