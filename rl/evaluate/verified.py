"""How good a verifier is: on answers that it was not fitted on.

An AUC over all answers says little: that one candidate is better than another is known before any
answer. What counts is telling right from wrong within a candidate, and within a question.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_NUM_BINS = 10
_RIGHT = 0.5
"""Score from which an answer counts as right."""
_LEAST_OF_EACH = 5
"""Right and wrong answers without which a candidate says nothing of the verifier."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class VerifierFigures:
    """Of one set of answers; `None`: there is nothing to tell apart."""

    num_answers: int
    auc_within_candidate: float | None
    """Mean over the candidates, by their right times wrong answers."""
    auc_within_question: float | None
    """The same over the questions."""
    brier: float
    """Mean squared error of the chances."""
    brier_of_rate: float
    """The same of each candidate's share of right answers, which needs no verifier."""
    calibration_error: float
    """Mean distance of chance and share of right answers, in tenths of the answers."""
    chosen: float
    """Mean score of the answer of the highest chance, on questions that every candidate answered or
    not."""
    best: float
    """Mean score of the best answer."""


def figures_of(
    chance: Floats, score: Floats, query: NDArray[np.intp], pair: NDArray[np.intp]
) -> VerifierFigures | None:
    """The figures of some answers; `None` where there are none.

    Args:
        chance: (n,) that the answers are right.
        score: (n,) in [0, 1].
        query: (n,) which question.
        pair: (n,) which candidate.
    """
    if not len(chance):
        return None
    right = score >= _RIGHT
    rate = np.bincount(pair, score) / np.maximum(np.bincount(pair), 1)
    order = np.argsort(chance, kind="stable")
    tenths = [part for part in np.array_split(order, _NUM_BINS) if len(part)]
    error = sum(len(part) * abs(chance[part].mean() - score[part].mean()) for part in tenths)
    chosen, best = _chosen(chance, score, query)
    return VerifierFigures(
        num_answers=len(chance),
        auc_within_candidate=_within(chance, right, pair, _LEAST_OF_EACH),
        auc_within_question=_within(chance, right, query, 1),
        brier=float(((chance - score) ** 2).mean()),
        brier_of_rate=float(((rate[pair] - score) ** 2).mean()),
        calibration_error=float(error / len(chance)),
        chosen=chosen,
        best=best,
    )


def auc(chance: Floats, right: NDArray[np.bool_]) -> float:
    """Share of the pairs of a right and a wrong answer whose chances are in order; ties are half.

    Args:
        chance: (n,)
        right: (n,) with some of either kind.
    """
    _, rank, count = np.unique(chance, return_inverse=True, return_counts=True)
    ranks = np.cumsum(count) - (count - 1) / 2
    num_right = int(right.sum())
    over = ranks[rank][right].sum() - num_right * (num_right + 1) / 2
    return float(over / (num_right * (len(right) - num_right)))


def _within(
    chance: Floats, right: NDArray[np.bool_], group: NDArray[np.intp], least: int
) -> float | None:
    total, weights = 0.0, 0
    for rows in _rows(group):
        num_right = int(right[rows].sum())
        weight = num_right * (len(rows) - num_right)
        if min(num_right, len(rows) - num_right) >= least:
            total, weights = total + weight * auc(chance[rows], right[rows]), weights + weight
    return total / weights if weights else None


def _chosen(chance: Floats, score: Floats, query: NDArray[np.intp]) -> tuple[float, float]:
    chosen, best = [], []
    for rows in _rows(query):
        chosen.append(score[rows[int(chance[rows].argmax())]])
        best.append(score[rows].max())
    return float(np.mean(chosen)), float(np.mean(best))


def _rows(group: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    order = np.argsort(group, kind="stable")
    _, starts = np.unique(group[order], return_index=True)
    return np.split(order, starts[1:])


def by_label(
    labels: NDArray[np.str_], figures: Callable[[NDArray[np.bool_]], VerifierFigures | None]
) -> dict[str, VerifierFigures]:
    """The figures of the answers of each label."""
    found = {str(label): figures(labels == label) for label in np.unique(labels)}
    return {label: of for label, of in found.items() if of is not None}
