"""What path 1 believes of queries and pairs it was not fitted on: path 2 is trained on that alone.

Path 1 knows the queries it was fitted on better than any it will serve, so each view is made of
several fits, and no fit is asked about what it saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rl.fit import estimators
from rl.fit.fit import fit
from rl.fit.selection import FitSettings
from rl.ppo.table import Float, Index, View
from rl.profile.outcomes import Outcomes
from serve_app.errors import ConfigError
from serve_app.router.rules.beliefs import Prior
from serve_app.router.rules.clusters import ClusterRule
from serve_app.schemas import Pair

NUM_FOLDS = 5
NUM_KINDS = 30
"""Kinds of queries told apart, in all domains together."""
ENOUGH_DOMAINS = 8
"""From so many on, a kind is a whole domain."""
_LEAST_OF_KIND = 10
"""Queries of a kind, on average."""
_MAX_FITS = 10
"""Fits that a view takes at most: with more groups, several are left out at once."""
QUICK_FIT = FitSettings(num_repeats=1)
"""Of the fits that a view is made of: one round of cross-validation each."""


def make_views(
    outcomes: Outcomes,
    groups: Sequence[str] | NDArray[np.generic],
    descriptors: Float | None = None,
    likeness: Float | None = None,
    settings: FitSettings | None = None,
) -> tuple[View, View]:
    """What path 1 believes of each query when it was not fitted on it, nor on any of its group.

    Args:
        outcomes: What the pairs did.
        groups: (N,) the kind of each query; see `groups_of`.
        descriptors: (P, descriptor) of the pairs, as `fit` takes them.
        likeness: (N, P) similarity of the queries to the pairs' cards in [0, 1].
        settings: Of the fits; `QUICK_FIT` where `None`.

    Returns:
        Fitted on the other four of five folds; fitted on the other groups.

    Raises:
        ConfigError: If there are fewer than two groups.
    """
    num_queries = len(outcomes.embeddings)
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    if group.max(initial=0) < 1:
        raise ConfigError("leaving a group out takes two: see `groups_of`")
    settings = settings or QUICK_FIT
    rng = np.random.default_rng(settings.seed + 4)
    fold = rng.permutation(num_queries) % min(NUM_FOLDS, max(2, num_queries))
    num_groups = int(group.max()) + 1
    group = (rng.permutation(num_groups) % min(num_groups, _MAX_FITS))[group]
    return (
        _held_out_view(outcomes, fold, descriptors, likeness, settings),
        _held_out_view(outcomes, group, descriptors, likeness, settings),
    )


def domain_views(
    outcomes: Outcomes,
    domains: Sequence[str],
    descriptors: Float | None = None,
    likeness: Float | None = None,
    settings: FitSettings | None = None,
) -> tuple[View, View]:
    """As `make_views`, with whole domains left out, or kinds where there is one domain only.

    For what learns to judge answers: it has to hold where path 1 knows nothing.
    """
    groups = np.asarray(domains)
    if len(np.unique(groups)) < 2:
        groups = groups_of(domains, outcomes.embeddings)
    settings = replace(settings or QUICK_FIT, num_repeats=1)
    return make_views(outcomes, groups, descriptors, likeness, settings)


def newcomer_view(
    outcomes: Outcomes,
    member: Literal["model_id", "tool_id"],
    descriptors: Float | None = None,
    likeness: Float | None = None,
    settings: FitSettings | None = None,
) -> View | None:
    """What path 1 believes of each pair when its model, or its tool, has just joined the pool.

    A newcomer is known by its card alone: none of its outcomes is in these beliefs.

    Args:
        outcomes: What the pairs did.
        member: Whether models or tools are the newcomers.
        descriptors: (P, descriptor) of the pairs, as `fit` takes them.
        likeness: (N, P) similarity of the queries to the pairs' cards in [0, 1].
        settings: Of the fits.

    Returns:
        `None` without cards, and where there is only one model, or tool. The gate's verdict in it
        is that of the last fit; it says little.
    """
    names = np.array([getattr(pair, member) for pair in outcomes.pairs])
    if likeness is None or len(np.unique(names)) < 2:
        return None
    settings = settings or QUICK_FIT
    # Of all that is fitted, only the pairs' means and the cards' weights reach a newcomer.
    few = replace(settings, penalties=settings.penalties[:1], head_weights=(0.0,))
    prior = _prior_of(outcomes, np.arange(len(outcomes.embeddings)), descriptors, likeness)
    pieces, order = [], []
    for name in np.unique(names):
        new, staying = np.flatnonzero(names == name), np.flatnonzero(names != name)
        snapshot = fit(
            _of_pairs(outcomes, staying),
            few,
            descriptors=None if descriptors is None else descriptors[staying],
            likeness=likeness[:, staying],
        )
        rule = ClusterRule(snapshot, prior)
        pieces.append(view_of(rule, outcomes.embeddings, [outcomes.pairs[pair] for pair in new]))
        order.append(new)
    back = np.concatenate(order).argsort()
    of_pairs = {
        name: np.concatenate([getattr(piece, name) for piece in pieces], axis=1)[:, back]
        for name in ("quality", "spread", "overall", "outside")
    }
    return replace(pieces[-1], **of_pairs)


def groups_of(domains: Sequence[str], embeddings: Float, seed: int = 0) -> NDArray[np.str_]:
    """(N,) the kind of each query: its domain, or the k-means part of it that it falls in.

    Where there are few domains a domain alone would be too coarse: with three of them, what path 1
    is shown of an unknown kind would be two fits. Where there are enough, a part would be too fine:
    path 1 would know its siblings, as it does not know those of an unknown domain. A domain is one
    kind, too, where its queries are few.
    """
    names = np.array([str(domain) for domain in domains])
    if len(np.unique(names)) >= ENOUGH_DOMAINS:
        return names
    groups = names.astype(object)
    for name in np.unique(names):
        rows = np.flatnonzero(names == name)
        wanted = round(NUM_KINDS * len(rows) / len(names))
        size = max(1, min(wanted, len(rows) // _LEAST_OF_KIND))
        if size == 1 and len(rows) == len(names):
            size = min(2, len(rows))
        if size > 1:
            centroids = estimators.k_means(embeddings[rows], size, seed)
            nearest = estimators.assign(embeddings[rows], centroids, 1, 1.0).argmax(axis=1)
            groups[rows] = [f"{name}\0{number}" for number in nearest]
    return groups.astype(str)


def view_of(rule: ClusterRule, embeddings: Float, pairs: Sequence[Pair]) -> View:
    """What a rule believes of some queries.

    Args:
        rule: Path 1.
        embeddings: (N, dim) unit vectors.
        pairs: The columns of the view.

    Raises:
        ConfigError: If the rule does not know one of the pairs.
    """
    columns = columns_of(rule, pairs)
    quality, spread, overall, outside = (
        np.empty((len(embeddings), len(pairs)), np.float32) for _ in range(4)
    )
    quantile, confidence = (np.empty(len(embeddings), np.float32) for _ in "qc")
    inside = np.empty(len(embeddings), np.bool_)
    for row, embedding in enumerate(embeddings):
        beliefs = rule.beliefs(embedding)
        quality[row] = beliefs.quality[columns]
        spread[row] = beliefs.spread[columns]
        overall[row] = beliefs.overall[columns]
        outside[row] = beliefs.outside[columns]
        verdict = beliefs.verdict
        quantile[row], confidence[row] = verdict.distance_quantile, verdict.confidence
        inside[row] = verdict.inside
    return View(quality, spread, overall, outside, quantile, confidence, inside)


def columns_of(rule: ClusterRule, pairs: Sequence[Pair]) -> Index:
    """Where a rule has some pairs.

    Raises:
        ConfigError: If it does not know one of them.
    """
    index = {pair: column for column, pair in enumerate(rule.pairs)}
    unknown = [str(pair) for pair in pairs if pair not in index]
    if unknown:
        raise ConfigError(f"the snapshot and the configuration know nothing of {unknown}")
    return np.array([index[pair] for pair in pairs], np.intp)


def _held_out_view(
    outcomes: Outcomes,
    part: NDArray[np.intp],
    descriptors: Float | None,
    likeness: Float | None,
    settings: FitSettings,
) -> View:
    """Beliefs of each query by a fit on the queries of the other parts."""
    pieces, order = [], []
    for held in np.unique(part):
        rows = np.flatnonzero(part == held)
        rest = np.flatnonzero(part != held)
        snapshot = fit(
            _of_queries(outcomes, rest),
            settings,
            descriptors=descriptors,
            likeness=None if likeness is None else likeness[rest],
        )
        prior = _prior_of(outcomes, rows, descriptors, likeness)
        pieces.append(
            view_of(ClusterRule(snapshot, prior), outcomes.embeddings[rows], outcomes.pairs)
        )
        order.append(rows)
    back = np.concatenate(order).argsort()
    return View(
        *(
            np.concatenate([getattr(piece, field.name) for piece in pieces])[back]
            for field in fields(View)
        )
    )


def _of_queries(outcomes: Outcomes, queries: Index) -> Outcomes:
    """The outcomes of some of the queries.

    Raises:
        ConfigError: If there are none.
    """
    place = np.full(len(outcomes.embeddings), -1)
    place[queries] = np.arange(len(queries))
    kept = place[outcomes.query_index] >= 0
    return replace(
        outcomes,
        embeddings=outcomes.embeddings[queries],
        query_index=place[outcomes.query_index[kept]],
        pair_index=outcomes.pair_index[kept],
        score=outcomes.score[kept],
        tokens=outcomes.tokens[kept],
        seconds=outcomes.seconds[kept],
        costs_usd=outcomes.costs_usd[kept],
        queries=(),
    )


def _of_pairs(outcomes: Outcomes, pairs: Index) -> Outcomes:
    """The outcomes of some of the pairs."""
    place = np.full(len(outcomes.pairs), -1)
    place[pairs] = np.arange(len(pairs))
    kept = place[outcomes.pair_index] >= 0
    return replace(
        outcomes,
        pairs=tuple(outcomes.pairs[pair] for pair in pairs),
        query_index=outcomes.query_index[kept],
        pair_index=place[outcomes.pair_index[kept]],
        score=outcomes.score[kept],
        tokens=outcomes.tokens[kept],
        seconds=outcomes.seconds[kept],
        costs_usd=outcomes.costs_usd[kept],
    )


def _prior_of(
    outcomes: Outcomes, queries: Index, descriptors: Float | None, likeness: Float | None
) -> Prior | None:
    """What is known of the pairs beforehand, for these queries only."""
    if likeness is None:
        return None
    known = {outcomes.embeddings[row].tobytes(): likeness[row] for row in queries}
    return Prior(
        pairs=outcomes.pairs,
        costs_usd=np.ones(len(outcomes.pairs), np.float32),
        similarities=lambda embedding: known[embedding.tobytes()],
        descriptors=descriptors,
    )
