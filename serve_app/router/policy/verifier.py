"""The verifier: how likely an answer is right, from the query, the candidate and its signals.

An ensemble of small trees, as arrays, and a calibration of what they sum up to. In come the answers
that a request holds, out comes a chance for each: the same in fitting and in serving. Nothing in
the features names a candidate, so an answer of a newcomer has a chance like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import SnapshotError
from serve_app.router.policy.features import NO_ANSWER, voices
from serve_app.signals import NUMBERS

Float = NDArray[np.float32]

BELIEFS = (
    "quality",
    "spread",
    "overall",
    "outside",
    "similarity",
    "below_best",
    "distance_quantile",
    "is_inside",
)
"""What path 1 believes of the candidate on the query, before any answer."""
AMONG = ("likeness", "num_voters", "agreeing", "disagreeing", "nearest")
"""What an answer has with the query and the other answers: its cosine similarity to the query, how
many others voted, how many of them say the same and something else, and its cosine similarity to
the nearest other answer."""
_RELATIVE = (
    *(
        f"{of}_{name}"
        for of in ("answer", "call")
        for name in ("mean", "least", "first", "entropy")
    ),
    "log_length",
    "source_score",
    "source_similarity",
)
RELATIVE = (*(f"own_{name}" for name in _RELATIVE), "own_likeness")
"""Numbers against those that the same candidate usually shows: a log-probability means something
else for each."""
FEATURES = (*BELIEFS, *NUMBERS, *AMONG, *RELATIVE)

_RELATIVE_COLUMNS = [NUMBERS.index(name) for name in _RELATIVE]
_LEAST_WIDTH = 1e-3
_MAX_NODES = 1 << 12
_MAX_TREES = 1 << 10


@dataclass(frozen=True)
class Answers:
    """The answers that one request holds; n answers."""

    beliefs: Float
    """(n, len(BELIEFS)) of each answer's candidate."""
    numbers: Float
    """(n, len(NUMBERS)) its signals, NaN where not reported."""
    keys: NDArray[np.intp]
    """(n,) equal for answers that say the same."""
    voters: NDArray[np.intp]
    """(n,) as of `features.voices`."""
    vectors: Float
    """(n, dim) embeddings; a row of NaN where it is not known."""
    query: Float
    """(dim,)"""
    pairs: NDArray[np.intp]
    """(n,) indices among the pairs of the verifier; -1: it does not know it."""

    def part(self, rows: NDArray[np.bool_]) -> Answers:
        """Some of them, without vectors."""
        return Answers(
            self.beliefs[rows],
            self.numbers[rows],
            self.keys[rows],
            self.voters[rows],
            self.vectors[:0],
            self.query,
            self.pairs[rows],
        )


class Verifier:
    """A fitted ensemble.

    Invariant: `chances` depends on its arguments alone, and takes less than a millisecond.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]], num_pairs: int) -> None:
        """Check and take over the arrays of a snapshot.

        Args:
            arrays: `feature`, `left`, `right` and `nan_left` (trees, nodes), `threshold` and
                `value` of the same shape, `base` (1,), `calibration` (2, points), `centre` and
                `width` (pairs + 1, relative), the last row for a pair that is not known, and
                `outlook` (levels, quantiles).
            num_pairs: Of the snapshot.

        Raises:
            SnapshotError: If one is missing, of a wrong shape, or out of range.
        """
        try:
            self._feature = np.asarray(arrays["feature"], np.intp)
            self._left = np.asarray(arrays["left"], np.intp)
            self._right = np.asarray(arrays["right"], np.intp)
            self._nan_left = np.asarray(arrays["nan_left"]) > 0
            self._threshold, self._value, self._base, self._calibration = (
                np.asarray(arrays[name], np.float32)
                for name in ("threshold", "value", "base", "calibration")
            )
            self._centre, self._width, self.outlook = (
                np.asarray(arrays[name], np.float32) for name in ("centre", "width", "outlook")
            )
        except KeyError as error:
            raise SnapshotError(f"the verifier lacks {error}") from None
        self._check(num_pairs)
        self._depth = self._depth_of()
        self._roots, self._children = self._flat_nodes()

    def chances(self, answers: Answers) -> NDArray[np.float64]:
        """(n,) calibrated chances in [0, 1] that the answers are right."""
        return self.calibrated(self.raw(self.features(answers)))

    def features(self, answers: Answers) -> Float:
        """What the trees read: (n, len(FEATURES))."""
        return self.laid_out(answers, among_of(answers))

    def laid_out(self, answers: Answers, among: Float) -> Float:
        """The same of answers of several requests.

        Args:
            answers: Their vectors and queries do not matter.
            among: (n, len(AMONG)) as `among_rows` gives it.
        """
        return features_of(answers, among, self._centre, self._width)

    def raw(self, features: Float) -> NDArray[np.float64]:
        """(n,) log-odds before the calibration."""
        rows = np.arange(len(features))[:, None]
        node = np.broadcast_to(self._roots, (len(features), len(self._roots)))
        for _ in range(self._depth):
            value = features[rows, self._feature.take(node)]
            goes_left = value <= self._threshold.take(node)  # NaN is not
            goes_left |= np.isnan(value) & self._nan_left.take(node)
            node = self._children.take(2 * node + goes_left)
        summed = self._value.take(node).sum(axis=1, dtype=np.float64)
        return np.asarray(summed + float(self._base[0]), np.float64)

    def calibrated(self, raw: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n,) chances in [0, 1] of log-odds."""
        return np.interp(raw, *self._calibration)

    def _check(self, num_pairs: int) -> None:
        shape = self._feature.shape
        tables = (self._left, self._right, self._nan_left, self._threshold, self._value)
        if len(shape) != 2 or any(of.shape != shape for of in tables):
            raise SnapshotError("the verifier's trees are not of one shape")
        num_trees, num_nodes = shape
        if not (1 <= num_trees <= _MAX_TREES and 1 <= num_nodes <= _MAX_NODES):
            raise SnapshotError(f"the verifier has {num_trees} trees of {num_nodes} nodes")
        inner = self._feature >= 0
        if (self._feature >= len(FEATURES)).any():
            raise SnapshotError("the verifier reads a feature that there is not")
        own = np.broadcast_to(np.arange(num_nodes), shape)
        for children in (self._left, self._right):  # ever deeper, so every descent ends
            if (inner & ((children <= own) | (children >= num_nodes))).any():
                raise SnapshotError("a node of the verifier has a child that there is not")
        relative = (num_pairs + 1, len(RELATIVE))
        if self._centre.shape != relative or self._width.shape != relative:
            raise SnapshotError(f"the verifier's scales are not of shape {relative}")
        if self._calibration.ndim != 2 or len(self._calibration) != 2 or self._base.shape != (1,):
            raise SnapshotError("the verifier's calibration is of a wrong shape")
        if not self._calibration.size or (np.diff(self._calibration) < 0).any():
            raise SnapshotError("the verifier's calibration does not ascend")
        if self.outlook.ndim != 2 or not self.outlook.size:
            raise SnapshotError("the verifier's outlook is of a wrong shape")
        floats = (self._threshold, self._value, self._base, self._calibration, self._centre)
        if not all(np.isfinite(of).all() for of in (*floats, self._width, self.outlook)):
            raise SnapshotError("the verifier holds a value that is not finite")
        if (self._width < _LEAST_WIDTH / 2).any():
            raise SnapshotError("the verifier has a scale of no width")
        for chances in (self._calibration[1], self.outlook):
            if chances.min() < 0 or chances.max() > 1:
                raise SnapshotError("the verifier has a chance outside [0, 1]")

    def _depth_of(self) -> int:
        """Steps from the root to the deepest leaf of any tree."""
        depth = np.zeros(self._feature.shape, np.intp)
        for node in range(self._feature.shape[1]):
            inner = np.flatnonzero(self._feature[:, node] >= 0)
            for children in (self._left, self._right):
                depth[inner, children[inner, node]] = depth[inner, node] + 1
        return int(depth.max())

    def _flat_nodes(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """The trees' roots, and of each node those to the right and to the left.

        Places in all trees laid end to end; a leaf leads to itself.
        """
        num_trees, num_nodes = self._feature.shape
        roots = num_nodes * np.arange(num_trees)
        own = np.arange(num_nodes)
        children = np.stack([self._right, self._left], axis=2)
        children = np.where((self._feature < 0)[:, :, None], own[:, None], children)
        return roots, (children + roots[:, None, None]).ravel()


def features_of(answers: Answers, among: Float, centre: Float, width: Float) -> Float:
    """(n, len(FEATURES)); `among` as `among_of` gives it, the others as `relative_scales`."""
    own = np.concatenate([answers.numbers[:, _RELATIVE_COLUMNS], among[:, :1]], axis=1)
    known = np.where(answers.pairs >= 0, answers.pairs, len(centre) - 1)
    relative = (own - centre[known]) / width[known]
    parts = [answers.beliefs, answers.numbers, among, relative]
    return np.concatenate(parts, axis=1, dtype=np.float32)


def relative_scales(
    numbers: Float, likeness: Float, pairs: NDArray[np.intp], num_pairs: int
) -> tuple[Float, Float]:
    """What each candidate usually shows: (num_pairs + 1, relative) means and deviations.

    Args:
        numbers: (n, len(NUMBERS)) signals.
        likeness: (n,) of each answer to its query; NaN where unknown.
        pairs: (n,) which candidate.
        num_pairs: How many there are; the last row is of all together.
    """
    own = np.concatenate([numbers[:, _RELATIVE_COLUMNS], likeness[:, None]], axis=1)
    centre = np.zeros((num_pairs + 1, own.shape[1]), np.float32)
    width = np.ones_like(centre)
    for pair in range(num_pairs, -1, -1):
        rows = own if pair == num_pairs else own[pairs == pair]
        known = np.isfinite(rows)
        count = known.sum(axis=0)
        filled = np.where(known, rows, 0.0)
        mean = filled.sum(axis=0) / np.maximum(count, 1)
        deviation = np.sqrt(
            (np.where(known, rows - mean, 0.0) ** 2).sum(axis=0) / np.maximum(count, 1)
        )
        usable = count >= 2
        centre[pair] = np.where(usable, mean, centre[num_pairs])
        width[pair] = np.where(usable, np.maximum(deviation, _LEAST_WIDTH), width[num_pairs])
    return centre, width


def beliefs_of(
    quality: Float,
    spread: Float,
    overall: Float,
    outside: Float,
    similarity: Float,
    best: Float | float,
    distance_quantile: Float | float,
    inside: NDArray[np.bool_] | bool,
) -> Float:
    """(..., len(BELIEFS)) in their order; arguments as of `beliefs.Beliefs`, of some candidates.

    Args:
        quality: Expected score.
        spread: Its standard deviation.
        overall: Expected score over all queries.
        outside: The same by the cards.
        similarity: Of query and card.
        best: Highest expected score of any candidate on the query.
        distance_quantile: Of the query.
        inside: Whether the query is like the profiled ones.
    """
    columns = (quality, spread, overall, outside, similarity, quality - best, distance_quantile)
    beliefs = np.empty((*quality.shape, len(BELIEFS)), np.float32)
    for place, column in enumerate((*columns, inside)):
        beliefs[..., place] = column
    return beliefs


def among_of(answers: Answers) -> Float:
    """(n, len(AMONG)) what each answer has with the query and the others."""
    keys, voters = (np.asarray(of, np.intp)[None] for of in (answers.keys, answers.voters))
    among: Float = among_rows(answers.vectors[None], keys, voters, answers.query[None])[0]
    return among


def among_rows(
    vectors: Float, keys: NDArray[np.intp], voters: NDArray[np.intp], query: Float
) -> Float:
    """(B, n, len(AMONG)) the same of B requests; what has no answer counts for nothing.

    Args:
        vectors: (B, n, dim) embeddings of the answers; NaN where not known.
        keys: (B, n) equal for answers that say the same, `NO_ANSWER` for none.
        voters: (B, n) as of `features.voices`.
        query: (B, dim)
    """
    likeness = np.einsum("bnd,bd->bn", vectors, query)
    counts = voices(keys, voters)[:, :, None]
    same = keys[:, :, None] == keys[:, None, :]
    is_other = voters[:, :, None] != voters[:, None, :]
    is_other &= (keys != NO_ANSWER)[:, None, :]
    agreeing, disagreeing = (((of & is_other) @ counts)[:, :, 0] for of in (same, ~same))
    between = vectors @ vectors.transpose(0, 2, 1)
    apart = is_other & np.isfinite(between)
    nearest = np.where(apart, between, -np.inf).max(axis=2, initial=-np.inf)
    nearest = np.where(np.isfinite(nearest), nearest, np.nan)
    columns = (likeness, agreeing + disagreeing, agreeing, disagreeing, nearest)
    return np.stack(columns, axis=2).astype(np.float32)
