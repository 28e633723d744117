"""How the places of one gateway replica are shared among API keys."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable

from serve_app.errors import RateLimited

_LARGEST_SHARE = 0.75
"""Of the places, for one key while others call."""
_REMEMBERED_S = 60.0
"""How long a key counts as calling after its last request."""


class Shares:
    """Counts requests under way by key, and refuses a key that has its share.

    Invariants:
        - While two keys call, neither holds more than three quarters of the places, rounded down,
          but at least one; a key that is alone may hold all.
        - No key holds more than its configured number of places.
        - Memory is bounded by the requests under way.
    """

    def __init__(
        self, max_per_key: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin with no request under way.

        Args:
            max_per_key: Requests of one key at once. `None`: unlimited.
            clock: Seconds, monotonic.
        """
        self._max_per_key = max_per_key
        self._clock = clock
        self._ongoing: Counter[str] = Counter()
        self._callers: OrderedDict[str, float] = OrderedDict()
        """The last two keys that called, and when: one of them is not the one that asks."""

    def enter(self, owner: str, places: int) -> None:
        """Take a place for a key.

        Args:
            owner: Id of the key.
            places: How many there are for all keys.

        Raises:
            RateLimited: If the key has as many as it may have.
        """
        allowed = max(1, int(places * _LARGEST_SHARE)) if self._others_call(owner) else places
        if self._max_per_key is not None:
            allowed = min(allowed, self._max_per_key)
        if self._ongoing[owner] >= allowed:
            raise RateLimited(
                f"{self._ongoing[owner]} requests of this API key are under way here, as many as "
                "one key may have; try again when one has ended"
            )
        self._ongoing[owner] += 1

    def leave(self, owner: str) -> None:
        """Give a place back."""
        self._ongoing[owner] -= 1
        if not self._ongoing[owner]:
            del self._ongoing[owner]

    def _others_call(self, owner: str) -> bool:
        """Note the call, and say whether another key called within the last minute."""
        now_s = self._clock()
        self._callers[owner] = now_s
        self._callers.move_to_end(owner)
        if len(self._callers) > 2:
            self._callers.popitem(last=False)
        return any(
            other != owner and called_s >= now_s - _REMEMBERED_S
            for other, called_s in self._callers.items()
        )
