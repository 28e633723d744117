"""How a cost grows with a size: the measured points, and the word for them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

_FLAT, _LINEAR = 0.15, 0.75
"""Exponents of the size, over all that was measured, below and above which growth is called so."""


@dataclass(frozen=True)
class Growth:
    """One cost at several sizes."""

    name: str
    """Of what grows, and in what: `decision over candidates`."""
    unit: str
    points: dict[int, float]
    """Size to cost, both above 0."""

    @property
    def exponent(self) -> float:
        """Slope of the logarithm of the cost over that of the size, between the last two points.

        0 is flat, 1 linear. The last ones, because at small sizes a constant covers the growth.
        """
        (size, cost), (last_size, last_cost) = list(self.points.items())[-2:]
        return math.log(max(last_cost, 1e-9) / max(cost, 1e-9)) / math.log(last_size / size)

    @property
    def word(self) -> str:
        """How it grows at the sizes measured last."""
        if self.exponent < _FLAT:
            return "flat"
        return "linear" if self.exponent > _LINEAR else "less than linear"

    def as_json(self) -> dict[str, Any]:
        """As the results hold it."""
        return {
            "unit": self.unit,
            "points": {str(size): cost for size, cost in self.points.items()},
            "exponent": self.exponent,
            "growth": self.word,
        }


def typical_ms(work: Callable[[int], object], times: int) -> float:
    """Median milliseconds of some work, which is told how often it ran before."""
    seconds = []
    for number in range(times):
        began_s = time.perf_counter()
        work(number)
        seconds.append(time.perf_counter() - began_s)
    return median(seconds) * 1e3
