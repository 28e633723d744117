"""Fits the verifier: from a profile as a table, with what path 1 believed, to arrays of a snapshot.

Gradient-boosted trees over the features of `router.policy.verifier`, with path 1's beliefs of fits
that saw neither the query nor, in one view, its domain. Folds are of questions. Each answer is
learned from alone, and beside a few others, as a request holds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl.ppo.judges import Judges
from rl.ppo.table import ReplayTable, View
from serve_app.errors import ConfigError
from serve_app.router.policy.features import NO_ANSWER
from serve_app.router.policy.verifier import (
    AMONG,
    Answers,
    Verifier,
    among_of,
    beliefs_of,
    features_of,
    relative_scales,
)
from serve_app.signals import NUMBERS

Float = NDArray[np.float32]
Index = NDArray[np.intp]

_NUM_FOLDS = 5
_MOST_BESIDE = 4
"""Answers of a request that are learned from together."""
_LEVELS, _QUANTILES = 11, 16
"""Of the outlook: levels of belief, and chances at each."""
_BINS = 64
"""Of each feature."""
LEAST_ANSWERS = 200
"""Answers below which there is no verifier."""


@dataclass(frozen=True)
class VerifierSettings:
    """Of the trees."""

    num_trees: int = 120
    num_leaves: int = 12
    depth: int = 4
    """Of a tree; a decision goes down so many times."""
    learning_rate: float = 0.08
    least_in_leaf: int = 40
    l2: float = 5.0
    seed: int = 0


@dataclass(frozen=True)
class Bins:
    """Quantiles of each feature, where trees may split; the same for every fit.

    scikit-learn lays out bins of weighted rows anew in every fit, which takes longer than growing
    the trees. It takes each of few values for a bin, so it is given the bins' numbers.
    """

    edges: tuple[Float, ...]
    """Of each feature, ascending."""

    @classmethod
    def of(cls, features: Float) -> Bins:
        """Bins of about as many of the rows each.

        Args:
            features: (n, num_features), NaN where not known.
        """
        edges = []
        for column in features.T:
            values = np.unique(column[np.isfinite(column)])
            if len(values) <= _BINS:
                between = (values[1:] + values[:-1]) / 2
            else:
                shares = np.linspace(0, 1, _BINS + 1)[1:-1]
                between = np.unique(np.quantile(column[np.isfinite(column)], shares))
            edges.append(between.astype(np.float32))
        return cls(tuple(edges))

    def numbers(self, features: Float) -> Float:
        """(n, num_features) the bin of each value, the first whose edge it does not exceed."""
        found = [np.searchsorted(*of) for of in zip(self.edges, features.T, strict=True)]
        return np.where(np.isnan(features), np.nan, np.stack(found, axis=1)).astype(np.float32)

    def thresholds(self, feature: Index, number: NDArray[np.float64]) -> Float:
        """(n,) the values that part bins up to a number, between two of them, from those above."""
        found = np.full(len(feature), np.inf, np.float32)
        for place, (of, split) in enumerate(zip(feature.tolist(), number.tolist(), strict=True)):
            if split < len(self.edges[of]):
                found[place] = self.edges[of][int(split)]
        return found


@dataclass(frozen=True)
class Examples:
    """Answers with what is known of them; n rows."""

    features: Float
    """(n, len(FEATURES))"""
    bins: Bins
    binned: Float
    """(n, len(FEATURES)) the features' bins."""
    score: Float
    """(n,)"""
    query: Index
    """(n,) row of the table."""
    pair: Index
    """(n,)"""
    view: Index
    """(n,)"""
    is_alone: NDArray[np.bool_]
    """(n,) whether the answer was the only one."""
    quality: Float
    """(n,) what path 1 believed."""


@dataclass(frozen=True)
class Fitted:
    """A verifier, and what it said of questions that it was not fitted on."""

    arrays: dict[str, NDArray[Any]]
    examples: Examples
    chance: NDArray[np.float64]
    """(n,) of each example by a fit without its question."""
    left_out: NDArray[np.float64]
    """(n,) by a fit without its domain, on the last view; NaN elsewhere."""
    judges: Judges
    """Those fits, for the table's episodes."""


def fit_verifier(table: ReplayTable, settings: VerifierSettings | None = None) -> Fitted | None:
    """Fit a verifier on a profile.

    Args:
        table: Its views are of fits without each query; the last one of fits without its domain.
        settings: Of the trees.

    Returns:
        `None` where there are too few answers, or all are right or wrong.

    Raises:
        ConfigError: If the table has no views.
    """
    settings = settings or VerifierSettings()
    if not table.views:
        raise ConfigError("the verifier reads what path 1 believes: the table has no view")
    answered = table.answer_key[0] != NO_ANSWER
    if answered.sum() < LEAST_ANSWERS or table.score[0][answered].std() < 1e-6:
        return None
    rng = np.random.default_rng(settings.seed)
    centre, width = _scales(table)
    examples = _examples(table, centre, width, rng)
    fold_of = rng.permutation(table.num_queries) % _NUM_FOLDS
    fold, raw, fits = fold_of[examples.query], np.empty(len(examples.score)), []
    for held in range(_NUM_FOLDS):
        part = fold == held
        fits.append(_Trees(examples, ~part, settings))
        raw[part] = fits[-1].raw(examples.binned[part])
    calibration = _isotonic(raw, examples.score)
    chance = np.interp(raw, *calibration)
    shared = {
        "calibration": calibration.astype(np.float32),
        "centre": centre,
        "width": width,
        "outlook": _outlook(examples, chance),
    }
    without, left_out = _left_out(table.domains, examples, settings)
    left_out = np.interp(left_out, *calibration)

    def verifier(trees: _Trees) -> Verifier:
        return Verifier(trees.arrays() | shared, table.num_pairs)

    arrays = _Trees(examples, np.ones(len(fold), np.bool_), settings).arrays() | shared
    Verifier(arrays, table.num_pairs)  # what is kept can be read
    of = np.tile(fold_of, (len(table.views), 1))
    if without and len(table.views) > 1:
        names = list(without)
        of[-1] = [_NUM_FOLDS + names.index(domain) for domain in table.domains]
    judges = Judges(
        verifiers=tuple(verifier(trees) for trees in (*fits, *without.values())),
        of=of,
        places=np.arange(table.num_pairs),
        alone=_alone(examples, chance, left_out, (len(table.views), *table.score.shape[1:])),
    )
    return Fitted(arrays, examples, chance, left_out, judges)


def with_judges(table: ReplayTable, settings: VerifierSettings | None = None) -> ReplayTable:
    """A table for training whose answers are judged as in serving, where there are enough of them.

    Args:
        table: As of `fit_verifier`.
        settings: Of the trees.
    """
    fitted = fit_verifier(table, settings)
    return table if fitted is None else replace(table, judges=fitted.judges)


def _alone(
    examples: Examples,
    chance: NDArray[np.float64],
    left_out: NDArray[np.float64],
    shape: tuple[int, ...],
) -> Float:
    """`Judges.alone`: on the last view by the fits without the domain, where there are any."""
    alone = np.full(shape, np.nan, np.float32)
    said = np.where(np.isfinite(left_out) & (examples.view > 0), left_out, chance)
    rows = examples.is_alone
    alone[examples.view[rows], examples.query[rows], examples.pair[rows]] = said[rows]
    return alone


class _Trees:
    """One ensemble, by scikit-learn's histogram gradient boosting."""

    def __init__(
        self, examples: Examples, rows: NDArray[np.bool_], settings: VerifierSettings
    ) -> None:
        from sklearn.ensemble import (  # type: ignore[import-untyped]
            HistGradientBoostingClassifier,
        )
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        self._bins = examples.bins
        features, score = examples.binned[rows], examples.score[rows]
        # A score between is right to that part, and wrong to the rest.
        both = np.flatnonzero((score > 0) & (score < 1))
        stacked = np.concatenate([features, features[both]])
        stacked[:, ~np.isfinite(stacked).any(axis=0)] = 0.0  # never known, so never split on
        label = np.concatenate([score > 0, np.zeros(len(both), np.bool_)])
        weight = np.concatenate([np.where(score > 0, score, 1.0), 1 - score[both]])
        self._model = HistGradientBoostingClassifier(
            max_iter=settings.num_trees,
            max_leaf_nodes=settings.num_leaves,
            max_depth=settings.depth,
            learning_rate=settings.learning_rate,
            min_samples_leaf=settings.least_in_leaf,
            max_bins=_BINS,
            l2_regularization=settings.l2,
            early_stopping=False,
            random_state=settings.seed,
        )
        self._constant: float | None = None
        if len(np.unique(label)) < 2:
            self._constant = 5.0 if label.any() else -5.0
            return
        # Beside other work on the same cores several threads wait for each other.
        with threadpool_limits(limits=1, user_api="openmp"):
            self._model.fit(stacked, label, sample_weight=weight)

    def raw(self, binned: Float) -> NDArray[np.float64]:
        """(n,) log-odds."""
        if self._constant is not None:
            return np.full(len(binned), self._constant)
        raw: NDArray[np.float64] = self._model.decision_function(binned)
        return raw

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The trees as `Verifier` takes them."""
        # scikit-learn has no public view of these nodes; a test compares the two.
        trees = [of[0].nodes for of in self._model._predictors]
        shape = (len(trees), max(map(len, trees)))
        feature = np.full(shape, -1, np.int16)
        left, right = np.zeros(shape, np.int16), np.zeros(shape, np.int16)
        nan_left = np.zeros(shape, np.uint8)
        threshold, value = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for number, nodes in enumerate(trees):
            inner = nodes["is_leaf"] == 0
            size = len(nodes)
            feature[number, :size] = np.where(inner, nodes["feature_idx"], -1)
            left[number, :size] = np.where(inner, nodes["left"], 0)
            right[number, :size] = np.where(inner, nodes["right"], 0)
            nan_left[number, :size] = nodes["missing_go_to_left"]
            split = self._bins.thresholds(nodes["feature_idx"], nodes["num_threshold"])
            threshold[number, :size] = np.where(inner, np.clip(split, -3e38, 3e38), 0.0)
            value[number, :size] = nodes["value"]
        base = np.asarray(self._model._baseline_prediction, np.float32).reshape(1)
        return {
            "feature": feature,
            "left": left,
            "right": right,
            "nan_left": nan_left,
            "threshold": threshold,
            "value": value,
            "base": base,
        }


def view_beliefs(table: ReplayTable, view: View) -> Float:
    """(N, P, len(BELIEFS)) what a view believes."""
    return beliefs_of(
        view.quality,
        view.spread,
        view.overall,
        view.outside,
        table.similarity,
        view.quality.max(axis=1, keepdims=True),
        view.distance_quantile[:, None],
        view.inside[:, None],
    )


def signals_of_table(table: ReplayTable) -> Float:
    """(N, P, len(NUMBERS)) signals of the first time; NaN where not kept."""
    if table.signals is None:
        return np.full((table.num_queries, table.num_pairs, len(NUMBERS)), np.nan, np.float32)
    signals: Float = table.signals[0]
    return signals


def _scales(table: ReplayTable) -> tuple[Float, Float]:
    answered = table.answer_key[0] != NO_ANSWER
    query, pair = np.nonzero(answered)
    vectors = table.answer_embeddings[table.answer_row[0][query, pair]]
    likeness = (vectors * table.embeddings[query]).sum(axis=1)
    likeness = np.where(table.answer_row[0][query, pair] > 0, likeness, np.nan)
    numbers = signals_of_table(table)[query, pair]
    return relative_scales(numbers, likeness.astype(np.float32), pair, table.num_pairs)


def _examples(
    table: ReplayTable, centre: Float, width: Float, rng: np.random.Generator
) -> Examples:
    """Every answer alone, and once beside some others of its question, in every view."""
    numbers, voters = signals_of_table(table), table.voter_of(np.arange(table.num_pairs))
    beliefs = [view_beliefs(table, view) for view in table.views]
    parts: dict[str, list[NDArray[Any]]] = {}

    def add(query: int, pairs: Index, among: Float, vectors: Float, is_alone: bool) -> None:
        for number, believed in enumerate(beliefs):
            answers = Answers(
                believed[query, pairs], numbers[query, pairs], table.answer_key[0][query, pairs],
                voters[pairs], vectors, table.embeddings[query], pairs,
            )  # fmt: skip
            size = len(pairs)
            columns: dict[str, NDArray[Any]] = {
                "features": features_of(answers, among, centre, width),
                "score": table.score[0][query, pairs],
                "query": np.full(size, query),
                "pair": pairs,
                "view": np.full(size, number),
                "is_alone": np.full(size, is_alone),
                "quality": table.views[number].quality[query, pairs],
            }
            for name, column in columns.items():
                parts.setdefault(name, []).append(column)

    for query in range(table.num_queries):
        pairs = np.flatnonzero(table.answer_key[0][query] != NO_ANSWER)
        if not len(pairs):
            continue
        rows = table.answer_row[0][query, pairs]
        vectors = np.where(rows[:, None] > 0, table.answer_embeddings[rows], np.nan)
        alone = np.zeros((len(pairs), len(AMONG)), np.float32)
        alone[:, 0], alone[:, -1] = vectors @ table.embeddings[query], np.nan
        add(query, pairs, alone, vectors, is_alone=True)
        order, start = rng.permutation(len(pairs)), 0
        while start < len(order):
            chosen = order[start : start + int(rng.integers(2, _MOST_BESIDE + 1))]
            start += len(chosen)
            held = Answers(
                beliefs[0][query, pairs[chosen]], numbers[query, pairs[chosen]],
                table.answer_key[0][query, pairs[chosen]], voters[pairs[chosen]],
                vectors[chosen], table.embeddings[query], pairs[chosen],
            )  # fmt: skip
            add(query, pairs[chosen], among_of(held), vectors[chosen], is_alone=False)
    columns = {name: np.concatenate(of) for name, of in parts.items()}
    bins = Bins.of(columns["features"])
    return Examples(bins=bins, binned=bins.numbers(columns["features"]), **columns)


def _isotonic(raw: NDArray[np.float64], score: Float) -> NDArray[np.float64]:
    """(2, points) log-odds and chances, ascending: what became of answers of such log-odds."""
    from sklearn.isotonic import IsotonicRegression  # type: ignore[import-untyped]

    model = IsotonicRegression(y_min=0.005, y_max=0.995, out_of_bounds="clip").fit(raw, score)
    return np.stack([model.X_thresholds_, model.y_thresholds_])


def _outlook(examples: Examples, chance: NDArray[np.float64]) -> Float:
    """(levels, quantiles) chances that answers had whose candidates were believed as good."""
    rows = examples.is_alone
    order = np.argsort(examples.quality[rows], kind="stable")
    quality, chances = examples.quality[rows][order], chance[rows][order]
    number = min(len(order), max(LEAST_ANSWERS, len(order) // 20))
    shares = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    outlook = np.empty((_LEVELS, _QUANTILES), np.float32)
    for place, level in enumerate(np.linspace(0, 1, _LEVELS)):
        middle = int(np.searchsorted(quality, level))
        start = min(max(0, middle - number // 2), len(order) - number)
        outlook[place] = np.quantile(chances[start : start + number], shares)
    return outlook


def _left_out(
    domains: Sequence[str], examples: Examples, settings: VerifierSettings
) -> tuple[dict[str, _Trees], NDArray[np.float64]]:
    """Fits without each domain, and (n,) their log-odds of its answers on the last view."""
    names = np.array(domains)[examples.query]
    raw = np.full(len(names), np.nan)
    fits: dict[str, _Trees] = {}
    if len(set(domains)) < 2:
        return fits, raw
    for name in sorted(set(domains)):
        rest = names != name
        fits[name] = _Trees(examples, rest, settings)
        asked = ~rest & (examples.view == examples.view.max())
        raw[asked] = fits[name].raw(examples.binned[asked])
    return fits, raw
