"""`fit`: outcomes in, a router snapshot out; every setting chosen by cross-validation.

Quality is a blend of two estimates. Clusters: Beta posteriors per (cluster, pair), shrunk to the
pair overall, and that to a prior from its descriptor. Head: kernel ridge regression of the score on
the embedding, over fixed landmarks. `rl.fit.selection` says how much of each.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

import numpy as np

from rl.fit import estimators
from rl.fit.calibration import calibrate, choose_caution
from rl.fit.estimators import Float
from rl.fit.selection import Chosen, FitSettings, PairStatistics, choose, clusterings, residuals
from rl.profile.outcomes import Outcomes
from serve_app.router.snapshots.snapshot import RouterSnapshot, Scale, cut_example

logger = logging.getLogger(__name__)

_MAX_RANK = 64
"""Of the head; more pairs than this share factors."""


def fit(
    outcomes: Outcomes,
    settings: FitSettings | None = None,
    *,
    version: int = 1,
    descriptors: Float | None = None,
    likeness: Float | None = None,
) -> RouterSnapshot:
    """Fit a router.

    Args:
        outcomes: What the pairs did.
        settings: What to try.
        version: Policy version of the snapshot.
        descriptors: (num_pairs, descriptor) what is known of the pairs beforehand, for example
            their log price; new pairs need the same.
        likeness: (num_queries, num_pairs) similarity of each query to each pair's card in [0, 1];
            what it is worth beside the outcomes is found by cross-validation.

    Returns:
        The snapshot; the same outcomes and settings give the same one.
    """
    settings = settings or FitSettings()
    embeddings = outcomes.embeddings
    scores, counts = outcomes.matrices(outcomes.score)
    pairs = _pair_statistics(outcomes, scores, counts, settings, descriptors)
    rng = np.random.default_rng(settings.seed)
    landmark_rows = np.sort(
        rng.permutation(len(embeddings))[: min(settings.num_landmarks, len(embeddings))]
    )
    landmarks = embeddings[landmark_rows]
    centroids = {
        size: estimators.k_means(embeddings, size, settings.seed)
        for size in sorted({size for size, _ in clusterings(len(embeddings), settings)})
    }
    card_part = None if likeness is None else likeness - likeness.mean(axis=1, keepdims=True)
    chosen = choose(outcomes, scores, counts, pairs, landmarks, centroids, settings, card_part)
    logger.info(
        "clusterings %s, head weight %.2f of penalties %s: cross-validated %.4f",
        chosen.clusterings,
        chosen.head_weight,
        chosen.penalties,
        chosen.value,
    )
    tables: dict[str, Any] = _cluster_tables(
        outcomes, scores, counts, pairs, centroids, chosen, settings
    )
    joined = np.concatenate([centroids[size] for size, _ in chosen.clusterings])
    distances = estimators.relative_distances(
        embeddings[chosen.rows], joined, [size for size, _ in chosen.clusterings]
    )
    quantiles = np.quantile(distances, np.linspace(0, 1, 101)).astype(np.float32)
    levels = np.interp(distances, quantiles, np.linspace(0, 1, len(quantiles))).astype(np.float32)
    seen = tables["score_alpha"] + tables["score_beta"]
    caution, decided = choose_caution(
        outcomes, scores, counts, pairs, centroids, chosen, seen, settings
    )
    is_outside = levels > settings.trusted_quantile
    decided[is_outside] = chosen.outside[is_outside]
    gate_head, gate_weights = calibrate(
        outcomes, scores, counts, pairs, landmarks, chosen.rows, decided, levels, settings
    )
    head_in, head_out = _head(outcomes, scores, counts, pairs, landmarks, chosen, settings)
    return RouterSnapshot(
        version=version,
        encoder=outcomes.encoder,
        pairs=outcomes.pairs,
        centroids=joined,
        scales=tuple(
            Scale(size, nearest, weight) for (size, nearest), weight in chosen.clusterings.items()
        ),
        temperature=settings.temperature,
        **tables,
        pair_alpha=pairs.alpha,
        pair_beta=pairs.beta,
        pair_costs_usd=pairs.costs_usd.astype(np.float32),
        landmarks=landmarks,
        head_in=head_in,
        head_out=head_out,
        head_gamma=settings.gamma,
        head_weight=chosen.head_weight,
        card_weight=chosen.card_weight,
        outside_card_weight=chosen.outside_card_weight,
        caution=caution,
        prior_weights=pairs.prior_weights,
        prior_bias=pairs.prior_bias,
        distance_quantiles=quantiles,
        trusted_quantile=settings.trusted_quantile,
        gate_head=gate_head,
        gate_weights=gate_weights,
        examples=_examples(outcomes, joined, settings.num_examples),
        metadata={
            "num_queries": len(embeddings),
            "num_outcomes": len(outcomes.score),
            "seed": settings.seed,
            "cross_validated": chosen.value,
        },
    )


def _pair_statistics(
    outcomes: Outcomes, scores: Any, counts: Any, settings: FitSettings, descriptors: Float | None
) -> PairStatistics:
    """Posterior and mean cost of each pair over all queries.

    A pair with no known cost takes the pool's geometric mean.
    """
    sums = np.asarray(scores.sum(axis=0), np.float64).ravel()
    seen = np.asarray(counts.sum(axis=0), np.float64).ravel()
    means = np.divide(sums, seen, out=np.zeros_like(sums), where=seen > 0)
    if descriptors is None:
        descriptors = np.zeros((len(outcomes.pairs), 0), np.float32)
    prior_weights, prior_bias = estimators.descriptor_prior(descriptors, means, seen)
    prior = np.clip(prior_bias + descriptors @ prior_weights, 0.01, 0.99)
    strength = settings.pair_strength
    alpha = sums + strength * prior
    beta = seen - sums + strength * (1 - prior)
    dollars, priced = outcomes.matrices(outcomes.costs_usd)
    total = np.asarray(dollars.sum(axis=0), np.float64).ravel()
    known = np.asarray(priced.sum(axis=0), np.float64).ravel()
    costs_usd = np.divide(total, known, out=np.full_like(total, np.nan), where=known > 0)
    paid = costs_usd[np.isfinite(costs_usd) & (costs_usd > 0)]
    typical = float(np.exp(np.log(paid).mean())) if len(paid) else 0.0
    return PairStatistics(
        mean=alpha / (alpha + beta),
        alpha=alpha.astype(np.float32),
        beta=beta.astype(np.float32),
        costs_usd=np.where(np.isfinite(costs_usd), costs_usd, typical),
        prior_weights=prior_weights,
        prior_bias=prior_bias,
    )


def _head(
    outcomes: Outcomes,
    scores: Any,
    counts: Any,
    pairs: PairStatistics,
    landmarks: Float,
    chosen: Chosen,
    settings: FitSettings,
) -> tuple[Float, Float]:
    """The head of the chosen settings, as two factors."""
    rng = np.random.default_rng(settings.seed + 2)
    rows = np.sort(rng.permutation(scores.shape[0])[: settings.max_head_queries])
    features = estimators.kernel(outcomes.embeddings[rows], landmarks, settings.gamma)
    between = estimators.kernel(landmarks, landmarks, settings.gamma)
    solved = estimators.heads(
        features, residuals(scores[rows], counts[rows], pairs), between, list(chosen.penalties)
    )
    weights = np.zeros((len(landmarks), len(outcomes.pairs)))
    for penalty, share in chosen.penalties.items():
        weights += share * solved[penalty]
    return estimators.factorise(weights, _MAX_RANK)


def _cluster_tables(
    outcomes: Outcomes,
    scores: Any,
    counts: Any,
    pairs: PairStatistics,
    centroids: dict[int, Float],
    chosen: Chosen,
    settings: FitSettings,
) -> dict[str, Float]:
    """Posteriors, tokens, seconds and dollars per (cluster, pair)."""
    measured = {
        "tokens": outcomes.matrices(outcomes.tokens),
        "seconds": outcomes.matrices(outcomes.seconds),
        "costs_usd": outcomes.matrices(outcomes.costs_usd),
    }
    matrices = [scores, counts, *itertools.chain.from_iterable(measured.values())]
    per_scale = [
        estimators.cluster_sums(
            outcomes.embeddings, centroids[size], nearest, settings.temperature, matrices
        )
        for size, nearest in chosen.clusterings
    ]
    sums = [np.concatenate(parts) for parts in zip(*per_scale, strict=True)]
    strength = settings.cluster_strength
    tables = {
        "score_alpha": sums[0] + strength * pairs.mean,
        "score_beta": np.maximum(sums[1] - sums[0], 0.0) + strength * (1 - pairs.mean),
    }
    for position, name in enumerate(measured):
        total, known = sums[2 + 2 * position], sums[3 + 2 * position]
        # Every scale holds each outcome once.
        seen = known.sum(axis=0)
        overall = np.divide(total.sum(axis=0), seen, out=np.zeros_like(seen), where=seen > 0)
        if name == "costs_usd":
            overall = np.where(seen > 0, overall, pairs.costs_usd)
        tables[name] = estimators.shrunk_mean(total, known, overall, strength)
    return {name: table.astype(np.float32) for name, table in tables.items()}


def _examples(outcomes: Outcomes, centroids: Float, number: int) -> tuple[tuple[str, ...], ...]:
    """The questions nearest to each centroid, of those that may be shown."""
    shown = np.array([row for row, text in enumerate(outcomes.queries) if text], np.intp)
    if not len(shown):
        return ((),) * len(centroids)
    number = min(number, len(shown))
    closeness = outcomes.embeddings[shown] @ centroids.T
    nearest = np.argpartition(-closeness, number - 1, axis=0)[:number]
    order = np.take_along_axis(closeness, nearest, axis=0).argsort(axis=0)[::-1]
    ranked = shown[np.take_along_axis(nearest, order, axis=0)]
    return tuple(
        tuple(cut_example(outcomes.queries[row]) for row in ranked[:, cluster])
        for cluster in range(len(centroids))
    )
