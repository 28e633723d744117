"""What a key has used and may use, as its owner is shown it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from serve_app.gateway.chat.trajectory import Shown
from serve_app.store import Amounts, Period, PeriodUsage


class ShownAmounts(Shown):
    """Dollars, tokens and requests."""

    usd: float
    tokens: int
    requests: int

    @classmethod
    def of(cls, amounts: Amounts) -> Self:
        """As they are shown: never below 0."""
        return cls(
            usd=max(0.0, amounts.usd),
            tokens=max(0, round(amounts.tokens)),
            requests=max(0, round(amounts.requests)),
        )


class ShownLimit(Shown):
    """What may be used in a period; `null`: unlimited."""

    usd: float | None = None
    tokens: float | None = None
    requests: float | None = None


class ShownPeriod(Shown):
    """A period that has not ended."""

    per: Period
    began_unix_s: float
    resets_unix_s: float
    """When it ends, and the limit begins anew."""
    spent: ShownAmounts
    """By finished requests that began in the period."""
    held: ShownAmounts
    """Set aside by gateways for requests under way and the next ones; of limited units alone."""
    limit: ShownLimit


class KeyUsage(Shown):
    """What one key has used, and may use."""

    object: Literal["atlas.usage"] = "atlas.usage"
    owner: str
    """Id of the key."""
    data: list[ShownPeriod]
    """The hour, day, week and month that it is now, in UTC."""

    @classmethod
    def of(cls, owner: str, periods: Sequence[PeriodUsage]) -> Self:
        """The response for what the store has."""
        return cls(
            owner=owner,
            data=[
                ShownPeriod(
                    per=period.per,
                    began_unix_s=period.began_unix_s,
                    resets_unix_s=period.resets_unix_s,
                    spent=ShownAmounts.of(period.spent),
                    held=ShownAmounts.of(period.held),
                    limit=ShownLimit(**period.limit),
                )
                for period in periods
            ],
        )
