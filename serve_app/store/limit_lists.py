"""Every limit of every key in one look: what is spent, reserved and left of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import and_, func, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.store.console_tables import UsageDayRow
from serve_app.store.database import Store
from serve_app.store.limits import UNITS, Amounts, Period, PeriodUsage
from serve_app.store.tables import (
    ApiKeyRow,
    KeyLeaseRow,
    KeyLimitRow,
    KeyWindowRow,
    RequestRow,
)

MAX_LIMITS = 2_000
"""Limits that are read, at most: more are not looked at on a page."""
_KEYS_AT_ONCE = 500
"""Keys in one query; databases bound the number of parameters."""

_Kept = dict[tuple[str, Period], Amounts]
"""By key and period."""


async def limited_usage(store: Store) -> list[tuple[str, PeriodUsage]]:
    """The running period of every limit of a key that is in use, by key id.

    What a key without a window has spent is summed from its days: no gateway has asked for a slice
    of this period yet, so it was spent before the limit was set.

    Raises:
        StoreError: If the store is away.
    """
    now_s = time.time()
    windows = {per: per.window(now_s) for per in Period}
    limit, window = KeyLimitRow, KeyWindowRow
    of_now = or_(
        *(
            and_(window.per == per.value, window.began_unix_s == began_s)
            for per, (began_s, _) in windows.items()
        )
    )
    query = (
        select(
            limit.key_id,
            limit.per,
            *(getattr(limit, unit) for unit in UNITS),
            *(getattr(window, f"spent_{unit}") for unit in UNITS),
        )
        .join(ApiKeyRow, ApiKeyRow.key_id == limit.key_id)
        .outerjoin(window, and_(window.key_id == limit.key_id, window.per == limit.per, of_now))
        .where(ApiKeyRow.revoked_unix_s.is_(None))
        .order_by(limit.key_id, limit.per)
        .limit(MAX_LIMITS)
    )
    async with store.begin() as connection:
        rows = (await connection.execute(query)).all()
        held = await _held(connection, windows, now_s)
        unseen = await _spent(connection, [(r.key_id, Period(r.per)) for r in rows if r[5] is None])
    found = []
    for key_id, per_name, *values in rows:
        per = Period(per_name)
        limits = {u: v for u, v in zip(UNITS, values[:3], strict=True) if v is not None}
        spent = unseen.get((key_id, per), Amounts())
        if values[3] is not None:
            spent = Amounts(*values[3:])
        reserved = held.get((key_id, per), Amounts())
        found.append((key_id, PeriodUsage(per, *windows[per], spent, reserved, limits)))
    return found


async def _held(
    connection: AsyncConnection, windows: Mapping[Period, tuple[float, float]], now_s: float
) -> _Kept:
    """What leases hold that have not expired."""
    row = KeyLeaseRow
    query = (
        select(row.key_id, row.per, *(func.sum(getattr(row, unit)) for unit in UNITS))
        .where(
            row.expires_unix_s > now_s,
            or_(
                *(
                    and_(row.per == per.value, row.began_unix_s == began_s)
                    for per, (began_s, _) in windows.items()
                )
            ),
        )
        .group_by(row.key_id, row.per)
    )
    return {
        (key_id, Period(per)): Amounts(*map(float, sums))
        for key_id, per, *sums in await connection.execute(query)
    }


async def _spent(connection: AsyncConnection, wanted: Sequence[tuple[str, Period]]) -> _Kept:
    """What keys have used in the running period, as the sums of days and the requests have it."""
    spent: _Kept = {}
    for per in Period:
        began_s, _ = per.window(time.time())
        keys = [key_id for key_id, of in wanted if of is per]
        for some in _parts(keys):
            spent |= {
                (key_id, per): Amounts(*map(float, sums))
                for key_id, *sums in await connection.execute(_used(per, began_s, some))
            }
    return spent


def _used(per: Period, began_s: float, keys: Sequence[str]) -> Any:
    """Dollars, tokens and requests by key; an hour is no sum of days."""
    row: Any = RequestRow if per is Period.HOUR else UsageDayRow
    at = row.created_unix_s if per is Period.HOUR else row.began_unix_s
    count = func.count() if per is Period.HOUR else func.sum(row.requests)
    tokens = func.sum(row.prompt_tokens + row.completion_tokens)
    return (
        select(row.owner, func.sum(row.cost_usd), tokens, count)
        .where(row.owner.in_(keys), at >= began_s)
        .group_by(row.owner)
    )


def _parts(keys: Sequence[str]) -> Iterable[Sequence[str]]:
    return (keys[start : start + _KEYS_AT_ONCE] for start in range(0, len(keys), _KEYS_AT_ONCE))
