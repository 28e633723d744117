"""A token bucket per caller."""

from __future__ import annotations

import time
from collections import OrderedDict

from serve_app.errors import RateLimited

_MAX_CALLERS = 10_000
"""Buckets kept; the caller heard of longest ago is forgotten first, with a full bucket."""


class RateLimiter:
    """Lets each caller do something so many times a minute."""

    def __init__(self, per_minute: float) -> None:
        """Set the rate.

        Args:
            per_minute: Average rate, above 0; a tenth of a minute's worth, and at least one, may
                come at once.
        """
        self._per_s = per_minute / 60
        self._capacity = max(1.0, per_minute / 10)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str) -> None:
        """Count one.

        Raises:
            RateLimited: If the caller did too many; it says when there is room for one more.
        """
        now_s = time.monotonic()
        left, since_s = self._buckets.pop(caller, (self._capacity, now_s))
        left = min(self._capacity, left + (now_s - since_s) * self._per_s)
        allowed = left >= 1
        self._buckets[caller] = (left - 1 if allowed else left, now_s)
        if len(self._buckets) > _MAX_CALLERS:
            self._buckets.popitem(last=False)
        if not allowed:
            raise RateLimited(
                f"at most {self._per_s * 60:g} of these a minute; try again later",
                None,
                (1 - left) / self._per_s,
            )
