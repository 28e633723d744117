"""Policies asked for their decisions on many queries, and intervals of what came of them.

The rule that serves is the rule that is asked, so an evaluation and serving cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rl.evaluate.held_out import HeldOut
from serve_app.errors import AtlasError, ConfigError
from serve_app.router.rules.base import Batch, Deciding, RoutingRequest
from serve_app.schemas import DecidedBy, Limits, Pair

_RESAMPLES_AT_ONCE = 250
"""Bounds the memory of a bootstrap on many queries."""
UNLIMITED_S = 1e9
"""Stands for no deadline."""


@dataclass(frozen=True)
class PolicyChoices:
    """A rule's decisions on some queries at some alphas; all arrays (num_alphas, num_queries)."""

    chosen: NDArray[np.intp]
    """Index of the chosen pair."""
    inside: NDArray[np.bool_]
    """False where the rule called the query out of distribution."""
    confidence: NDArray[np.float64]
    """In [0, 1], as stated."""


@dataclass(frozen=True)
class Reached:
    """What a policy's requests came to; all arrays (num_alphas, num_queries)."""

    score: NDArray[np.float64]
    """Of the answer that was returned, in [0, 1]."""
    costs_usd: NDArray[np.float64]
    """US dollars of all steps, as observed."""
    cost: NDArray[np.float64]
    """What alpha weighs: the mean dollars of the pairs that ran, together, on the pool's scale;
    0 the cheapest pair, 1 the dearest, more for several."""
    steps: NDArray[np.float64]
    """Runs of a pair or of the planner."""
    inside: NDArray[np.bool_]
    """False where the policy called the query out of distribution."""
    confidence: NDArray[np.float64]
    """In [0, 1], as stated when the request began."""


@runtime_checkable
class MultiStep(Protocol):
    """A policy whose requests may take several steps, and that knows what came of them."""

    def reach(self, held_out: HeldOut, alphas: Sequence[float]) -> Reached:
        """Answer every held-out query at every alpha, with no limit but the pairs and its steps.

        Raises:
            ConfigError: If what it knows is not of these queries.
        """
        ...


def reach(
    name: str, policy: Deciding | MultiStep, held_out: HeldOut, alphas: Sequence[float]
) -> Reached:
    """What a policy reaches on held-out queries, whether it decides once or step by step.

    Args:
        name: Of the policy, for messages.
        policy: Its exploration is off.
        held_out: The queries.
        alphas: Cost-quality dials in [0, 1].

    Raises:
        ConfigError: As `ask` and `MultiStep.reach`.
    """
    if isinstance(policy, MultiStep):
        return policy.reach(held_out, alphas)
    choices = ask(name, policy, held_out.embeddings, held_out.encoder, held_out.pairs, alphas)
    rows = np.arange(len(held_out.scores))
    return Reached(
        score=held_out.scores[rows, choices.chosen],
        costs_usd=held_out.costs_usd[rows, choices.chosen],
        cost=held_out.cost[choices.chosen],
        steps=np.ones(choices.chosen.shape),
        inside=choices.inside,
        confidence=choices.confidence,
    )


@dataclass(frozen=True, slots=True)
class BootstrapInterval:
    """A mean and its 95% bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """With its sign, as a difference is written."""
        # Adding 0 after rounding turns -0.000 into +0.000.
        mean, low, high = (round(value, 3) + 0.0 for value in (self.mean, self.low, self.high))
        return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def ask(
    name: str,
    rule: Deciding,
    embeddings: NDArray[np.float32],
    encoder: str,
    pairs: Sequence[Pair],
    alphas: Sequence[float],
) -> PolicyChoices:
    """Let a rule decide every query at every alpha, with no limit but the pairs.

    Args:
        name: Of the rule, for messages.
        rule: Its exploration is off.
        embeddings: (num_queries, dim) of `encoder`.
        encoder: A fitted rule has to be of the same.
        pairs: Those that are available.
        alphas: Cost-quality dials in [0, 1].

    Raises:
        ConfigError: If the rule is of another encoder, knows none of the pairs, or explores.
    """
    if rule.snapshot is not None and rule.snapshot.encoder != encoder:
        raise ConfigError(
            f"the {name} policy was fitted with encoder {rule.snapshot.encoder!r}, the outcomes "
            f"have embeddings of {encoder!r}: fit it again"
        )
    available = tuple(pairs)
    index = {pair: column for column, pair in enumerate(available)}
    limits = [Limits(alpha=alpha, deadline_s=UNLIMITED_S) for alpha in alphas]
    shape = (len(alphas), len(embeddings))
    choices = PolicyChoices(np.empty(shape, np.intp), np.empty(shape, np.bool_), np.empty(shape))
    for query, embedding in enumerate(embeddings):
        requests = tuple(RoutingRequest(embedding, limit) for limit in limits)
        for row, decision in enumerate(rule.decide(Batch(requests, available, 0))):
            if isinstance(decision, AtlasError):
                raise ConfigError(
                    f"the {name} policy knows none of the {len(pairs)} pairs that were measured"
                )
            if decision.propensity < 1:
                raise ConfigError(f"the {name} policy explores: switch it off to evaluate it")
            choices.chosen[row, query] = index[decision.pair]
            choices.inside[row, query] = decision.path is not DecidedBy.OUT_OF_DISTRIBUTION
            choices.confidence[row, query] = decision.confidence
    return choices


def bootstrap(
    values: NDArray[np.float64], num_resamples: int, seed: int
) -> list[BootstrapInterval]:
    """Percentile intervals of the mean over queries (Efron, 1979).

    Every column has the same resamples, so the interval of a column of differences is paired.

    Args:
        values: (num_queries, num_columns)
        num_resamples: Draws of all queries with replacement.
        seed: The same seed and number of queries give the same resamples.

    Returns:
        One per column.
    """
    draws = resampled_means(values, num_resamples, seed)
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    means = values.mean(axis=0)
    return [
        BootstrapInterval(*map(float, numbers)) for numbers in zip(means, low, high, strict=True)
    ]


def resampled_means(
    values: NDArray[np.float64], num_resamples: int, seed: int
) -> NDArray[np.float64]:
    """(num_resamples, num_columns) means of the queries of each resample."""
    rng = np.random.default_rng(seed)
    size = len(values)
    parts = []
    for start in range(0, num_resamples, _RESAMPLES_AT_ONCE):
        number = min(_RESAMPLES_AT_ONCE, num_resamples - start)
        drawn = rng.integers(size, size=(number, size))
        flat = (drawn + size * np.arange(number)[:, None]).ravel()
        counts = np.bincount(flat, minlength=number * size).reshape(number, size)
        parts.append(counts.astype(np.float64) @ values / size)
    return np.concatenate(parts)
