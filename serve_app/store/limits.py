"""What an API key may use in a period, and what it has used: dollars, tokens, requests.

Periods follow the calendar in UTC. A request counts in the period in which it began.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, NamedTuple

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.errors import ConfigError, NotFound
from serve_app.store.database import Store
from serve_app.store.tables import ApiKeyRow, KeyLeaseRow, KeyLimitRow, KeyWindowRow, RequestRow


class Period(StrEnum):
    """How long a limit holds until it begins anew."""

    HOUR = "hour"
    DAY = "day"
    WEEK = "week"
    """From Monday on."""
    MONTH = "month"

    def window(self, unix_s: float) -> tuple[float, float]:
        """Beginning and end of the period that a time lies in, in seconds since the epoch."""
        at = datetime.fromtimestamp(unix_s, UTC).replace(minute=0, second=0, microsecond=0)
        if self is Period.HOUR:
            return at.timestamp(), (at + timedelta(hours=1)).timestamp()
        at = at.replace(hour=0)
        if self is Period.DAY:
            return at.timestamp(), (at + timedelta(days=1)).timestamp()
        if self is Period.WEEK:
            at -= timedelta(days=at.weekday())
            return at.timestamp(), (at + timedelta(days=7)).timestamp()
        at = at.replace(day=1)
        return at.timestamp(), (at + timedelta(days=31)).replace(day=1).timestamp()


class Amounts(NamedTuple):
    """Dollars, tokens (of prompts and completions) and requests."""

    usd: float = 0.0
    tokens: float = 0.0
    requests: float = 0.0


UNITS = Amounts._fields


@dataclass(frozen=True, slots=True)
class PeriodUsage:
    """One period of a key that has not ended."""

    per: Period
    began_unix_s: float
    resets_unix_s: float
    spent: Amounts
    """By finished requests."""
    held: Amounts
    """By gateways for requests under way, and for the next ones; of limited units alone."""
    limit: Mapping[str, float]
    """By unit; what is not named is unlimited."""


async def set_limit(
    store: Store, key_id: str, per: str, amounts: Mapping[str, float | None]
) -> None:
    """Limit what a key may use in a period; units that are not named keep their limit.

    Gateways notice within seconds. What they hold already may still be used.

    Args:
        store: Where keys are.
        key_id: The key.
        per: A `Period`.
        amounts: By unit; `None` keeps the limit as it is.

    Raises:
        ConfigError: If the period is unknown, no amount is given, or one is not above 0.
        NotFound: If there is no such key, or it was revoked.
        StoreError: If the store is away.
    """
    period = read_period(per)
    wanted = {unit: amount for unit, amount in amounts.items() if amount is not None}
    if not wanted:
        raise ConfigError("a limit has dollars, tokens or requests; none was given")
    for unit, amount in wanted.items():
        if not 0 < amount < math.inf:
            raise ConfigError(
                f"a limit on {unit} is a number above 0, got {amount!r}; "
                "`atlas keys revoke` ends a key"
            )
        if unit != "usd" and amount < 1:
            raise ConfigError(f"a limit on {unit} is 1 at least, got {amount!r}")
    of_period = (KeyLimitRow.key_id == key_id, KeyLimitRow.per == period.value)
    async with store.begin() as connection:
        await _note_change(connection, key_id, time.time())
        done = await connection.execute(update(KeyLimitRow).where(*of_period).values(**wanted))
        if not done.rowcount:
            values = {"key_id": key_id, "per": period.value, **wanted}
            await connection.execute(insert(KeyLimitRow).values(**values))


async def remove_limits(store: Store, key_id: str, per: str | None = None) -> None:
    """Take limits away; those that are not there already are no error.

    Args:
        store: Where keys are.
        key_id: The key.
        per: The `Period` whose limits go; `None`: all.

    Raises:
        ConfigError: If the period is unknown.
        NotFound: If there is no such key, or it was revoked.
        StoreError: If the store is away.
    """
    of_period = () if per is None else (KeyLimitRow.per == read_period(per).value,)
    async with store.begin() as connection:
        await _note_change(connection, key_id, time.time())
        await connection.execute(
            delete(KeyLimitRow).where(KeyLimitRow.key_id == key_id, *of_period)
        )
        rest = select(func.count()).select_from(KeyLimitRow).where(KeyLimitRow.key_id == key_id)
        if not await connection.scalar(rest):
            await _note_change(connection, key_id, None)


def read_period(per: str) -> Period:
    """A period by its name.

    Raises:
        ConfigError: If there is none of that name.
    """
    if per not in set(Period):
        raise ConfigError(f"a limit is per {', '.join(Period)}; got {per!r}")
    return Period(per)


async def _note_change(
    connection: AsyncConnection, key_id: str, limited_unix_s: float | None
) -> None:
    """Have gateways see that the limits of a key have changed."""
    done = await connection.execute(
        update(ApiKeyRow)
        .where(ApiKeyRow.key_id == key_id, ApiKeyRow.revoked_unix_s.is_(None))
        .values(limited_unix_s=limited_unix_s)
    )
    if not done.rowcount:
        raise NotFound(f"no API key {key_id!r} that is in use; `atlas keys list` shows them")


async def limits_of(connection: AsyncConnection, key_id: str) -> dict[Period, dict[str, float]]:
    """The limits of a key, by period and unit."""
    rows = await connection.execute(
        select(KeyLimitRow.__table__).where(KeyLimitRow.key_id == key_id).order_by(KeyLimitRow.per)
    )
    return {
        Period(row.per): {
            unit: getattr(row, unit) for unit in UNITS if getattr(row, unit) is not None
        }
        for row in rows
    }


async def usage_of(store: Store, key_id: str) -> list[PeriodUsage]:
    """What a key has used in the hour, day, week and month that it is now, with or without limits.

    Args:
        store: Where keys and requests are.
        key_id: The key, or `LOCAL_OWNER`.

    Raises:
        StoreError: If the store is away.
    """
    now_s = time.time()
    usages = []
    async with store.begin() as connection:
        limits = await limits_of(connection, key_id)
        for per in Period:
            began_s, ends_s = per.window(now_s)
            window = (
                await connection.execute(
                    select(KeyWindowRow.__table__).where(
                        KeyWindowRow.key_id == key_id,
                        KeyWindowRow.per == per.value,
                        KeyWindowRow.began_unix_s == began_s,
                    )
                )
            ).first()
            if window is None or per not in limits:
                spent = await spent_since(connection, key_id, began_s)
            else:
                spent = Amounts(*(getattr(window, f"spent_{unit}") for unit in UNITS))
            held = await _held(connection, key_id, per, began_s, now_s)
            usages.append(PeriodUsage(per, began_s, ends_s, spent, held, limits.get(per, {})))
    return usages


async def spent_since(connection: AsyncConnection, key_id: str, began_unix_s: float) -> Amounts:
    """What the requests of a key have used that began at a time or later, as the store has them."""
    row: Any = RequestRow
    sums = await connection.execute(
        select(
            func.coalesce(func.sum(row.cost_usd), 0.0),
            func.coalesce(func.sum(row.prompt_tokens + row.completion_tokens), 0),
            func.count(),
        ).where(
            row.owner == key_id,
            row.created_unix_s >= began_unix_s,  # the index knows this
            row.created_unix_s - row.seconds >= began_unix_s,
        )
    )
    return Amounts(*(float(value) for value in sums.one()))


async def _held(
    connection: AsyncConnection, key_id: str, per: Period, began_s: float, now_s: float
) -> Amounts:
    """What leases hold that have not expired."""
    sums = await connection.execute(
        select(*(func.coalesce(func.sum(getattr(KeyLeaseRow, unit)), 0.0) for unit in UNITS)).where(
            KeyLeaseRow.key_id == key_id,
            KeyLeaseRow.per == per.value,
            KeyLeaseRow.began_unix_s == began_s,
            KeyLeaseRow.expires_unix_s > now_s,
        )
    )
    return Amounts(*(float(value) for value in sums.one()))
