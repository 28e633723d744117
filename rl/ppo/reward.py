"""The reward of a trajectory, term by term: `R = R_fmt + R_out + R_sel - cost`.

Pure functions of arrays. The paper (Wu et al., arXiv 2601.03872, section 3.2) has the first three
terms; its reward is `RewardSettings.paper()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from serve_app.router.rules.utility import normalised, trade

Float = NDArray[np.float32]
Bool = NDArray[np.bool_]

DEFAULT_TOLERANCE = 1e-6


@dataclass(frozen=True)
class RewardSettings:
    """What each term weighs."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    outcome_weight: float = 1.0
    """Of the score of the returned answer."""
    selection_penalty: float = 0.15
    """Taken off where the returned answer is not of one of the best pairs for the query."""
    format_penalty: float = 1.0
    """Taken off for an illegal action, and for an episode without an answer."""
    cost_weight: float = 1.0
    """Of the cost; at 1 or less one cheap wrong answer never beats one dear right one."""
    tolerance: float = DEFAULT_TOLERANCE
    """Score points below the best that still count as the best."""
    observed_cost: bool = False
    """Whether the dollars of this very run are charged; else the pairs' expected ones, as in the
    utility that policies are evaluated by."""

    def __post_init__(self) -> None:
        """Refuse what is not a reward.

        Raises:
            ValueError: If a weight is negative.
        """
        for name in (
            "outcome_weight",
            "selection_penalty",
            "format_penalty",
            "cost_weight",
            "tolerance",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least 0")

    @classmethod
    def paper(cls) -> RewardSettings:
        """The reward of the paper: no cost."""
        return cls(cost_weight=0.0)


class RewardTerms(NamedTuple):
    """One reward per row, taken apart; each (n,) float32. Their sum is the reward."""

    out: Float
    """Score of the returned answer."""
    fmt: Float
    """At most 0: an illegal action, or no answer."""
    sel: Float
    """At most 0: the answer of a pair that was not among the best."""
    cost: Float
    """At most 0: what the dollars took off."""

    def total(self) -> Float:
        """(n,) the reward."""
        summed: Float = self.out + self.fmt + self.sel + self.cost
        return summed


def charge(
    settings: RewardSettings, alpha: Float, usd: Float, log_cost_range: NDArray[np.float64]
) -> Float:
    """(n,) what so many dollars take off a reward, at least 0.

    `min(alpha / (1 - alpha), 1) * normalised(usd)`: in units of the score, as the utility
    `(1 - alpha) * score - alpha * cost` trades them. Several runs cost more than the dearest one.

    Args:
        settings: The cost's weight.
        alpha: (n,) in [0, 1].
        usd: (n,) spent so far; 0 costs nothing.
        log_cost_range: (n, 2) as `utility.cost_range` gives it.
    """
    share = np.where(usd > 0, normalised(usd, log_cost_range), 0.0)
    charged: Float = (settings.cost_weight * trade(alpha) * share).astype(np.float32)
    return charged


def end_terms(
    settings: RewardSettings, score: Float, answered: Bool, legal: Bool, best_score: Float
) -> tuple[Float, Float, Float]:
    """The terms that are settled when an episode ends.

    Args:
        settings: What each weighs.
        score: (n,) of the returned answer; of no weight where there is none.
        answered: (n,) there is an answer.
        legal: (n,) the last action was allowed; else the answers so far do not count.
        best_score: (n,) the best score any pair reaches on the query; NaN where unknown, and then
            no pair is held against it.

    Returns:
        R_out, R_fmt and R_sel, each (n,).
    """
    fine = answered & legal
    out = np.where(fine, settings.outcome_weight * score, 0.0).astype(np.float32)
    fmt = np.where(fine, 0.0, -settings.format_penalty).astype(np.float32)
    with np.errstate(invalid="ignore"):
        beaten = fine & (score < best_score - settings.tolerance)
    sel = np.where(beaten, -settings.selection_penalty, 0.0).astype(np.float32)
    return out, fmt, sel
