"""Leases: slices of a key's limits that one gateway holds and spends without asking again.

What a lease holds counts as used, so that all gateways together never hold more than a limit
leaves. A slice is drawn by an `UPDATE` whose condition is that it fits. With each outcome that is
written, in the same transaction, its cost moves from held to spent; what is left of a lease goes
back when its gateway needs it no more, or when the lease expires, as a dead gateway's does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.errors import StoreError
from serve_app.schemas import LOCAL_OWNER
from serve_app.store.database import Store
from serve_app.store.limits import UNITS, Amounts, Period, limits_of, spent_since
from serve_app.store.rows import RequestRows
from serve_app.store.tables import KeyLeaseRow as Lease
from serve_app.store.tables import KeyWindowRow as Window

_SLICES = 50
"""Of a limit, at least one of these is drawn at once: what a gateway may hold without need."""
_ROUNDING = 1e-9
"""Sums of floats are off by less than this share of a limit."""
_LOCK = 20262
"""Number of PostgreSQL's advisory lock: no outcome is written while a window is opened."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What was added to a lease."""

    amounts: Amounts
    """Infinite: the unit has no limit."""
    ends_unix_s: float
    """When the first of the lease's periods ends; infinite without limits."""
    is_new: bool
    """Whether the lease held nothing before; one that has expired does not."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why nothing was added."""

    per: Period
    """The limit that leaves too little."""
    unit: str
    limit: float
    spent: float
    held: float
    """By all gateways, for requests under way."""
    resets_unix_s: float


async def draw_lease(
    store: Store, key_id: str, lease_id: str, needed: Amounts, lease_s: float
) -> Grant | Refusal:
    """Add to a lease what is needed, or a larger slice where there is one.

    Args:
        store: Where leases are.
        key_id: Whose limits.
        lease_id: Of the gateway for this key and these periods; the first draw makes it.
        needed: The least that helps. Nothing is drawn of a unit that is not needed; the answer is
            a refusal all the same where nothing of it is left.
        lease_s: How long the lease holds from now on, in seconds.

    Raises:
        StoreError: If the store is away.
    """
    now_s = time.time()
    await _open_windows(store, key_id, now_s)
    async with store.begin() as connection:
        await _release(connection, Lease.key_id == key_id, Lease.expires_unix_s <= now_s)
        limits = await limits_of(connection, key_id)
        held = await connection.execute(  # leases before windows, as everywhere: no deadlock
            select(Lease.per, Lease.began_unix_s)
            .where(Lease.lease_id == lease_id)
            .order_by(Lease.per)
            .with_for_update()
        )
        began = {Period(per): began_s for per, began_s in held}
        is_new = not began
        if is_new:
            began = {per: per.window(now_s)[0] for per in limits}
        windows = [await _locked(connection, key_id, per, began[per]) for per in sorted(began)]
        grant = _fitting(windows, limits, needed)
        if isinstance(grant, Refusal):
            return grant
        for window in windows:
            await _hold(connection, window, limits.get(Period(window.per), {}), grant)
            await _add(connection, window, lease_id, grant, now_s + lease_s, is_new=is_new)
        ends_s = min((window.ends_unix_s for window in windows), default=math.inf)
        return Grant(grant, ends_s, is_new)


def _fitting(
    windows: Sequence[Any], limits: Mapping[Period, Mapping[str, float]], needed: Amounts
) -> Amounts | Refusal:
    """As much as fits into every window, up to a slice; a refusal where that is too little."""
    granted = dict.fromkeys(UNITS, math.inf)
    for window in windows:
        for unit, limit in limits.get(Period(window.per), {}).items():
            spent, held = getattr(window, f"spent_{unit}"), getattr(window, f"leased_{unit}")
            left, least = limit - spent - held, getattr(needed, unit)
            if left <= limit * _ROUNDING or least > left + limit * _ROUNDING:
                return Refusal(Period(window.per), unit, limit, spent, held, window.ends_unix_s)
            part = limit / _SLICES if unit == "usd" else max(1.0, limit // _SLICES)
            drawn = max(least, min(left, part)) if least else 0.0
            granted[unit] = min(granted[unit], drawn)
    return Amounts(**granted)


async def _locked(connection: AsyncConnection, key_id: str, per: Period, began_s: float) -> Any:
    """A window's row; nobody else changes it until the transaction ends.

    Raises:
        StoreError: If there is none.
    """
    row = (
        await connection.execute(
            select(Window.__table__)
            .where(Window.key_id == key_id, Window.per == per.value)
            .where(Window.began_unix_s == began_s)
            .with_for_update()
        )
    ).first()
    if row is None:
        raise StoreError("the limits of the API key have just changed; try again")
    return row


async def _hold(
    connection: AsyncConnection, window: Any, limits: Mapping[str, float], grant: Amounts
) -> None:
    """Count a grant as held, if it fits.

    Raises:
        StoreError: If it does not.
    """
    values: dict[Any, Any] = {}
    fits = []
    for unit in UNITS:
        amount = _finite(getattr(grant, unit))
        spent, leased = getattr(Window, f"spent_{unit}"), getattr(Window, f"leased_{unit}")
        values[leased] = leased + amount
        if unit in limits:
            fits.append(spent + leased + amount <= limits[unit] * (1 + _ROUNDING))
    done = await connection.execute(update(Window).where(*_is(window), *fits).values(values))
    if done.rowcount != 1:
        raise StoreError("the limits of the API key have just been reached; try again")


async def _add(
    connection: AsyncConnection,
    window: Any,
    lease_id: str,
    grant: Amounts,
    expires_unix_s: float,
    *,
    is_new: bool,
) -> None:
    """Add a grant to the lease's row of one window."""
    amounts = {unit: _finite(getattr(grant, unit)) for unit in UNITS}
    if is_new:
        row = {"lease_id": lease_id, "per": window.per, "key_id": window.key_id}
        row |= {"began_unix_s": window.began_unix_s, "expires_unix_s": expires_unix_s, **amounts}
        await connection.execute(insert(Lease).values(**row))
        return
    added = {unit: getattr(Lease, unit) + amount for unit, amount in amounts.items()}
    await connection.execute(
        update(Lease)
        .where(Lease.lease_id == lease_id, Lease.per == window.per)
        .values(**added, expires_unix_s=expires_unix_s)
    )


async def renew_leases(store: Store, lease_ids: Iterable[str], lease_s: float) -> set[str]:
    """Hold leases for longer.

    Returns:
        Those that had not expired.

    Raises:
        StoreError: If the store is away.
    """
    ids, now_s = list(lease_ids), time.time()
    of_these = (Lease.lease_id.in_(ids), Lease.expires_unix_s > now_s)
    async with store.begin() as connection:
        await connection.execute(
            update(Lease).where(*of_these).values(expires_unix_s=now_s + lease_s)
        )
        return set(await connection.scalars(select(Lease.lease_id).where(*of_these)))


async def give_back_lease(store: Store, lease_id: str) -> None:
    """End a lease, whose outcomes are all written; what is left of it is free for others.

    Raises:
        StoreError: If the store is away; the lease expires by itself then.
    """
    async with store.begin() as connection:
        await _release(connection, Lease.lease_id == lease_id)


async def settle(connection: AsyncConnection, rows: Sequence[RequestRows]) -> None:
    """Count the cost of requests that are written in this transaction.

    What a request's lease holds becomes spent. Where the lease is gone, or there was none because
    the key's limits are younger than the request, the cost is counted in the periods in which the
    request began. Keys without limits have no periods.
    """
    of_keys = sorted(
        (row for row in rows if row.request["owner"] != LOCAL_OWNER),
        key=lambda row: (row.request["owner"], row.lease_id or ""),
    )
    if not of_keys:
        return
    if connection.dialect.name != "sqlite":
        await connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock_shared({_LOCK})")
    leased: dict[tuple[str, str], list[RequestRows]] = {}
    others: list[RequestRows] = []
    for row in of_keys:
        if row.lease_id is None:
            others.append(row)
        else:
            leased.setdefault((row.request["owner"], row.lease_id), []).append(row)
    for (key_id, lease_id), requests in leased.items():
        held = await connection.execute(
            select(Lease.__table__)
            .where(Lease.lease_id == lease_id, Lease.key_id == key_id)
            .order_by(Lease.per)
            .with_for_update()
        )
        cost, windows = _sum(requests), held.all()
        for window in windows:
            await _spend(connection, window, cost)
        if not windows:
            others += requests
    if others:
        await _spend_by_time(connection, others)


async def _spend(connection: AsyncConnection, lease: Any, cost: Amounts) -> None:
    """Turn what a lease holds in one window into spent."""
    taken = {unit: min(getattr(lease, unit), getattr(cost, unit)) for unit in UNITS}
    await connection.execute(
        update(Lease)
        .where(Lease.lease_id == lease.lease_id, Lease.per == lease.per)
        .values({unit: getattr(Lease, unit) - amount for unit, amount in taken.items()})
    )
    values: dict[Any, Any] = {}
    for unit in UNITS:
        spent, held = getattr(Window, f"spent_{unit}"), getattr(Window, f"leased_{unit}")
        values |= {spent: spent + getattr(cost, unit), held: held - taken[unit]}
    await connection.execute(update(Window).where(*_is(lease)).values(values))


async def _spend_by_time(connection: AsyncConnection, requests: Sequence[RequestRows]) -> None:
    """Count requests without a lease in the windows in which they began."""
    keys = {row.request["owner"] for row in requests}
    windows = await connection.execute(
        select(Window.key_id, Window.per, Window.began_unix_s, Window.ends_unix_s)
        .where(Window.key_id.in_(keys), Window.ends_unix_s > min(map(_began_s, requests)))
        .order_by(Window.key_id, Window.per, Window.began_unix_s)
    )
    for window in windows.all():
        inside = [
            row
            for row in requests
            if row.request["owner"] == window.key_id
            and window.began_unix_s <= _began_s(row) < window.ends_unix_s
        ]
        if inside:
            cost = _sum(inside)
            added: dict[Any, Any] = {
                getattr(Window, f"spent_{unit}"): getattr(Window, f"spent_{unit}")
                + getattr(cost, unit)
                for unit in UNITS
            }
            await connection.execute(update(Window).where(*_is(window)).values(added))


async def _open_windows(store: Store, key_id: str, now_s: float) -> None:
    """Make the rows of the periods that it is now, with what was spent in them before."""
    async with store.begin() as connection:
        limits = await limits_of(connection, key_id)
        known = await connection.execute(
            select(Window.per, Window.began_unix_s).where(
                Window.key_id == key_id, Window.ends_unix_s > now_s
            )
        )
        missing = {(per, per.window(now_s)) for per in limits}
        missing -= {(Period(per), Period(per).window(began_s)) for per, began_s in known}
    if not missing:
        return
    async with store.begin() as connection:
        if connection.dialect.name == "sqlite":
            await connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            await connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
        for per, (began_s, ends_s) in sorted(missing):
            of_window = (Window.key_id == key_id, Window.per == per.value)
            known_s = select(Window.ends_unix_s).where(*of_window, Window.began_unix_s == began_s)
            if await connection.scalar(known_s) is not None:
                continue  # another gateway was first
            spent = await spent_since(connection, key_id, began_s)
            row: dict[str, str | float] = {"key_id": key_id, "per": per.value}
            row |= {"began_unix_s": began_s, "ends_unix_s": ends_s}
            row |= {f"spent_{unit}": amount for unit, amount in spent._asdict().items()}
            row |= {f"leased_{unit}": 0.0 for unit in UNITS}
            await connection.execute(insert(Window).values(**row))


async def _release(connection: AsyncConnection, *which: Any) -> None:
    """End leases: nobody holds any more what they held."""
    ended = await connection.execute(delete(Lease).where(*which).returning(Lease.__table__))
    for lease in sorted(ended.all(), key=lambda lease: (lease.key_id, lease.per)):
        values: dict[Any, Any] = {}
        for unit in UNITS:
            held = getattr(Window, f"leased_{unit}")
            values[held] = held - getattr(lease, unit)
        await connection.execute(update(Window).where(*_is(lease)).values(values))


def _is(row: Any) -> tuple[Any, ...]:
    """What is true of the window that a row is of."""
    return (
        Window.key_id == row.key_id,
        Window.per == row.per,
        Window.began_unix_s == row.began_unix_s,
    )


def _sum(requests: Iterable[RequestRows]) -> Amounts:
    rows = [row.request for row in requests]
    return Amounts(
        math.fsum(row["cost_usd"] for row in rows),
        sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows),
        len(rows),
    )


def _began_s(row: RequestRows) -> float:
    began_s: float = row.request["created_unix_s"] - row.request["seconds"]
    return began_s


def _finite(amount: float) -> float:
    """What a row has of an amount; nothing of a unit without a limit."""
    return amount if math.isfinite(amount) else 0.0
