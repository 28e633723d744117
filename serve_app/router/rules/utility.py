"""The one utility and the one scale of cost: of serving, training and evaluation.

`U = (1 - alpha) * quality - alpha * cost`. Cost is dollars on the pool's log scale: 0 is the
cheapest pair, 1 the dearest. A free pair counts as a hundredth of the cheapest paid one. Ranges are
computed in float64 whatever comes in, so the same dollars cost the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.floating[Any]]
_Scores = TypeVar("_Scores", NDArray[np.float32], NDArray[np.float64])

_PAID_TO_FREE = 100
"""Times a free pair's price that the cheapest paid one costs."""
_LEAST_USD = 1e-30
_LEAST_WIDTH = 1e-6
"""Of a range of logarithms; prices less than this apart differ by rounding alone."""


def utility(alpha: float | _Floats, quality: _Scores, cost: _Floats) -> _Scores:
    """What a caller gains: `(1 - alpha) * quality - alpha * cost`, in [-1, 1].

    Args:
        alpha: Cost-quality dial in [0, 1]; an array broadcasts.
        quality: Expected or observed scores in [0, 1], of any shape.
        cost: Normalised costs; broadcasts against the scores.
    """
    gained: _Scores = (1 - alpha) * quality - alpha * cost
    return gained


def trade(alpha: _Floats) -> _Floats:
    """Score points that the whole range of cost is worth: `min(alpha / (1 - alpha), 1)`.

    The utility over `1 - alpha`, bounded: above alpha 0.5 a cheap wrong answer would beat a dear
    right one.

    Args:
        alpha: Cost-quality dials in [0, 1].
    """
    worth: _Floats = np.minimum(alpha / np.maximum(1 - alpha, 1e-6), 1.0)
    return worth


def cost_range(costs_usd: _Floats, present: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(batch, 2) natural logarithms of the dollars that cost 0 and cost 1 stand for.

    Args:
        costs_usd: (batch, num_pairs) expected of one run.
        present: (batch, num_pairs) the pool.
    """
    usd = np.asarray(costs_usd, np.float64)
    paid = present & (usd > 0)
    least_paid = np.where(paid, usd, np.inf).min(axis=1, initial=np.inf)
    least_paid = np.where(np.isfinite(least_paid), least_paid, 1.0)
    floored = np.maximum(usd, least_paid[:, None] / _PAID_TO_FREE)
    low = np.log(np.where(present, floored, np.inf).min(axis=1, initial=np.inf))
    high = np.log(np.where(present, floored, 0.0).max(axis=1, initial=_LEAST_USD))
    low = np.where(np.isfinite(low), low, high)
    return np.stack([low, high], axis=1)


def normalised(costs_usd: _Floats, log_cost_range: NDArray[np.float64]) -> NDArray[np.float32]:
    """Dollars as cost: 0 the cheapest pair, 1 the dearest, more for what several pairs take.

    Args:
        costs_usd: Any shape.
        log_cost_range: As `cost_range` gives it: the same shape and a last axis of 2, or one that
            broadcasts.

    Returns:
        At least 0; all 0 where the pool's prices do not differ.
    """
    low, high = log_cost_range[..., 0], log_cost_range[..., 1]
    width = high - low
    differs = width > _LEAST_WIDTH
    logs = np.log(np.maximum(np.asarray(costs_usd, np.float64), _LEAST_USD))
    share = (logs - low) / np.where(differs, width, 1.0)
    return np.where(differs, np.maximum(share, 0.0), 0.0).astype(np.float32)


def normalised_cost(costs_usd: Sequence[float] | _Floats) -> NDArray[np.float32]:
    """The costs of a pool's own pairs, in [0, 1]; all 0 where their prices do not differ.

    Args:
        costs_usd: (num_pairs,) price of a typical call.
    """
    usd = np.asarray(costs_usd, np.float64)
    return normalised(usd, pool_range(usd))


def pool_range(costs_usd: _Floats) -> NDArray[np.float64]:
    """(2,) the `cost_range` of a whole pool.

    Args:
        costs_usd: (num_pairs,) expected of one run.
    """
    everyone = np.ones((1, len(costs_usd)), np.bool_)
    limits: NDArray[np.float64] = cost_range(costs_usd[None, :], everyone)[0]
    return limits
