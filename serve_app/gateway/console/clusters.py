"""What is shown of clusters: what was fitted, what went there, and how sure the router was."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from serve_app.config import SnapshotsPlace
from serve_app.errors import SnapshotError
from serve_app.gateway.console.shaping import IntervalBar, share_of
from serve_app.router.snapshots.library import SnapshotLibrary
from serve_app.router.snapshots.snapshot import RouterSnapshot
from serve_app.schemas import Pair
from serve_app.store.choices import ClusterChoices

logger = logging.getLogger(__name__)

_Z = 1.96
"""Of a 95% interval, as the router's own are."""


class SnapshotReader:
    """Reads snapshots as they were fitted; keeps the last one."""

    def __init__(self, place: SnapshotsPlace) -> None:
        """Read from where the router does."""
        self._place = place
        self._kept: tuple[str, RouterSnapshot] | None = None

    async def read(self, snapshot_id: str) -> RouterSnapshot | None:
        """A snapshot; `None` where it cannot be read on this machine."""
        if self._kept is not None and self._kept[0] == snapshot_id:
            return self._kept[1]
        try:
            snapshot = await asyncio.to_thread(self._load, snapshot_id)
        except SnapshotError as error:
            logger.warning("no clusters are shown: %s", error.message)
            return None
        self._kept = (snapshot_id, snapshot)
        return snapshot

    def _load(self, snapshot_id: str) -> RouterSnapshot:
        return SnapshotLibrary(self._place).load(snapshot_id, 1)


@dataclass(frozen=True, slots=True)
class ClusterCandidate:
    """One candidate in one cluster."""

    pair: Pair
    fitted: IntervalBar | None
    """Score that the cluster's posterior expects; `None`: the snapshot does not know the pair."""
    evidence: float | None
    """Outcomes that the posterior weighs like."""
    requests: int
    """That went there, in the time looked at."""
    verdicts: int
    win_rate: IntervalBar | None
    """Of those verdicts."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """One cluster of a snapshot."""

    index: int | None
    """`None`: outside of all."""
    examples: tuple[str, ...]
    """Questions of the profile nearest to its centre."""
    requests: int
    confidence: float | None
    """Mean of the decisions; `None`: nothing went there."""
    is_best: float | None
    """Chance that the candidate with the best posterior is better than the next one; `None`: there
    is no posterior, or only one."""
    candidates: tuple[ClusterCandidate, ...]
    """The best posterior first."""


def clusters_of(snapshot: RouterSnapshot, choices: Sequence[ClusterChoices]) -> list[Cluster]:
    """The clusters of a snapshot, the least confident first, then those where nothing went.

    Args:
        snapshot: As fitted.
        choices: What its policies decided.
    """
    went: dict[int | None, dict[Pair, ClusterChoices]] = {}
    for one in choices:
        went.setdefault(one.cluster, {})[one.pair] = one
    known = [_cluster(snapshot, index, went.get(index, {})) for index in _indices(snapshot)]
    if None in went:
        known.append(_cluster(snapshot, None, went[None]))
    return sorted(
        known,
        key=lambda one: (one.confidence is None, one.confidence or 0.0, one.is_best or 0.0),
    )


def _indices(snapshot: RouterSnapshot) -> range:
    return range(len(snapshot.centroids))


def _cluster(
    snapshot: RouterSnapshot, index: int | None, went: dict[Pair, ClusterChoices]
) -> Cluster:
    fitted: dict[Pair, tuple[IntervalBar, float]] = {}
    is_best = None
    if index is not None:
        alpha, beta = snapshot.score_alpha[index], snapshot.score_beta[index]
        seen = alpha + beta
        mean = alpha / seen
        spread = np.sqrt(mean * (1 - mean) / (seen + 1))
        low, high = np.maximum(mean - _Z * spread, 0.0), np.minimum(mean + _Z * spread, 1.0)
        for pair, *numbers, weight in zip(
            snapshot.pairs, *(a.tolist() for a in (mean, low, high, seen)), strict=True
        ):
            fitted[pair] = (IntervalBar(*numbers), weight)
        if len(mean) > 1:
            first, second = np.argsort(-mean, kind="stable")[:2]
            apart = math.hypot(float(spread[first]), float(spread[second])) or 1e-9
            is_best = _normal((float(mean[first]) - float(mean[second])) / apart)
    requests = sum(one.choices.requests for one in went.values())
    confidence = sum(one.choices.confidence for one in went.values())
    pairs = [*fitted, *(pair for pair in went if pair not in fitted)]
    standings = [_standing(pair, fitted.get(pair), went.get(pair)) for pair in pairs]
    return Cluster(
        index,
        () if index is None else snapshot.examples[index],
        requests,
        confidence / requests if requests else None,
        is_best,
        tuple(sorted(standings, key=lambda one: -one.fitted.middle if one.fitted else 1.0)),
    )


def _standing(
    pair: Pair, fitted: tuple[IntervalBar, float] | None, went: ClusterChoices | None
) -> ClusterCandidate:
    posterior, evidence = fitted or (None, None)
    if went is None:
        return ClusterCandidate(pair, posterior, evidence, 0, 0, None)
    of = went.choices
    rate = share_of(of.wins, of.verdicts)
    return ClusterCandidate(pair, posterior, evidence, of.requests, of.verdicts, rate)


def _normal(deviations: float) -> float:
    """Probability that a standard normal variable is below."""
    return 0.5 * (1 + math.erf(deviations / math.sqrt(2)))
