"""What another policy would have scored on logged traffic, from decisions made by exploring.

Self-normalised inverse propensity scores (Swaminathan and Joachims, 2015):
`sum_i w_i * score_i / sum_i w_i` with `w_i = target(chosen_i | query_i) / propensity_i`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rl.contenders import Interval, Rule, ask, resampled_means
from serve_app.errors import ConfigError
from serve_app.schemas import Pair

MIN_EFFECTIVE_SIZE = 30.0
"""Below it an estimate rests on a few heavy decisions, and is refused."""


@dataclass(frozen=True)
class LoggedDecisions:
    """Decisions whose score is known. Every pair is taken to have been available to each."""

    encoder: str
    embeddings: NDArray[np.float32]
    """(num_decisions, dim)"""
    pairs: tuple[Pair, ...]
    chosen: NDArray[np.int64]
    """(num_decisions,) index into `pairs`."""
    propensity: NDArray[np.float64]
    """(num_decisions,) probability with which it was chosen, in (0, 1]."""
    score: NDArray[np.float64]
    """(num_decisions,) in [0, 1]."""

    def __post_init__(self) -> None:
        """Refuse columns that do not fit together.

        Raises:
            ConfigError: If a length, an index, a propensity or a score is wrong.
        """
        size = len(self.embeddings)
        if any(len(column) != size for column in (self.chosen, self.propensity, self.score)):
            raise ConfigError("the columns of the logged decisions differ in length")
        if not ((self.chosen >= 0) & (self.chosen < len(self.pairs))).all():
            raise ConfigError(f"a logged decision is of none of the {len(self.pairs)} pairs")
        if not ((self.propensity > 0) & (self.propensity <= 1)).all():
            raise ConfigError("a logged propensity is not in (0, 1]")
        if not ((self.score >= 0) & (self.score <= 1)).all():
            raise ConfigError("a logged score is not in [0, 1]")


@dataclass(frozen=True)
class OffPolicyEstimate:
    """The mean score of a policy on logged queries, or why it cannot be told."""

    score: Interval | None
    """`None` where it was refused."""
    effective_size: float
    """`(sum w)^2 / sum w^2`: how many decisions of the policy itself would say as much."""
    num_decisions: int
    """Those that were explored. The others say nothing of any pair but their own, and are left
    out; the estimate is of the queries of these."""
    reason: str | None = None
    """Why it was refused; `None` where it was not."""


def estimate(
    name: str,
    rule: Rule,
    logged: LoggedDecisions,
    alpha: float,
    *,
    epsilon: float = 0.0,
    num_resamples: int = 2000,
    seed: int = 0,
) -> OffPolicyEstimate:
    """Estimate what a policy would have scored.

    Args:
        name: Of the policy, for messages.
        rule: Its exploration is off.
        logged: What another policy did.
        alpha: Cost-quality dial that the policy decides at.
        epsilon: Probability in [0, 1] with which it would draw a pair uniformly instead.
        num_resamples: Of the interval.
        seed: Of the interval.

    Raises:
        ConfigError: If the rule is of another encoder, knows none of the pairs, or explores.
    """
    explored = np.flatnonzero(logged.propensity < 1)
    if not len(explored):
        return OffPolicyEstimate(None, 0.0, 0, "no logged decision was explored: all were certain")
    embeddings = logged.embeddings[explored]
    choices = ask(name, rule, embeddings, logged.encoder, logged.pairs, [alpha])
    target = epsilon / len(logged.pairs) + (1 - epsilon) * (
        choices.chosen[0] == logged.chosen[explored]
    )
    weights = target / logged.propensity[explored]
    total = float(weights.sum())
    size = total**2 / float((weights**2).sum()) if total else 0.0
    if size < MIN_EFFECTIVE_SIZE:
        reason = (
            f"the {len(explored)} explored decisions are worth {size:.1f} of this policy's, "
            f"{MIN_EFFECTIVE_SIZE:g} are needed: explore more or longer"
        )
        return OffPolicyEstimate(None, size, len(explored), reason)
    gains = weights * logged.score[explored]
    draws = resampled_means(np.stack([gains, weights], axis=1), num_resamples, seed)
    values = draws[draws[:, 1] > 0]
    low, high = np.percentile(values[:, 0] / values[:, 1], [2.5, 97.5])
    score = Interval(float(gains.sum()) / total, float(low), float(high))
    return OffPolicyEstimate(score, size, len(explored))
