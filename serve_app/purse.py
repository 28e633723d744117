"""What an API key with limits may still spend at one gateway: the budget above its requests' own.

A purse holds a lease, a part of the key's limits that no other gateway spends. Calls reserve from
what is in the purse, without asking anybody; only where that is too little is more drawn.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from serve_app.budget import Budget, Deadline, Use
from serve_app.errors import QuotaExceeded, QuotaUnknown
from serve_app.store import Amounts, Grant, Refusal

Draw = Callable[[str, Amounts], Awaitable[Grant | Refusal]]
"""Adds to a lease at least so much, or says why not."""

_ROUNDING = 1e-9
"""Sums of floats are off by less than this share of what was drawn."""
_DRAWS = 8
"""Of one call; more than one only where other calls spend what was drawn."""
_REFUSED_S = 0.5
"""How long the store's word stands: that there is not so much, or that there is something."""
_WORDS = {"usd": "{:.4g} USD", "tokens": "{:,.0f} tokens", "requests": "{:,.0f} requests"}


class Purse(Budget):
    """Paid from by every request of one key; used from one event loop.

    Invariants:
        - What its calls have spent and reserved is no more than was drawn, unless a call used more
          than was reserved for it.
        - Between two draws nothing is asked.
    """

    def __init__(self, lease_id: str, draw: Draw, safe_s: float) -> None:
        """Begin empty.

        Args:
            lease_id: Of the lease.
            draw: Adds to the lease.
            safe_s: How long after a draw, or a renewal, a request may begin that is paid from it.
        """
        super().__init__(Deadline(math.inf))
        self.lease_id = lease_id
        self.users = 0
        """Requests under way."""
        self.used_s = time.monotonic()
        """When the last of them ended."""
        self.ends_unix_s = math.inf
        """When it is no longer for new requests: a limit begins anew."""
        self.renewed_s = 0.0
        """When the lease was drawn or renewed; on the wall clock, which runs while a machine
        sleeps. 0: it was never drawn."""
        self._draw = draw
        self._safe_s = safe_s
        self._held: Amounts | None = None
        """All that was drawn; infinite: unlimited."""
        self._num_requests = 0
        self._drawn_s = -math.inf
        self._drawing = asyncio.Lock()
        self._refused: tuple[float, Refusal, Amounts] | None = None
        """When, why, and what was needed."""

    @property
    def _is_metered(self) -> bool:
        return True

    async def admit(self) -> None:
        """Let a request begin, if the limits leave anything; nothing is drawn for its calls yet.

        Raises:
            QuotaExceeded: If they do not.
            QuotaUnknown: If the store cannot be asked.
        """
        one = Amounts(requests=1)
        if self._is_empty():
            async with self._drawing:
                if self._is_empty():
                    await self._draw_more(self._missing(one) or Amounts(), one, "a request")
        await self._have(one, "a request")
        self._num_requests += 1

    async def _cover(self, most: Use, work: str) -> None:
        await self._have(Amounts(most.usd, most.tokens), work)

    async def _have(self, needed: Amounts, work: str) -> None:
        """Draw until there is enough; nothing runs between the last look and the return."""
        for _ in range(_DRAWS):
            if self._missing(needed) is None:
                return
            async with self._drawing:
                missing = self._missing(needed)
                if missing is not None:
                    await self._draw_more(missing, needed, work)
        raise QuotaUnknown("other requests of this API key use what is left; try again")

    def _left(self) -> Amounts:
        """What is in the purse; a little more, because sums are rounded."""
        if self._held is None or time.time() > self.renewed_s + self._safe_s:
            return Amounts()
        used = self._used()
        return Amounts(
            *(
                math.inf if math.isinf(drawn) else drawn * (1 + _ROUNDING) - gone
                for drawn, gone in zip(self._held, used, strict=True)
            )
        )

    def _used(self) -> Amounts:
        """What calls have spent and reserved."""
        usd, tokens = (
            self._spent.usd + self._reserved.usd,
            self._spent.tokens + self._reserved.tokens,
        )
        return Amounts(usd, tokens, self._num_requests)

    def _missing(self, needed: Amounts) -> Amounts | None:
        """What has to be drawn, at least; `None`: nothing."""
        left = self._left()
        missing = Amounts(*(max(0.0, a - b) for a, b in zip(needed, left, strict=True)))
        return missing if any(missing) else None

    def _is_empty(self) -> bool:
        """Whether the store has to say if anything is left."""
        left, drawn = self._left(), self._held or Amounts()
        is_some = all(
            math.isinf(a) or a > 2 * _ROUNDING * b
            for a, b in ((left.usd, drawn.usd), (left.tokens, drawn.tokens))
        )
        return not is_some and time.monotonic() > self._drawn_s + _REFUSED_S

    async def _draw_more(self, missing: Amounts, needed: Amounts, work: str) -> None:
        if self._refused is not None:
            at_s, why, was_needed = self._refused
            is_fresh = time.monotonic() < at_s + _REFUSED_S
            if is_fresh and getattr(missing, why.unit) >= getattr(was_needed, why.unit):
                raise _exceeded(why, needed, work)
        drawn = await self._draw(self.lease_id, missing)
        if isinstance(drawn, Refusal):
            self._refused = (time.monotonic(), drawn, missing)
            raise _exceeded(drawn, needed, work)
        self._refused = None
        self.renewed_s = time.time()
        self.ends_unix_s = min(self.ends_unix_s, drawn.ends_unix_s)
        self._drawn_s = time.monotonic()
        before = self._held
        if before is None or drawn.is_new:  # a lease that has expired holds nothing any more
            before = self._used()
        self._held = Amounts(*(a + b for a, b in zip(before, drawn.amounts, strict=True)))


def _exceeded(why: Refusal, needed: Amounts, work: str) -> QuotaExceeded:
    """The refusal as the caller is told it."""
    words, wanted = _WORDS[why.unit], getattr(needed, why.unit)
    resets = datetime.fromtimestamp(why.resets_unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    asks = f", and {work} may take {words.format(wanted)}" if wanted else ""
    return QuotaExceeded(
        f"this API key may use {words.format(why.limit)} per {why.per}: "
        f"{words.format(why.spent)} are spent, {words.format(max(0.0, why.held))} set aside for "
        f"requests under way{asks}; the limit begins anew at {resets}",
        None,
        wanted,
        why.unit,
        max(1.0, why.resets_unix_s - time.time()),
    )
