"""The parts a router is fitted from: clusters, posteriors, the kernel head, the gate's logistic.

Pure functions of arrays; `rl.fit.fit` puts them together and chooses their settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans  # type: ignore[import-untyped]

Float = NDArray[np.float32]

_CLUSTERING_QUERIES = 20_000
"""Queries that k-means looks at, at most."""
_BLOCK = 50_000
"""Queries handled at once, so that memory does not grow with the log."""
_JITTER = 1e-4
"""Added to the diagonal of the head's normal equations."""


def k_means(embeddings: Float, num_clusters: int, seed: int) -> Float:
    """(num_clusters, dim) centroids: k-means++, one start, at most 100 iterations."""
    sample = embeddings
    if len(sample) > _CLUSTERING_QUERIES:
        rng = np.random.default_rng(seed)
        sample = sample[rng.choice(len(sample), _CLUSTERING_QUERIES, replace=False)]
    # Its own centring and checks cost more than they give on unit vectors.
    model = KMeans(num_clusters, n_init=1, max_iter=100, random_state=seed)
    centroids: Float = model.fit(sample).cluster_centers_.astype(np.float32)
    return centroids


def assign(embeddings: Float, centroids: Float, nearest: int, temperature: float) -> Float:
    """(num_queries, num_clusters) weights of the clusters of each query; rows sum to 1.

    Only the `nearest` clusters of a query have weight; each falls by e per `temperature` of squared
    distance.
    """
    closeness = 2 * (embeddings @ centroids.T) - (centroids**2).sum(axis=1)
    if nearest == 1:
        hard: Float = np.zeros(closeness.shape, np.float32)
        hard[np.arange(len(hard)), closeness.argmax(axis=1)] = 1.0
        return hard
    weights = np.exp((closeness - closeness.max(axis=1, keepdims=True)) / temperature)
    if nearest < weights.shape[1]:
        least = np.partition(weights, -nearest, axis=1)[:, -nearest, None]
        weights[weights < least] = 0.0
    normalised: Float = weights / weights.sum(axis=1, keepdims=True)
    return normalised


def cluster_sums(
    embeddings: Float, centroids: Float, nearest: int, temperature: float, matrices: list[Any]
) -> list[NDArray[np.float64]]:
    """The sum of sparse (num_queries, num_pairs) matrices in every cluster.

    Returns:
        Per matrix (num_clusters, num_pairs).
    """
    totals = [np.zeros((len(centroids), matrix.shape[1])) for matrix in matrices]
    for start in range(0, len(embeddings), _BLOCK):
        rows = slice(start, start + _BLOCK)
        weights = assign(embeddings[rows], centroids, nearest, temperature)
        for total, matrix in zip(totals, matrices, strict=True):
            total += np.asarray(matrix[rows].T @ weights).T
    return totals


def shrunk_mean(
    sums: NDArray[np.float64],
    counts: NDArray[np.float64],
    prior: NDArray[np.float64],
    strength: float,
) -> NDArray[np.float64]:
    """Means pulled towards `prior` as if it were `strength` further observations."""
    mean: NDArray[np.float64] = (sums + strength * prior) / (counts + strength)
    return mean


def kernel(embeddings: Float, landmarks: Float, gamma: float) -> Float:
    """(num_queries, num_landmarks) exp(-gamma * squared distance) of unit vectors."""
    features: Float = np.exp(2 * gamma * np.minimum(embeddings @ landmarks.T - 1, 0.0))
    return features


def heads(
    features: Float, residuals: Any, landmark_kernel: Float, penalties: Sequence[float]
) -> dict[float, NDArray[np.float64]]:
    """Kernel ridge regression of every pair on the queries that it was seen on.

    Pairs that were seen on the same queries share one system. A query that a pair was not seen on
    says nothing of the pair: as a residual of 0 it would pull what is expected of the pair to its
    mean, the more the fewer of the queries were asked.

    Args:
        features: (num_queries, num_landmarks) as of `kernel`.
        residuals: (num_queries, num_pairs) sparse: score minus the pair's mean, with an entry
            wherever the pair was seen.
        landmark_kernel: (num_landmarks, num_landmarks)
        penalties: Of the ridge.

    Returns:
        By penalty (num_landmarks, num_pairs) weights.
    """
    columns = residuals.tocsc()
    columns.sort_indices()
    groups: dict[bytes, list[int]] = {}
    for pair in range(columns.shape[1]):
        rows = columns.indices[columns.indptr[pair] : columns.indptr[pair + 1]]
        groups.setdefault(rows.tobytes(), []).append(pair)
    shape = (features.shape[1], columns.shape[1])
    weights = {penalty: np.zeros(shape) for penalty in penalties}
    for pairs in groups.values():
        rows = columns.indices[columns.indptr[pairs[0]] : columns.indptr[pairs[0] + 1]]
        seen = features[rows]
        gram, right = seen.T @ seen, seen.T @ columns[rows][:, pairs].toarray()
        for penalty, solved in weights.items():
            solved[:, pairs] = solve_head(gram, right, landmark_kernel, penalty)
    return weights


def solve_head(
    gram: NDArray[Any],
    right: NDArray[Any],
    landmark_kernel: Float,
    penalty: float,
) -> NDArray[np.float64]:
    """(num_landmarks, num_pairs) weights of kernel ridge regression on a subset of regressors.

    Minimises `|R - Z W|^2 + penalty * W' K W` (Nystroem / subset of regressors; Rasmussen and
    Williams, 2006, eq. 8.14).

    Args:
        gram: (num_landmarks, num_landmarks) `Z' Z`.
        right: (num_landmarks, num_pairs) `Z' R`.
        landmark_kernel: (num_landmarks, num_landmarks) `K`.
        penalty: Of the ridge.
    """
    system = gram + penalty * landmark_kernel.astype(np.float64) + _JITTER * np.eye(len(gram))
    return np.asarray(np.linalg.solve(system, right), np.float64)


def factorise(weights: NDArray[np.float64], max_rank: int) -> tuple[Float, Float]:
    """`weights` as the product of (rows, rank) and (rank, columns), the nearest in norm."""
    rank = min(max_rank, *weights.shape)
    if rank == weights.shape[1]:
        return weights.astype(np.float32), np.eye(rank, dtype=np.float32)
    left, values, right = np.linalg.svd(weights, full_matrices=False)
    return (left[:, :rank] * values[:rank]).astype(np.float32), right[:rank].astype(np.float32)


def descriptor_prior(
    descriptors: Float, means: NDArray[np.float64], counts: NDArray[np.float64]
) -> tuple[Float, float]:
    """Predict a pair's mean score from its descriptor by count-weighted ridge regression.

    Args:
        descriptors: (num_pairs, descriptor)
        means: (num_pairs,) mean scores; of no weight where the count is 0.
        counts: (num_pairs,)

    Returns:
        (descriptor,) weights and the bias.
    """
    weight = counts / max(counts.max(), 1.0)
    centre = (weight @ descriptors) / weight.sum()
    bias = float(weight @ means / weight.sum())
    centred = (descriptors - centre).astype(np.float64)
    # Penalty 1 in units of the descriptors' own spread: a handful of pairs cannot say much.
    scale = float((weight[:, None] * centred**2).sum() / max(centred.shape[1], 1)) or 1.0
    system = (centred.T * weight) @ centred + scale * np.eye(centred.shape[1])
    slopes = np.linalg.solve(system, (centred.T * weight) @ (means - bias))
    return slopes.astype(np.float32), bias - float(centre @ slopes)


def logistic(features: NDArray[np.float64], is_right: NDArray[np.bool_]) -> Float:
    """(num_features,) weights of a logistic regression, by Newton steps with a small ridge.

    Args:
        features: (num_examples, num_features), a column of ones among them.
        is_right: (num_examples,)
    """
    weights = np.zeros(features.shape[1])
    for _ in range(30):
        share = 1 / (1 + np.exp(-np.clip(features @ weights, -30, 30)))
        slope = features.T @ (share - is_right) + weights
        curvature = (features.T * (share * (1 - share))) @ features + np.eye(len(weights))
        step = np.linalg.solve(curvature, slope)
        weights -= step
        if np.abs(step).max() < 1e-6:
            break
    return weights.astype(np.float32)


def relative_distances(embeddings: Float, centroids: Float, sizes: Sequence[int]) -> Float:
    """(num_queries,) squared distance to the nearest centroid over the mean one, in [0, 1].

    The queries are those the centroids are means of: each is compared with its own cluster as it
    would be without the query, so that a new query's distance can be held against theirs.

    Args:
        embeddings: (num_queries, dim) unit vectors.
        centroids: (num_centroids, dim), those of all scales one after another.
        sizes: Number of centroids of each scale.
    """
    squared = np.maximum(1 + (centroids**2).sum(axis=1) - 2 * (embeddings @ centroids.T), 0.0)
    mean = np.maximum(squared.mean(axis=1), 1e-6)
    rows, start = np.arange(len(squared)), 0
    for size in sizes:
        own = start + squared[:, start : start + size].argmin(axis=1)
        members = np.bincount(own, minlength=len(centroids))[own].astype(np.float64)
        # Without one of its n members a mean lies n / (n - 1) times as far from that member.
        squared[rows, own] *= (members / np.maximum(members - 1, 1e-6)) ** 2
        start += size
    distances: Float = np.minimum(squared.min(axis=1) / mean, 1.0).astype(np.float32)
    return distances
